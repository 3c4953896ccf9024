// Row norms: who computes which rows, and the memory in between. The arithmetic is in rows.h.
// Nothing here may change a result's bits with the number of threads: cuts depend on (R, D) alone.
// Read next: rows.h.
#include <initializer_list>

#include "share.h"

namespace normkit {
namespace {

// weight + offset in the accumulation dtype: the weight itself where it is that already, else a copy in `memory`.
const void* widened(Weight weight, int dtype, double offset, int64_t size, Scratch<char>& memory) {
    if (weight.data == nullptr) return nullptr;
    if (offset == 0 && storage_bytes(weight.dtype) == accumulation_bytes(dtype)) return weight.data;
    memory = scratch<char>(size * accumulation_bytes(dtype));
    kernels().widen[weight.dtype](weight.data, offset, memory.get(), size);
    return memory.get();
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
    return wanted > least ? wanted : least;
}

}  // namespace

void rows_forward(RowsForward args, int dtype, Weight weight, Weight bias, double weight_offset, int threads) {
    Scratch<char> gain_memory, bias_memory;
    args.gain = widened(weight, dtype, weight_offset, args.size, gain_memory);
    args.bias = widened(bias, dtype, 0, args.size, bias_memory);
    const int64_t elements = args.rows * args.size;
    prefer_huge_pages(args.out, elements * storage_bytes(dtype));
    prefer_huge_pages(args.total, elements * storage_bytes(dtype));
    threads = useful_threads(threads, elements);
    const auto compute = kernels().rows_forward[dtype];
    if (share_each_row(threads, args.rows, args.size)) {
        const Scratch<Sums> partials = scratch<Sums>(divide_up(args.size, kRowBlock));
        args.partials = partials.get();
        compute(args, 0, args.rows, threads);
    } else {
        share(args.rows, threads, [&](int64_t first, int64_t last) { compute(args, first, last, 1); });
    }
}

void rows_backward(RowsBackward args, int dtype, Weight weight, double weight_offset, RowsBackwardResult result,
                   int threads) {
    Scratch<char> gain_memory, dweight_memory, dbias_memory;
    args.gain = widened(weight, dtype, weight_offset, args.size, gain_memory);
    const int64_t elements = args.rows * args.size;
    prefer_huge_pages(args.dx, elements * storage_bytes(dtype));
    const bool sums = result.dweight != nullptr || result.dbias != nullptr;
    args.rows_per_block = sums ? rows_per_block(args.rows, args.size) : 1;
    const int64_t blocks = divide_up(args.rows, args.rows_per_block);
    const int64_t bytes = blocks * args.size * accumulation_bytes(dtype);
    if (result.dweight != nullptr) dweight_memory = scratch<char>(bytes);
    if (result.dbias != nullptr) dbias_memory = scratch<char>(bytes);
    args.dweight = dweight_memory.get();
    args.dbias = dbias_memory.get();

    threads = useful_threads(threads, elements);
    const auto compute = kernels().rows_backward[dtype];
    if (share_each_row(threads, blocks, args.size)) {
        const Scratch<Sums> partials = scratch<Sums>(divide_up(args.size, kRowBlock));
        args.partials = partials.get();
        compute(args, 0, blocks, threads);
    } else {
        share(blocks, threads, [&](int64_t first, int64_t last) { compute(args, first, last, 1); });
    }

    const LineSum dweight{args.dweight, result.dweight, blocks, args.size};
    const LineSum dbias{args.dbias, result.dbias, blocks, args.size};
    for (const LineSum& sum : {dweight, dbias}) {
        if (sum.out == nullptr) continue;
        share(args.size, useful_threads(threads, blocks * args.size),
              [&](int64_t first, int64_t last) { kernels().sum_lines[dtype](sum, first, last); });
    }
}

}  // namespace normkit
