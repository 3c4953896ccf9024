// LayerNorm over channels-first channels: who computes which positions, and the memory in between. The arithmetic is in
// columns.h.
// Nothing here may change a result's bits with the number of threads: cuts depend on (B, C, S) alone.
// Read next: columns.h.
#include "share.h"

namespace normkit {
namespace {

// The numbers in the accumulation dtype: themselves where they are that already, else a copy in `memory`; ones or zeros
// where there are none.
const void* widened(const Weight& weight, int dtype, int64_t channels, double absent, Scratch<char>& memory) {
    if (weight.data != nullptr && storage_bytes(weight.dtype) == accumulation_bytes(dtype)) return weight.data;
    memory = scratch<char>(channels * accumulation_bytes(dtype));
    if (weight.data != nullptr || absent == 1) {
        kernels().widen[weight.data != nullptr ? weight.dtype : dtype](weight.data, 0, memory.get(), channels);
    } else {
        for (int64_t i = 0; i < channels * accumulation_bytes(dtype); ++i) memory[size_t(i)] = 0;
    }
    return memory.get();
}

// As in rows.cpp: past the caches where the `tensors` do not fit, and every line of `out` starts at a vector.
bool streams(const void* out, int64_t batch, int64_t channels, int64_t space, int dtype, int tensors) {
    const int64_t line_bytes = space * storage_bytes(dtype);
    return (uintptr_t(out) | uintptr_t(line_bytes)) % 64 == 0 && beyond_cache(batch * channels * line_bytes * tensors);
}

// Strips that one line of dweight and dbias sums up: for the sake of precision at most 16, in whose groups a lane adds
// up some 64 positions; for that of threads an eighth of all, but two at least, since a line costs as much to make as
// half a strip.
int64_t strips_per_block(int64_t strips) {
    const int64_t spread = divide_up(strips, 8);
    return spread < 2 ? 2 : spread > 16 ? 16 : spread;
}

}  // namespace

void columns_forward(ColumnsForward args, int dtype, int threads) {
    Scratch<char> gain_memory, shift_memory;
    args.gain = widened(args.weight, dtype, args.channels, 1, gain_memory);
    args.shift = widened(args.bias, dtype, args.channels, 0, shift_memory);
    const int64_t elements = args.batch * args.channels * args.space;
    args.stream = streams(args.out, args.batch, args.channels, args.space, dtype, 2);
    prefer_huge_pages(args.out, elements * storage_bytes(dtype));
    const auto compute = kernels().columns->forward[dtype];
    share(args.batch * divide_up(args.space, kStrip), useful_threads(threads, elements),
          [&](int64_t first, int64_t last) { compute(args, first, last); });
}

void columns_backward(ColumnsBackward args, int dtype, void* dweight, void* dbias, int threads) {
    Scratch<char> gain_memory, dweight_memory, dbias_memory;
    args.gain = widened(args.weight, dtype, args.channels, 1, gain_memory);
    const int64_t elements = args.batch * args.channels * args.space;
    args.stream = args.dx == nullptr || streams(args.dx, args.batch, args.channels, args.space, dtype, 3);
    prefer_huge_pages(args.dx, elements * storage_bytes(dtype));
    const int64_t strips = args.batch * divide_up(args.space, kStrip);
    args.strips_per_block = strips_per_block(strips);
    const int64_t blocks = divide_up(strips, args.strips_per_block);
    if (dweight != nullptr || dbias != nullptr) {
        dweight_memory = scratch<char>(blocks * args.channels * accumulation_bytes(dtype));
        dbias_memory = scratch<char>(blocks * args.channels * accumulation_bytes(dtype));
        args.dweight = dweight_memory.get();
        args.dbias = dbias_memory.get();
    }
    const auto compute = kernels().columns->backward[dtype];
    share(blocks, useful_threads(threads, elements), [&](int64_t first, int64_t last) {
        constexpr int64_t kMostVectorBytes = 64;
        const Scratch<char> lanes = scratch<char>(args.dweight != nullptr ? 2 * args.channels * kMostVectorBytes : 0);
        compute(args, first, last, lanes.get());
    });
    const auto sum = kernels().sum_lines[dtype];
    if (dweight != nullptr) sum({args.dweight, dweight, blocks, args.channels, false}, 0, args.channels);
    if (dbias != nullptr) sum({args.dbias, dbias, blocks, args.channels, false}, 0, args.channels);
}

}  // namespace normkit
