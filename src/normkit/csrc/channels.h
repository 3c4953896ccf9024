// The sums of channel norms, forward and backward, over (B, C, S), one axis contiguous.
// May include: core.h, steps.h. Compiled once per instruction set; no threads.
// Read next: affine.h, what is written with them; reference.py, the same formulas in torch.
//
// channels-first: a line is a plane, the S values of one (b, c); its channel's numbers are scalars.
// channels-last: a line is the C values of one (b, s); its channels' numbers are vectors, a masked line is skipped.
#pragma once

#include "core.h"
#include "steps.h"

namespace normkit::NORMKIT_ISA {

NORMKIT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

NORMKIT_INLINE bool aligned(const void* p) { return uintptr_t(p) % kVectorBytes == 0; }

template <class T>
NORMKIT_INLINE const T* line_at(const Lines& lines, int64_t b, int64_t line) {
    return static_cast<const T*>(lines.data) + b * lines.batch_stride + line * lines.line_stride;
}

template <class A>
NORMKIT_INLINE const A* values_at(const ChannelValues& values, int64_t b) {
    return values.data ? static_cast<const A*>(values.data) + b * values.batch_stride : nullptr;
}

// ------------------------------------------------------------------------------------ moments, channels-first

struct Moments {
    double mean, m2;  // m2 = sum of squared deviations
};

// Some samples' planes (or one piece of a plane) of one channel.
struct PlaneBlock {
    int64_t group, block, channel;
    int64_t sample, samples, start, n;

    NORMKIT_INLINE PlaneBlock(const ChannelsReduction& a, int64_t unit) {
        channel = unit % a.shape.channels;
        block = unit / a.shape.channels % a.cut.blocks;
        group = unit / a.shape.channels / a.cut.blocks;
        sample = a.cut.groups > 1 ? group : block / a.cut.space_blocks * a.cut.samples_per_block;
        samples = least(a.cut.samples_per_block, a.shape.batch - sample);
        start = block % a.cut.space_blocks * kSpaceBlock;
        n = least(kSpaceBlock, a.shape.space - start);
    }
    NORMKIT_INLINE const uint8_t* mask(const ChannelsShape& shape, int64_t b) const {
        return shape.mask != nullptr ? shape.mask + (sample + b) * shape.space + start : nullptr;
    }
    NORMKIT_INLINE int64_t result(const ChannelsReduction& a) const {
        return (group * a.cut.blocks + block) * a.shape.channels + channel;
    }
};

// Sums of d = x - center and of its square over the valid elements; a vector's absent lanes do not count.
template <class T, bool kMask>
NORMKIT_BLOCK Sums plane_deviations(const ChannelsReduction& a, const PlaneBlock& at, Acc<T> center) {
    Wide<T> sum[4] = {}, square[4] = {};
    for (int64_t b = 0; b < at.samples; ++b) {
        const T* x = line_at<T>(a.x, at.sample + b, at.channel) + at.start;
        const T* next =
            b + 1 < at.samples ? x + a.x.batch_stride : x;  // far off: nothing else would ask for it in time
        const uint8_t* mask = at.mask(a.shape, b);
        sweep<T>(at.n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
            prefetch<T>(next, i);
            Wide<T> d = load<T>(x + i, lanes) - center;
            d = kMask ? where_valid<T>(mask + i, d, lanes) : keep(d, lanes);
            sum[k] += d;
            square[k] = fused(d, d, square[k]);
        });
    }
    return {add_lanes(sum), add_lanes(square)};
}

// The same moments one by one in double: for squares that do not fit the accumulation dtype, and for inf and NaN.
// next(i) gives element i, or skips it by returning null.
template <class T, class Next>
NORMKIT_INLINE Moments wide_moments(int64_t n, double count, const Next& next) {
    double sum = 0, m2 = 0;
    for (int64_t i = 0; i < n; ++i)
        if (const T* x = next(i)) sum += double(scalar<T>(x));
    const double mean = sum / count;
    for (int64_t i = 0; i < n; ++i)
        if (const T* x = next(i)) m2 += (double(scalar<T>(x)) - mean) * (double(scalar<T>(x)) - mean);
    return {mean, m2};
}

