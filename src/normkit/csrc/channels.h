// The arithmetic of channel norms: moments, affine and their gradients over (B, C, S), one axis contiguous.
// May include: core.h, vec.h. Compiled once per instruction set; no threads.
// Read next: channels.cpp, which cuts and shares the work; reference.py, the same formulas in torch.
//
// channels-first: a line is a plane, the S values of one (b, c); its channel's numbers are scalars.
// channels-last: a line is the C values of one (b, s); its channels' numbers are vectors, a masked line is skipped.
#pragma once

#include "core.h"
#include "vec.h"

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
template <class T>
NORMKIT_BLOCK Sums plane_deviations(const ChannelsReduction& a, const PlaneBlock& at, Acc<T> center) {
    using A = Acc<T>;
    Vec<A> sum[4] = {}, square[4] = {};
    for (int64_t b = 0; b < at.samples; ++b) {
        const T* x = line_at<T>(a.x, at.sample + b, at.channel) + at.start;
        const T* next =
            b + 1 < at.samples ? x + a.x.batch_stride : x;  // far off: nothing else would ask for it in time
        const uint8_t* mask = at.mask(a.shape, b);
        sweep<A>(at.n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
            prefetch<T>(next, i, k);
            Vec<A> d = load<T>(x + i, lanes) - center;
            d = mask != nullptr ? where_valid<A>(mask + i, d, lanes) : keep<A>(d, lanes);
            sum[k] += d;
            square[k] += d * d;
        });
    }
    return {add_lanes<A>(sum), add_lanes<A>(square)};
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

// One pass about a center that a sample of the block gives, as for rows (rows.h, set_statistics): where the sample's
// mean lies more than a standard deviation off, a second one about the mean itself.
template <class T>
Moments plane_moments(const ChannelsReduction& a, const PlaneBlock& at) {
    using A = Acc<T>;
    constexpr int64_t kSample = 128;
    const double count = a.counts[at.group * a.cut.blocks + at.block];
    if (count == 0) return {0, 0};
    PlaneBlock sample = at;
    sample.samples = 1;
    sample.n = least(at.n, kSample);
    A center = A(plane_deviations<T>(a, sample, A(0)).first / double(sample.n));
    Sums d = plane_deviations<T>(a, at, center);
    double delta = d.first / count, m2 = d.second - delta * d.first;
    if (delta * d.first > m2) {
        center = A(double(center) + delta);
        d = plane_deviations<T>(a, at, center);
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
        for (int64_t line = first; line < last; ++line) {
            const int64_t b = per_sample ? group : line / a.shape.space;
            const int64_t s = per_sample ? line : line % a.shape.space;
            if (a.shape.mask != nullptr && !a.shape.mask[b * a.shape.space + s]) continue;
            x[rows] = line_at<T>(a.x, b, s) + channel;
            if (a.dout.data != nullptr) dout[rows] = line_at<T>(a.dout, b, s) + channel;
            sample[rows] = b;
            ++rows;
        }
    }
    NORMKIT_INLINE int64_t result(const ChannelsReduction& a) const {
        return (group * a.cut.blocks + block) * a.shape.channels + channel;
    }
};

// Sums per column of d = x - center and, with `square`, of d^2, over kRows lines. Eight at a time save most of the
// traffic of the sums and shorten the chain of additions. The sums' arrays have room for whole vectors.
template <class T, int kRows>
NORMKIT_INLINE void add_deviations(const T* const* x, int64_t width, const Acc<T>* center, Acc<T>* sum,
                                   Acc<T>* square) {
    using A = Acc<T>;
    sweep<A>(width, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        const Vec<A> c = load<A>(center + i, Full{});
        Vec<A> s{}, q{};
        for (int r = 0; r < kRows; ++r) {
            const Vec<A> d = load<T>(x[r] + i, lanes) - c;
            s += d;
            q += d * d;
        }
        store<A>(sum + i, load<A>(sum + i, Full{}) + s, Full{});
        if (square != nullptr) store<A>(square + i, load<A>(square + i, Full{}) + q, Full{});
    });
}

