// How the work of channel norms is cut, and the vectors of C numbers between a reduction and what is written with it.
// Cuts depend on (B, C, S) alone: no result's bits change with the number of threads. Baseline code only.
// May include: share.h.
// Read next: channels.cpp, samples.cpp.
#pragma once

#include "share.h"

namespace normkit {

inline ChannelBlocks cut(const ChannelsShape& shape, bool per_sample) {
    ChannelBlocks cut{};
    cut.groups = per_sample ? shape.batch : 1;
    if (shape.channels_last) {
        const int64_t width = shape.channels < kTile ? shape.channels : kTile;
        const int64_t rows = 32768 / (width > 0 ? width : 1);
        cut.rows_per_block = rows < kMaxTileRows ? rows : kMaxTileRows;
        cut.tiles = divide_up(shape.channels, kTile);
        cut.blocks = divide_up(per_sample ? shape.space : shape.batch * shape.space, cut.rows_per_block);
    } else {
        const int64_t samples = shape.space > 0 ? kSpaceBlock / 2 / shape.space : 1;
        cut.samples_per_block = per_sample || samples < 1 ? 1 : samples;
        cut.space_blocks = divide_up(shape.space, kSpaceBlock);
        cut.blocks = cut.space_blocks * (per_sample ? 1 : divide_up(shape.batch, cut.samples_per_block));
        cut.tiles = shape.channels;
    }
    return cut;
}

inline int64_t valid(const uint8_t* mask, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += mask[i] != 0;
    return count;
}

// Elements of one channel in block k of group g; the same for every channel.
inline double block_count(const ChannelsShape& shape, const ChannelBlocks& cut, int64_t g, int64_t k) {
    if (shape.channels_last) {
        const int64_t lines = cut.groups > 1 ? shape.space : shape.batch * shape.space;
        const int64_t first = k * cut.rows_per_block, left = lines - first;
        const int64_t n = left < cut.rows_per_block ? left : cut.rows_per_block;
        return double(shape.mask != nullptr ? valid(shape.mask + g * shape.space + first, n) : n);
    }
    const int64_t sample = cut.groups > 1 ? g : k / cut.space_blocks * cut.samples_per_block;
    const int64_t samples_left = shape.batch - sample;
    const int64_t samples = samples_left < cut.samples_per_block ? samples_left : cut.samples_per_block;
    const int64_t start = k % cut.space_blocks * kSpaceBlock;
    const int64_t n = shape.space - start < kSpaceBlock ? shape.space - start : kSpaceBlock;
    if (shape.mask == nullptr) return double(samples * n);
    int64_t count = 0;
    for (int64_t b = 0; b < samples; ++b) count += valid(shape.mask + (sample + b) * shape.space + start, n);
    return double(count);
}

using UnitKernel = void (*)(const ChannelsReduction&, int64_t first, int64_t last);
using MergeKernel = void (*)(const ChannelsReduction&, int64_t group, int64_t first, int64_t last);

inline int64_t pieces_per_line(const ChannelsShape& shape) {
    return divide_up(shape.channels_last ? shape.channels : shape.space, kSpaceBlock);
}

// Whether to write past the caches: where the `tensors` read and written do not fit, and lines that start at a vector
// are followed by lines that do. Some lines past the caches and others not, with cache lines of memory that both share,
// took the backward of GroupNorm (64, 256, 14, 14) from 650 to 1000 us.
inline bool streams(const ChannelsShape& shape, int dtype, int tensors) {
    const int64_t line_bytes = (shape.channels_last ? shape.channels : shape.space) * storage_bytes(dtype);
    const int64_t lines = shape.batch * (shape.channels_last ? shape.space : shape.channels);
    return line_bytes % 64 == 0 && beyond_cache(lines * line_bytes * tensors);
}

// counts[g * blocks + k] for channels_moments.
inline Scratch<double> block_counts(const ChannelsShape& shape, const ChannelBlocks& cut) {
    Scratch<double> counts = scratch<double>(cut.groups * cut.blocks);
    for (int64_t g = 0; g < cut.groups; ++g)
        for (int64_t k = 0; k < cut.blocks; ++k)
            counts[static_cast<size_t>(g * cut.blocks + k)] = block_count(shape, cut, g, k);
    return counts;
}

// (C,) numbers in the accumulation dtype, read and written as double.
struct Vector {
    Scratch<char> memory;
    void* data;
    bool wide;

    Vector(int64_t channels, int dtype)
        : memory(scratch<char>(channels * accumulation_bytes(dtype))), data(memory.get()), wide(dtype == kFloat64) {}
    double operator[](int64_t c) const {
        return wide ? static_cast<double*>(data)[c] : double(static_cast<float*>(data)[c]);
    }
    // Returns the value as rounded.
    double set(int64_t c, double value) {
        if (wide) return static_cast<double*>(data)[c] = value;
        return double(static_cast<float*>(data)[c] = float(value));
    }
};

inline Vector widened(const Weight& weight, int64_t channels, int dtype) {
    Vector vector(channels, dtype);
    kernels().widen[weight.data != nullptr ? weight.dtype : dtype](weight.data, 0, vector.data, channels);
    return vector;
}

inline void set_layout(const ChannelsNorm& args, ChannelsAffine* apply) {
    apply->shape = args.shape;
    apply->x = args.x;
    apply->dout = args.dout;
    apply->out = args.out;
    apply->out_batch_stride = args.x.batch_stride;
    apply->out_line_stride = args.x.line_stride;
}

}  // namespace normkit