template <class T>
NORMKIT_BLOCK Moments wide_plane_moments(const ChannelsReduction& a, const PlaneBlock& at, double count) {
    return wide_moments<T>(at.samples * at.n, count, [&](int64_t i) -> const T* {
        const int64_t b = i / at.n, s = i % at.n;
        const uint8_t* mask = at.mask(a.shape, b);
        return mask == nullptr || mask[s] ? line_at<T>(a.x, at.sample + b, at.channel) + at.start + s : nullptr;
    });
}

// The mean of the block's first elements, those that count for nothing taken as 0.
template <class T, bool kMask>
NORMKIT_INLINE Acc<T> sample_mean(const ChannelsReduction& a, const PlaneBlock& at) {
    constexpr int64_t kSample = 128;
    const T* x = line_at<T>(a.x, at.sample, at.channel) + at.start;
    const uint8_t* mask = at.mask(a.shape, 0);
    const int64_t n = least(at.n, kSample);
    Wide<T> sum[4] = {};
    sweep<T>(n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
        const Wide<T> v = load<T>(x + i, lanes);
        sum[k] += kMask ? where_valid<T>(mask + i, v, lanes) : v;
    });
    return Acc<T>(add_lanes(sum) / double(n));
}

// One pass about a center that a sample of the block gives, as for rows (rows.h, set_statistics): where the sample's
// mean lies more than a standard deviation off, a second one about the mean itself.
template <class T, bool kMask>
NORMKIT_INLINE Moments plane_moments(const ChannelsReduction& a, const PlaneBlock& at) {
    using A = Acc<T>;
    const double count = a.counts[at.group * a.cut.blocks + at.block];
    if (count == 0) return {0, 0};
    A center = sample_mean<T, kMask>(a, at);
    Sums d = plane_deviations<T, kMask>(a, at, center);
    double delta = d.first / count, m2 = d.second - delta * d.first;
    if (delta * d.first > m2) {
        center = A(double(center) + delta);
        d = plane_deviations<T, kMask>(a, at, center);
        delta = d.first / count;
        m2 = d.second - delta * d.first;
    }
    if (!finite(m2)) return wide_plane_moments<T>(a, at, count);
    return {double(center) + delta, m2 > 0 ? m2 : 0};
}

// ------------------------------------------------------------------------------------- moments, channels-last

// Some lines (up to kMaxTileRows) of a tile of channels; invalid lines are left out.
template <class T>
struct Tile {
    int64_t group, block, channel, width;
    int rows = 0;
    const T* x[kMaxTileRows];
    const T* dout[kMaxTileRows];
    int64_t sample[kMaxTileRows];

    NORMKIT_INLINE Tile(const ChannelsReduction& a, int64_t unit) {
        channel = unit % a.cut.tiles * kTile;
        width = least(kTile, a.shape.channels - channel);
        block = unit / a.cut.tiles % a.cut.blocks;
        group = unit / a.cut.tiles / a.cut.blocks;
        const bool per_sample = a.cut.groups > 1;
        const int64_t lines = per_sample ? a.shape.space : a.shape.batch * a.shape.space;
        const int64_t first = block * a.cut.rows_per_block, last = least(first + a.cut.rows_per_block, lines);
        int64_t b = per_sample ? group : first / a.shape.space, s = per_sample ? first : first % a.shape.space;
        for (int64_t line = first; line < last; ++line, ++s) {
            if (s == a.shape.space) s = 0, ++b;
            if (a.shape.mask != nullptr && !a.shape.mask[b * a.shape.space + s]) continue;
            x[rows] = line_at<T>(a.x, b, s) + channel;
            if (a.dout.data != nullptr) dout[rows] = line_at<T>(a.dout, b, s) + channel;
            sample[rows] = b;
            ++rows;
        }
    }
    // The 8 lines to ask for while those from r on are computed: 8 KiB ahead, or the last of `all`.
    NORMKIT_INLINE int ahead(int r, int all) const {
        constexpr int64_t kAhead = 8192 / int64_t(sizeof(T));
        const int distance = int(kAhead / width) > 8 ? int(kAhead / width) : 8;
        return r + distance + 8 <= all ? r + distance : all >= 8 ? all - 8 : 0;
    }
    NORMKIT_INLINE int64_t result(const ChannelsReduction& a) const {
        return (group * a.cut.blocks + block) * a.shape.channels + channel;
    }
};