template <class T>
NORMKIT_BLOCK void tile_deviations(const Tile<T>& tile, int rows, const Acc<T>* center, Acc<T>* sum, Acc<T>* square) {
    int r = 0;
    for (; r + 8 <= rows; r += 8) add_deviations<T, 8>(tile.x + r, tile.width, center, sum, square);
    for (; r < rows; ++r) add_deviations<T, 1>(tile.x + r, tile.width, center, sum, square);
}

// Deviations from `center` become mean and m2, in the columns that are `far`; of these stay those whose center lies
// more than a standard deviation from the mean. True: one does.
template <class A>
bool set_tile_moments(const A* center, const A* sum, const A* square, int64_t width, double count, bool* far,
                      double* mean, double* m2) {
    bool any = false;
    for (int64_t i = 0; i < width; ++i) {
        if (!far[i]) continue;
        const double delta = double(sum[i]) / count, between = delta * double(sum[i]);
        mean[i] = double(center[i]) + delta;
        m2[i] = double(square[i]) - between;
        far[i] = between > m2[i];
        any = any || far[i];
        if (m2[i] < 0) m2[i] = 0;
    }
    return any;
}

template <class T>
void tile_moments(const ChannelsReduction& a, const Tile<T>& tile) {
    using A = Acc<T>;
    constexpr int kSampleRows = 16;
    double *mean = a.first + tile.result(a), *m2 = a.second + tile.result(a);
    const double count = tile.rows > 0 ? tile.rows : 1;
    const int sampled = tile.rows < kSampleRows ? tile.rows : kSampleRows;
    A center[kTile] = {}, sum[kTile] = {}, square[kTile] = {};
    tile_deviations<T>(tile, sampled, center, sum, nullptr);
    for (int64_t i = 0; i < tile.width; ++i) center[i] = sum[i] / A(sampled > 0 ? sampled : 1);
    for (int64_t i = 0; i < kTile; ++i) sum[i] = 0;
    tile_deviations<T>(tile, tile.rows, center, sum, square);
    bool far[kTile];
    memset(far, 1, sizeof far);
    if (set_tile_moments<A>(center, sum, square, tile.width, count, far, mean, m2)) {
        for (int64_t i = 0; i < tile.width; ++i) center[i] = A(mean[i]);
        for (int64_t i = 0; i < kTile; ++i) sum[i] = square[i] = 0;
        tile_deviations<T>(tile, tile.rows, center, sum, square);
        set_tile_moments<A>(center, sum, square, tile.width, count, far, mean, m2);
    }
    for (int64_t i = 0; i < tile.width; ++i) {
        if (finite(m2[i])) continue;
        const Moments wide = wide_moments<T>(tile.rows, count, [&](int64_t r) { return tile.x[r] + i; });
        mean[i] = wide.mean;
        m2[i] = wide.m2;
    }
}

template <class T>
void channels_moments(const ChannelsReduction& a, int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
        if (a.shape.channels_last) {
            tile_moments<T>(a, Tile<T>(a, unit));
        } else {
            const PlaneBlock at(a, unit);
            const Moments moments = plane_moments<T>(a, at);
            a.first[at.result(a)] = moments.mean;
            a.second[at.result(a)] = moments.m2;
        }
    }
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

template <class T>
NORMKIT_BLOCK Sums plane_gradients(const ChannelsReduction& a, const PlaneBlock& at) {
    using A = Acc<T>;
    Vec<A> sum[4] = {}, product[4] = {};
    for (int64_t b = 0; b < at.samples; ++b) {
        const T* x = line_at<T>(a.x, at.sample + b, at.channel) + at.start;
        const T* dout = line_at<T>(a.dout, at.sample + b, at.channel) + at.start;
        const bool more = b + 1 < at.samples;
        const T *next_x = more ? x + a.x.batch_stride : x, *next_dout = more ? dout + a.dout.batch_stride : dout;
        const A center = values_at<A>(a.center, at.sample + b)[at.channel];
        const uint8_t* mask = at.mask(a.shape, b);
        sweep<A>(at.n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
            prefetch<T>(next_x, i, k);
            prefetch<T>(next_dout, i, k);
            Vec<A> d = load<T>(dout + i, lanes);
            Vec<A> p = d * (load<T>(x + i, lanes) - center);
            if (mask != nullptr) {
                d = where_valid<A>(mask + i, d, lanes);
                p = where_valid<A>(mask + i, p, lanes);
            }
            sum[k] += d;
            product[k] += keep<A>(p, lanes);
        });
    }
    return {add_lanes<A>(sum), add_lanes<A>(product)};
}

