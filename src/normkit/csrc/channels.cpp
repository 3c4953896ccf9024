// Channel norms: how the work is cut and who computes which piece. The arithmetic is in channels.h.
// Nothing here may change a result's bits with the number of threads: cuts depend on (B, C, S) alone.
// Read next: channels.h.
#include "share.h"

namespace normkit {
namespace {

ChannelBlocks cut(const ChannelsShape& shape, bool per_sample) {
    ChannelBlocks cut{};
    cut.groups = per_sample ? shape.batch : 1;
    if (shape.channels_last) {
        const int64_t width = shape.channels < kTile ? shape.channels : kTile;
        const int64_t rows = 16384 / (width > 0 ? width : 1);
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

int64_t valid(const uint8_t* mask, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += mask[i] != 0;
    return count;
}

// Elements of one channel in block k of group g; the same for every channel.
double block_count(const ChannelsShape& shape, const ChannelBlocks& cut, int64_t g, int64_t k) {
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

// Partial results of every block into scratch memory, then each group's blocks merged in their order.
void reduce(ChannelsReduction& args, int threads, UnitKernel unit, MergeKernel merge) {
    const ChannelBlocks& cut = args.cut;
    const int64_t channels = args.shape.channels, partials = cut.groups * cut.blocks * channels;
    const Scratch<double> first = scratch<double>(partials), second = scratch<double>(partials);
    args.first = first.get();
    args.second = second.get();
    const int64_t elements = args.shape.batch * channels * args.shape.space;
    share(cut.groups * cut.blocks * cut.tiles, useful_threads(threads, elements),
          [&](int64_t from, int64_t to) { unit(args, from, to); });
    // A unit of merging is 256 channels of a group, so that one group with many blocks is shared as well.
    const int64_t pieces = divide_up(channels, kTile);
    share(cut.groups * pieces, useful_threads(threads, partials), [&](int64_t from, int64_t to) {
        for (int64_t piece = from; piece < to; ++piece) {
            const int64_t start = piece % pieces * kTile;
            merge(args, piece / pieces, start, start + kTile < channels ? start + kTile : channels);
        }
    });
}

// Pieces of lines, see for_lines in channels.h.
template <class Kernel>
void affine(const ChannelsAffine& args, int dtype, int threads, Kernel kernel) {
    const ChannelsShape& shape = args.shape;
    const int64_t lines = shape.batch * (shape.channels_last ? shape.space : shape.channels);
    const int64_t size = shape.channels_last ? shape.channels : shape.space;
    prefer_huge_pages(args.out, lines * size * storage_bytes(dtype));
    share(lines * divide_up(size, kSpaceBlock), useful_threads(threads, lines * size),
          [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

}  // namespace

void channels_moments(ChannelsReduction args, int dtype, bool per_sample, int threads) {
    args.cut = cut(args.shape, per_sample);
    const Scratch<double> counts = scratch<double>(args.cut.groups * args.cut.blocks);
    for (int64_t g = 0; g < args.cut.groups; ++g)
        for (int64_t k = 0; k < args.cut.blocks; ++k)
            counts[static_cast<size_t>(g * args.cut.blocks + k)] = block_count(args.shape, args.cut, g, k);
    args.counts = counts.get();
    reduce(args, threads, kernels().channels_moments[dtype], kernels().merge_moments);
}

void channels_backward_moments(ChannelsReduction args, int dtype, bool per_sample, int threads) {
    args.cut = cut(args.shape, per_sample);
    reduce(args, threads, kernels().channels_backward_moments[dtype], kernels().merge_sums);
}

void channels_affine(const ChannelsAffine& args, int dtype, int threads) {
    affine(args, dtype, threads, kernels().channels_affine[dtype]);
}

void channels_backward_affine(const ChannelsAffine& args, int dtype, int threads) {
    affine(args, dtype, threads, kernels().channels_backward_affine[dtype]);
}

}  // namespace normkit