// Sums per column of d = x - center and, with `square`, of d^2, over kRows lines. Eight at a time save most of the
// traffic of the sums and shorten the chain of additions. The sums' arrays have room for whole vectors.
template <class T, int kRows>
NORMKIT_INLINE void add_deviations(const T* const* x, const T* const* next, int64_t width, const Acc<T>* center,
                                   Acc<T>* sum, Acc<T>* square) {
    sweep<T>(width, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        const Wide<T> c = load_wide<T>(center + i, Full{});
        Wide<T> s{}, q{};
        for (int r = 0; r < kRows; ++r) {
            prefetch<T>(next[r], i);
            const Wide<T> d = load<T>(x[r] + i, lanes) - c;
            s += d;
            q = fused(d, d, q);
        }
        store_wide<T>(sum + i, load_wide<T>(sum + i, Full{}) + s, Full{});
        if (square != nullptr) store_wide<T>(square + i, load_wide<T>(square + i, Full{}) + q, Full{});
    });
}

template <class T>
NORMKIT_BLOCK void tile_deviations(const Tile<T>& tile, int rows, const Acc<T>* center, Acc<T>* sum, Acc<T>* square) {
    int r = 0;
    for (; r + 8 <= rows; r += 8) {
        const T* const* x = tile.x + r;
        add_deviations<T, 8>(x, tile.x + tile.ahead(r, rows), tile.width, center, sum, square);
    }
    for (; r < rows; ++r) add_deviations<T, 1>(tile.x + r, tile.x + r, tile.width, center, sum, square);
}

// Deviations from `center` become mean and m2. True: some column's center lies more than a standard deviation from its
// mean, or its m2 is not finite.
template <class A>
NORMKIT_BLOCK bool set_tile_moments(const A* center, const A* sum, const A* square, int64_t width, double count,
                                    double* mean, double* m2) {
    int64_t doubtful = 0;
    for (int64_t i = 0; i < width; ++i) {
        const double delta = double(sum[i]) / count, between = delta * double(sum[i]);
        const double rest = double(square[i]) - between;
        mean[i] = double(center[i]) + delta;
        m2[i] = rest < 0 ? 0 : rest;
        doubtful |= int64_t(!(between <= rest)) | int64_t(!(rest - rest == 0));
    }
    return doubtful != 0;
}

// The columns that one pass did not settle: a second one about the mean, and where squares do not fit, in double.
template <class T>
NORMKIT_BLOCK void settle_tile_moments(const Tile<T>& tile, Acc<T>* center, Acc<T>* sum, Acc<T>* square, double count,
                                       double* mean, double* m2) {
    using A = Acc<T>;
    double mean_again[kTile], m2_again[kTile];
    bool far[kTile];
    for (int64_t i = 0; i < tile.width; ++i) {
        const double delta = mean[i] - double(center[i]);
        far[i] = !(delta * delta * count <= m2[i]);
        center[i] = A(mean[i]);
        sum[i] = square[i] = 0;
    }
    tile_deviations<T>(tile, tile.rows, center, sum, square);
    (void)set_tile_moments<A>(center, sum, square, tile.width, count, mean_again, m2_again);
    for (int64_t i = 0; i < tile.width; ++i) {
        if (far[i]) mean[i] = mean_again[i], m2[i] = m2_again[i];
        if (finite(m2[i])) continue;
        const Moments wide = wide_moments<T>(tile.rows, count, [&](int64_t r) { return tile.x[r] + i; });
        mean[i] = wide.mean;
        m2[i] = wide.m2;
    }
}