// As add_deviations, for sums of dout and of dout * (x - center); the lines may belong to samples with other centers.
template <class T, int kRows>
NORMKIT_INLINE void add_gradients(const ChannelsReduction& a, const Tile<T>& tile, int first, Acc<T>* sum,
                                  Acc<T>* product) {
    using A = Acc<T>;
    const A* center[kRows];
    for (int r = 0; r < kRows; ++r) center[r] = values_at<A>(a.center, tile.sample[first + r]) + tile.channel;
    sweep<A>(tile.width, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        Vec<A> s{}, p{};
        for (int r = 0; r < kRows; ++r) {
            const Vec<A> d = load<T>(tile.dout[first + r] + i, lanes);
            s += d;
            p += d * (load<T>(tile.x[first + r] + i, lanes) - load<A>(center[r] + i, lanes));
        }
        store<A>(sum + i, load<A>(sum + i, Full{}) + s, Full{});
        store<A>(product + i, load<A>(product + i, Full{}) + p, Full{});
    });
}

template <class T>
NORMKIT_BLOCK void tile_gradients(const ChannelsReduction& a, const Tile<T>& tile) {
    using A = Acc<T>;
    A sum[kTile] = {}, product[kTile] = {};
    int r = 0;
    for (; r + 8 <= tile.rows; r += 8) add_gradients<T, 8>(a, tile, r, sum, product);
    for (; r < tile.rows; ++r) add_gradients<T, 1>(a, tile, r, sum, product);
    for (int64_t i = 0; i < tile.width; ++i) {
        a.first[tile.result(a) + i] = double(sum[i]);
        a.second[tile.result(a) + i] = double(product[i]);
    }
}

template <class T>
void channels_backward_moments(const ChannelsReduction& a, int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
        if (a.shape.channels_last) {
            tile_gradients<T>(a, Tile<T>(a, unit));
        } else {
            const PlaneBlock at(a, unit);
            const Sums sums = plane_gradients<T>(a, at);
            a.first[at.result(a)] = sums.first;
            a.second[at.result(a)] = sums.second;
        }
    }
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

// --------------------------------------------------------------------------------------- affine, element by element

template <class A, bool kLast, class Lane>
NORMKIT_INLINE Vec<A> value(const A* p, int64_t i, Lane lanes) {
    if constexpr (kLast) {
        return load<A>(p + i, lanes);
    } else {
        return splat<A>(*p);
    }
}

// (x - center) * scale + shift along one line.
template <class T, bool kLast, bool kStream>
NORMKIT_BLOCK void affine_line(const T* x, T* out, int64_t n, const uint8_t* mask, const Acc<T>* center,
                               const Acc<T>* scale, const Acc<T>* shift) {
    using A = Acc<T>;
    sweep<A>(n, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        Vec<A> v = (load<T>(x + i, lanes) - value<A, kLast>(center, i, lanes)) * value<A, kLast>(scale, i, lanes) +
                   value<A, kLast>(shift, i, lanes);
        if (mask != nullptr) v = where_valid<A>(mask + i, v, lanes);
        store_out<kStream>(out + i, v, lanes);
    });
}

// a * dout + b * (x - center) + c along one line; without b, x is not read.
template <class T, bool kLast, bool kStream>
NORMKIT_BLOCK void backward_affine_line(const T* dout, const T* x, T* out, int64_t n, const uint8_t* mask,
                                        const Acc<T>* a, const Acc<T>* center, const Acc<T>* b, const Acc<T>* c) {
    using A = Acc<T>;
    sweep<A>(n, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        Vec<A> v = value<A, kLast>(a, i, lanes) * load<T>(dout + i, lanes);
        if (b != nullptr) {
            v += value<A, kLast>(b, i, lanes) * (load<T>(x + i, lanes) - value<A, kLast>(center, i, lanes)) +
                 value<A, kLast>(c, i, lanes);
        }
        if (mask != nullptr) v = where_valid<A>(mask + i, v, lanes);
        store_out<kStream>(out + i, v, lanes);
    });
}

