// Row norms: who computes which rows, and the memory in between. The arithmetic is in rows.h.
// Nothing here may change a result's bits with the number of threads: cuts depend on (R, D) alone.
// Read next: rows.h.
#include <initializer_list>

#include "share.h"

namespace normkit {
namespace {

// The weight in the accumulation dtype: itself where it is that already, else a copy in `memory`; null for a few rows,
// which read and widen it block by block: at one row a copy would be as long as the row.
const void* widened(const Weight& weight, int dtype, int64_t rows, int64_t size, Scratch<char>& memory) {
    if (weight.data != nullptr && weight.offset == 0 && storage_bytes(weight.dtype) == accumulation_bytes(dtype))
        return weight.data;
    if (rows < 2 * kRowGroup) return nullptr;
    memory = scratch<char>(size * accumulation_bytes(dtype));
    kernels().widen[weight.data != nullptr ? weight.dtype : dtype](weight.data, weight.offset, memory.get(), size);
    return memory.get();
}

// Whether to write `out` past the caches: where the `tensors` read and written do not fit, and every row of it starts
// at a vector.
bool streams(const void* out, int64_t rows, int64_t size, int dtype, int tensors) {
    const int64_t row_bytes = size * storage_bytes(dtype);
    return (uintptr_t(out) | uintptr_t(row_bytes)) % 64 == 0 && beyond_cache(rows * row_bytes * tensors);
}

// Threads share the blocks of each row when there are too few rows (or row blocks) to go round.
bool share_each_row(int threads, int64_t shares, int64_t size) {
    return threads > 1 && size > kRowBlock && shares < 4 * threads;
}

// Rows per line of partial dweight and dbias: at most 64 for the sake of precision and at least 16 for that of speed,
// unless that made more than 2^20 partial sums.
int64_t rows_per_block(int64_t rows, int64_t size) {
    constexpr int64_t kMostPartials = int64_t(1) << 20;
    const int64_t most_blocks = size < kMostPartials ? kMostPartials / (size > 0 ? size : 1) : 1;
    const int64_t spread = divide_up(rows, 64);
    const int64_t wanted = spread < 16 ? 16 : spread > 64 ? 64 : spread;
    const int64_t least = divide_up(rows, most_blocks);
    return divide_up(wanted > least ? wanted : least, kRowGroup) * kRowGroup;
}

}  // namespace

void rows_forward(RowsForward args, int dtype, int threads) {
    Scratch<char> gain_memory, shift_memory;
    args.gain = widened(args.weight, dtype, args.rows, args.size, gain_memory);
    if (args.bias.data != nullptr) args.shift = widened(args.bias, dtype, args.rows, args.size, shift_memory);
    const int64_t elements = args.rows * args.size;
    args.stream = streams(args.out, args.rows, args.size, dtype, args.total != nullptr ? 4 : 2);
    prefer_huge_pages(args.out, elements * storage_bytes(dtype));
    prefer_huge_pages(args.total, elements * storage_bytes(dtype));
    threads = useful_threads(threads, elements);
    const auto compute = kernels().rows_forward[dtype];
    if (share_each_row(threads, args.rows, args.size)) {
        const Scratch<Sums> partials = scratch<Sums>(divide_up(args.size, kRowBlock) * kRowGroup);
        args.partials = partials.get();
        compute(args, 0, args.rows, threads);
    } else {
        share(args.rows, threads, [&](int64_t first, int64_t last) { compute(args, first, last, 1); });
    }
}

void rows_backward(RowsBackward args, int dtype, RowsBackwardResult result, int threads) {
    Scratch<char> gain_memory, dweight_memory, dbias_memory;
    args.gain = widened(args.weight, dtype, args.rows, args.size, gain_memory);
    const int64_t elements = args.rows * args.size;
    args.stream = args.dx != nullptr && streams(args.dx, args.rows, args.size, dtype, 3);
    prefer_huge_pages(args.dx, elements * storage_bytes(dtype));
    const bool sums = result.dweight != nullptr || result.dbias != nullptr;
    args.rows_per_block = sums ? rows_per_block(args.rows, args.size) : kRowGroup;
    const int64_t blocks = divide_up(args.rows, args.rows_per_block);
    // One block of rows sums into the result itself, in its dtype. dbias is computed beside dweight, wanted or not.
    args.narrow = result.narrow && args.rows == 1;
    const bool in_place = blocks == 1 && result.narrow == args.narrow;
    const auto lines = [&](void* of, Scratch<char>& memory) -> void* {
        if (of != nullptr && in_place) return of;
        memory = scratch<char>(blocks * args.size * accumulation_bytes(dtype));
        return memory.get();
    };
    args.dweight = sums ? lines(result.dweight, dweight_memory) : nullptr;
    args.dbias = result.dbias != nullptr ? lines(result.dbias, dbias_memory) : nullptr;

    threads = useful_threads(threads, elements);
    const auto compute = kernels().rows_backward[dtype];
    if (share_each_row(threads, blocks, args.size)) {
        const Scratch<Sums> partials = scratch<Sums>(divide_up(args.size, kRowBlock) * kRowGroup);
        args.partials = partials.get();
        compute(args, 0, blocks, threads);
    } else {
        share(blocks, threads, [&](int64_t first, int64_t last) { compute(args, first, last, 1); });
    }

    const LineSum dweight{args.dweight, result.dweight, blocks, args.size, result.narrow};
    const LineSum dbias{args.dbias, result.dbias, blocks, args.size, result.narrow};
    for (const LineSum& sum : {dweight, dbias}) {
        if (sum.out == nullptr || in_place) continue;
        share(args.size, useful_threads(threads, blocks * args.size),
              [&](int64_t first, int64_t last) { kernels().sum_lines[dtype](sum, first, last); });
    }
}

}  // namespace normkit