template <class T>
void tile_moments(const ChannelsReduction& a, const Tile<T>& tile) {
    using A = Acc<T>;
    constexpr int kSampleRows = 8;
    double *mean = a.first + tile.result(a), *m2 = a.second + tile.result(a);
    const double count = tile.rows > 0 ? tile.rows : 1;
    const int sampled = tile.rows < kSampleRows ? tile.rows : kSampleRows;
    A center[kTile] = {}, sum[kTile] = {}, square[kTile] = {};
    tile_deviations<T>(tile, sampled, center, sum, nullptr);
    for (int64_t i = 0; i < kTile; ++i) {
        center[i] = sum[i] / A(sampled > 0 ? sampled : 1);
        sum[i] = 0;
    }
    tile_deviations<T>(tile, tile.rows, center, sum, square);
    if (set_tile_moments<A>(center, sum, square, tile.width, count, mean, m2))
        settle_tile_moments<T>(tile, center, sum, square, count, mean, m2);
}

// plane(at) for the units first..last of channels-first data.
template <class Plane>
NORMKIT_INLINE void for_planes(const ChannelsReduction& a, int64_t first, int64_t last, const Plane& plane) {
    for (int64_t unit = first; unit < last;) {
        PlaneBlock at(a, unit);
        for (; unit < last && at.channel < a.shape.channels; ++unit, ++at.channel) plane(at);
    }
}

template <class T>
void channels_moments(const ChannelsReduction& a, int64_t first, int64_t last) {
    if (a.shape.channels_last) {
        for (int64_t unit = first; unit < last; ++unit) tile_moments<T>(a, Tile<T>(a, unit));
        return;
    }
    for_planes(a, first, last, [&](const PlaneBlock& at) NORMKIT_STEP {
        const Moments moments =
            a.shape.mask != nullptr ? plane_moments<T, true>(a, at) : plane_moments<T, false>(a, at);
        a.first[at.result(a)] = moments.mean;
        a.second[at.result(a)] = moments.m2;
    });
}

// Chan's formula over a group's blocks in their order, channels first..last.
inline void merge_moments(const ChannelsReduction& a, int64_t group, int64_t first, int64_t last) {
    const int64_t channels = a.shape.channels;
    double *mean = a.result_first + group * channels, *m2 = a.result_second + group * channels;
    double total = 0;
    for (int64_t c = first; c < last; ++c) mean[c] = m2[c] = 0;
    for (int64_t k = 0; k < a.cut.blocks; ++k) {
        const double count = a.counts[group * a.cut.blocks + k];
        if (count == 0) continue;
        const double share = count / (total + count), between = total * share;
        const double* block_mean = a.first + (group * a.cut.blocks + k) * channels;
        const double* block_m2 = a.second + (group * a.cut.blocks + k) * channels;
        for (int64_t c = first; c < last; ++c) {
            const double delta = block_mean[c] - mean[c];
            mean[c] = total == 0 ? block_mean[c] : mean[c] + delta * share;
            m2[c] = total == 0 ? block_m2[c] : m2[c] + block_m2[c] + delta * delta * between;
        }
        total += count;
    }
}

// ------------------------------------------------------------------------------------------- backward moments

template <class T, bool kMask>
NORMKIT_BLOCK Sums plane_gradients(const ChannelsReduction& a, const PlaneBlock& at) {
    using A = Acc<T>;
    Wide<T> sum[4] = {}, product[4] = {};
    for (int64_t b = 0; b < at.samples; ++b) {
        const T* x = line_at<T>(a.x, at.sample + b, at.channel) + at.start;
        const T* dout = line_at<T>(a.dout, at.sample + b, at.channel) + at.start;
        const bool more = b + 1 < at.samples;
        const T *next_x = more ? x + a.x.batch_stride : x, *next_dout = more ? dout + a.dout.batch_stride : dout;
        const A center = values_at<A>(a.center, at.sample + b)[at.channel];
        const uint8_t* mask = at.mask(a.shape, b);
        sweep<T>(at.n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
            prefetch<T>(next_x, i);
            prefetch<T>(next_dout, i);
            Wide<T> d = load<T>(dout + i, lanes);
            Wide<T> p = d * (load<T>(x + i, lanes) - center);
            if constexpr (kMask) {
                d = where_valid<T>(mask + i, d, lanes);
                p = where_valid<T>(mask + i, p, lanes);
            }
            sum[k] += d;
            product[k] += keep(p, lanes);
        });
    }
    return {add_lanes(sum), add_lanes(product)};
}