// line(b, middle, start, n, mask, out) for the pieces first..last of all lines (of one channel, if a.channel names it),
// a piece being kSpaceBlock elements of one. `mask` is that of a channels-first piece; an invalid channels-last line is
// set to 0 here.
template <class T, class Line>
NORMKIT_INLINE void for_lines(const ChannelsAffine& a, int64_t first, int64_t last, const Line& line) {
    const ChannelsShape& shape = a.shape;
    const bool one = a.channel >= 0;
    const int64_t middles = shape.channels_last ? shape.space : one ? a.channel + 1 : shape.channels;
    const int64_t size = shape.channels_last ? shape.channels : shape.space;
    const int64_t pieces = (size + kSpaceBlock - 1) / kSpaceBlock;
    if (first == last) return;
    int64_t start = first % pieces * kSpaceBlock, b = one ? first / pieces : first / pieces / middles;
    int64_t middle = one ? a.channel : first / pieces % middles;
    for (int64_t piece = first; piece < last; ++piece) {
        const int64_t n = least(kSpaceBlock, size - start);
        T* out = static_cast<T*>(a.out) + b * a.out_batch_stride + middle * a.out_line_stride + start;
        const uint8_t* mask = shape.mask != nullptr ? shape.mask + b * shape.space : nullptr;
        if (mask != nullptr && shape.channels_last && !mask[middle]) {
            memset(out, 0, size_t(n) * sizeof(T));
        } else {
            line(b, middle, start, n, mask != nullptr && !shape.channels_last ? mask + start : nullptr, out);
        }
        start += kSpaceBlock;
        if (start < size) continue;
        start = 0;
        if (++middle < middles) continue;
        middle = one ? a.channel : 0;
        ++b;
    }
}

template <class T>
void channels_affine(const ChannelsAffine& a, int64_t first, int64_t last) {
    using A = Acc<T>;
    const auto line = a.shape.channels_last ? affine_line<T, true, false> : affine_line<T, false, false>;
    const auto streamed = a.shape.channels_last ? affine_line<T, true, true> : affine_line<T, false, true>;
    for_lines<T>(a, first, last,
                 [&](int64_t b, int64_t middle, int64_t start, int64_t n, const uint8_t* mask, T* out) NORMKIT_STEP {
                     const int64_t channel = a.shape.channels_last ? start : middle;
                     (a.stream && aligned(out) ? streamed : line)(
                         line_at<T>(a.x, b, middle) + start, out, n, mask, values_at<A>(a.center, b) + channel,
                         values_at<A>(a.scale, b) + channel, values_at<A>(a.shift, b) + channel);
                 });
    if (a.stream) end_stream();
}

template <class T>
void channels_backward_affine(const ChannelsAffine& a, int64_t first, int64_t last) {
    using A = Acc<T>;
    const bool last_axis = a.shape.channels_last;
    const auto line = last_axis ? backward_affine_line<T, true, false> : backward_affine_line<T, false, false>;
    const auto streamed = last_axis ? backward_affine_line<T, true, true> : backward_affine_line<T, false, true>;
    const bool fixed = a.b.data == nullptr;
    for_lines<T>(
        a, first, last,
        [&](int64_t b, int64_t middle, int64_t start, int64_t n, const uint8_t* mask, T* out) NORMKIT_STEP {
            const int64_t channel = a.shape.channels_last ? start : middle;
            (a.stream && aligned(out) ? streamed : line)(
                line_at<T>(a.dout, b, middle) + start, fixed ? nullptr : line_at<T>(a.x, b, middle) + start, out, n,
                mask, values_at<A>(a.a, b) + channel, fixed ? nullptr : values_at<A>(a.center, b) + channel,
                fixed ? nullptr : values_at<A>(a.b, b) + channel, fixed ? nullptr : values_at<A>(a.c, b) + channel);
        });
    if (a.stream) end_stream();
}

}  // namespace normkit::NORMKIT_ISA