// As add_deviations, for sums of dout and of dout * (x - center). kOwn: the lines' samples have centers of their own.
template <class T, int kRows, bool kOwn>
NORMKIT_INLINE void add_gradients(const ChannelsReduction& a, const Tile<T>& tile, int first, Acc<T>* sum,
                                  Acc<T>* product) {
    using A = Acc<T>;
    const A* center[kRows];
    for (int r = 0; r < kRows; ++r) center[r] = values_at<A>(a.center, tile.sample[first + r]) + tile.channel;
    const int next = kRows > 1 ? tile.ahead(first, tile.rows) : first;
    sweep<T>(tile.width, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        Wide<T> s{}, p{}, c = load_wide<T>(center[0] + i, lanes);
        for (int r = 0; r < kRows; ++r) {
            prefetch<T>(tile.dout[next + r], i);
            prefetch<T>(tile.x[next + r], i);
            const Wide<T> d = load<T>(tile.dout[first + r] + i, lanes);
            if constexpr (kOwn) c = load_wide<T>(center[r] + i, lanes);
            s += d;
            p = fused(d, load<T>(tile.x[first + r] + i, lanes) - c, p);
        }
        store_wide<T>(sum + i, load_wide<T>(sum + i, Full{}) + s, Full{});
        store_wide<T>(product + i, load_wide<T>(product + i, Full{}) + p, Full{});
    });
}

template <class T, bool kOwn>
NORMKIT_BLOCK void tile_gradients(const ChannelsReduction& a, const Tile<T>& tile) {
    using A = Acc<T>;
    A sum[kTile] = {}, product[kTile] = {};
    int r = 0;
    for (; r + 8 <= tile.rows; r += 8) add_gradients<T, 8, kOwn>(a, tile, r, sum, product);
    for (; r < tile.rows; ++r) add_gradients<T, 1, kOwn>(a, tile, r, sum, product);
    for (int64_t i = 0; i < tile.width; ++i) {
        a.first[tile.result(a) + i] = double(sum[i]);
        a.second[tile.result(a) + i] = double(product[i]);
    }
}

template <class T>
void channels_backward_moments(const ChannelsReduction& a, int64_t first, int64_t last) {
    if (a.shape.channels_last) {
        const auto tile = a.center.batch_stride != 0 ? tile_gradients<T, true> : tile_gradients<T, false>;
        for (int64_t unit = first; unit < last; ++unit) tile(a, Tile<T>(a, unit));
        return;
    }
    for_planes(a, first, last, [&](const PlaneBlock& at) NORMKIT_STEP {
        const Sums sums = a.shape.mask != nullptr ? plane_gradients<T, true>(a, at) : plane_gradients<T, false>(a, at);
        a.first[at.result(a)] = sums.first;
        a.second[at.result(a)] = sums.second;
    });
}

inline void merge_sums(const ChannelsReduction& a, int64_t group, int64_t first, int64_t last) {
    const int64_t channels = a.shape.channels;
    double *sum = a.result_first + group * channels, *product = a.result_second + group * channels;
    for (int64_t c = first; c < last; ++c) sum[c] = product[c] = 0;
    for (int64_t k = 0; k < a.cut.blocks; ++k) {
        const int64_t block = (group * a.cut.blocks + k) * channels;
        for (int64_t c = first; c < last; ++c) {
            sum[c] += a.first[block + c];
            product[c] += a.second[block + c];
        }
    }
}

}  // namespace normkit::NORMKIT_ISA
