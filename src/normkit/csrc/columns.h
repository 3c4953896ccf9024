// LayerNorm over the channels of (B, C, S), one position of one sample sharing statistics, where S is contiguous:
// out[b,c,s] = (x[b,c,s] - mean[b,s]) * rstd[b,s] * gain[c] + shift[c], and its gradient.
// May include: core.h, steps.h. Compiled once per instruction set; no threads.
// Read next: columns.cpp, who computes which positions; reference.py, rows_forward and rows_backward of the same.
//
// A group is some steps of positions side by side, with all their channels. It goes down the channels' lines two or
// three times: once out of memory, then out of the core's own cache. A lane belongs to one position, and what it
// computes does not depend on what stands beside it.
#pragma once

#include "core.h"
#include "steps.h"

namespace normkit::NORMKIT_ISA {

// Steps of a group: 512 bytes of a line of float32 with AVX-512. Wide pieces of lines are what memory likes; that not
// all of backward's numbers then stay in registers costs less. Narrow groups of a whole type are taken where they fit
// the nearest cache and wide ones do not: (32, 64, 56, 56) float32 took 1350 us instead of 1950, its backward 3600
// instead of 4200, on one thread; bfloat16 gained nothing.
#if defined(__AVX512F__)
constexpr int kWideVectors = 8;
#else
constexpr int kWideVectors = 4;
#endif
template <class T>
constexpr int kWideSteps = kHalf<T> ? kWideVectors / 2 : kWideVectors;
template <class T>
NORMKIT_INLINE bool prefers_narrow(int64_t channels, int tensors, int narrow_steps) {
    constexpr int64_t kNear = 24 << 10;
    const int64_t step_bytes = channels * tensors * kStep<T> * int64_t(sizeof(T));
    return !kHalf<T> && kWideSteps<T> * step_bytes > kNear && narrow_steps * step_bytes <= kNear;
}

// Lines that are summed in the accumulation dtype before a double takes over.
constexpr int64_t kRun = 64;

// step(k, lanes) for the steps of a group. `last` is Partial at the end of a line.
template <int kCount, class Last, class Step>
NORMKIT_INLINE void across(Last last, const Step& step) {
#pragma GCC unroll 8
    for (int k = 0; k + 1 < kCount; ++k) step(k, Full{});
    step(kCount - 1, last);
}

// What is computed beside the positions of a group.
template <class T, int kCount>
struct Beside {
    static constexpr int kWidth = kCount * kStep<T>;
    Acc<T> of[kWidth];

    NORMKIT_INLINE Wide<T> step(int k) const { return load_wide<T>(of + k * kStep<T>, Full{}); }
};
template <class T, int kCount>
struct WideSums {
    double of[kCount * kStep<T>] = {};

    NORMKIT_INLINE void add(const Wide<T> (&run)[kCount]) {
        Beside<T, kCount> values;
#pragma GCC unroll 8
        for (int k = 0; k < kCount; ++k) store_wide<T>(values.of + k * kStep<T>, run[k], Full{});
        for (int i = 0; i < values.kWidth; ++i) of[i] += double(values.of[i]);
    }
};

// run(first, last) over runs of lines.
template <class Run>
NORMKIT_INLINE void for_runs(int64_t channels, const Run& run) {
    for (int64_t c = 0; c < channels; c += kRun) run(c, c + kRun < channels ? c + kRun : channels);
}

// A group's elements in one tensor: those of channel c lie at + c * stride. Where they are used for the last time,
// those at next + c * next_stride are asked for.
template <class T>
struct Columns {
    const T* at;
    int64_t stride;
    const T* next;
    int64_t next_stride;
};

// The group of n positions from s on, in sample b. Of a sample that stays in the core's own cache, the next is asked
// for in the order of memory, as much of it as the group is of its own; else the group that follows.
template <class T>
NORMKIT_INLINE Columns<T> columns_at(const Lines& lines, int64_t b, int64_t s, int64_t n, int64_t batch,
                                     int64_t channels, int64_t space) {
    constexpr int64_t kSmallSample = 256 << 10;
    const T* sample = static_cast<const T*>(lines.data) + b * lines.batch_stride;
    const int64_t stride = lines.line_stride;
    if (stride == space && channels * space * int64_t(sizeof(T)) <= kSmallSample)
        return {sample + s, stride, sample + (b + 1 < batch ? lines.batch_stride : 0) + s * channels, n};
    const T* next = s + n < space ? sample + s + n : b + 1 < batch ? sample + lines.batch_stride : sample + s;
    return {sample + s, stride, next, stride};
}

// group(s, n, Number<steps>, lanes of the last step) for the positions first..last of a line, up to kMost steps at a
// time.
template <class T, int kMost, class Group>
NORMKIT_INLINE void for_groups(int64_t first, int64_t last, const Group& group) {
    constexpr int kWidth = kStep<T>;
    for (; first + kMost * kWidth <= last; first += kMost * kWidth)
        group(first, int64_t(kMost * kWidth), Number<kMost>{}, Full{});
    const auto rest = [&](auto count) NORMKIT_STEP {
        if ((last - first + kWidth - 1) / kWidth == count.value)
            group(first, last - first, count, Partial{int(last - first) - (count.value - 1) * kWidth});
    };
    rest(Number<1>{});
    if constexpr (kMost > 1) rest(Number<2>{});
    if constexpr (kMost > 2) rest(Number<3>{}), rest(Number<4>{});
    if constexpr (kMost > 4) rest(Number<5>{}), rest(Number<6>{}), rest(Number<7>{}), rest(Number<8>{});
}

// ---------------------------------------------------------------------------------------------- forward

template <class T, int kCount>
struct Statistics {
    Beside<T, kCount> center, rstd, offset;  // as in rows.h: out = ((x - center) * rstd + offset) * gain + shift
    WideSums<T, kCount> mean, var;
};

// A center for the deviations: the mean of up to kSample channels, evenly spread.
constexpr int64_t kSample = 16;

template <class T, int kCount, class Last>
NORMKIT_BLOCK void sample_center(const Columns<T>& x, int64_t channels, Last last, Beside<T, kCount>& center) {
    const int64_t m = channels < kSample ? channels : kSample;
    Wide<T> sum[kCount] = {};
    for (int64_t i = 0; i < m; ++i) {
        const T* line = x.at + i * channels / m * x.stride;
        across<kCount>(last, [&](int k, auto lanes) NORMKIT_STEP { sum[k] += load<T>(line + k * kStep<T>, lanes); });
    }
    const Acc<T> share = Acc<T>(1) / Acc<T>(m);
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) store_wide<T>(center.of + k * kStep<T>, Wide<T>(sum[k] * share), Full{});
}

// Where the group's results go. Unless they are written past the caches, its lines are asked for while others are read:
// that took forward of float32 (64, 256, 14, 14) from 1127 to 910 us on one thread, its backward from 2324 to 1857.
template <class T, bool kStream>
struct Target {
    T* at;
    int64_t stride;

    NORMKIT_INLINE void ask(int64_t c, int64_t i) const {
        if (!kStream) __builtin_prefetch(at + c * stride + i, 1, 2);
    }
};

// Sums of d = x - center and of its square.
template <class T, int kCount, bool kStream, class Last>
NORMKIT_BLOCK void sum_deviations(const Columns<T>& x, Target<T, kStream> out, int64_t channels,
                                  const Beside<T, kCount>& center_of, Last last, WideSums<T, kCount>& sums,
                                  WideSums<T, kCount>& squares) {
    Wide<T> center[kCount];
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) center[k] = center_of.step(k);
    for_runs(channels, [&](int64_t c, int64_t end) NORMKIT_STEP {
        Wide<T> sum[kCount] = {}, square[kCount] = {};
        for (const T* line = x.at + c * x.stride; c < end; ++c, line += x.stride)
            across<kCount>(last, [&](int k, auto lanes) NORMKIT_STEP {
                out.ask(c, k * kStep<T>);
                const Wide<T> d = load<T>(line + k * kStep<T>, lanes) - center[k];
                sum[k] += d;
                square[k] += d * d;
            });
        sums.add(sum);
        squares.add(square);
    });
}

// mean and var from deviations; true: some center lies more than a standard deviation from its mean.
template <class T, int kCount, bool kStream, class Last>
NORMKIT_INLINE bool set_moments(const Columns<T>& x, Target<T, kStream> out, int64_t channels, Last last,
                                const Beside<T, kCount>& center, WideSums<T, kCount>& mean, WideSums<T, kCount>& var) {
    const double share = 1 / double(channels);
    sum_deviations<T, kCount>(x, out, channels, center, last, mean, var);
    int64_t far = 0;
    for (int i = 0; i < center.kWidth; ++i) {
        const double delta = mean.of[i] * share, between = delta * delta, rest = var.of[i] * share - between;
        mean.of[i] = double(center.of[i]) + delta;
        var.of[i] = rest < 0 ? 0 : rest;  // rounding; NaN stays
        far |= int64_t(between > rest);
    }
    return far != 0;
}

// As for rows (rows.h, set_statistics) one pass about a sampled center, and another about the mean itself where that
// center lies far off; the other positions keep what they have. True: some position's are not finite.
template <class T, int kCount, bool kStream, class Last>
NORMKIT_INLINE bool set_statistics(const Columns<T>& x, Target<T, kStream> out, int64_t channels, double eps, Last last,
                                   Statistics<T, kCount>& s) {
    using A = Acc<T>;
    sample_center<T, kCount>(x, channels, last, s.center);
    if (__builtin_expect(set_moments<T, kCount>(x, out, channels, last, s.center, s.mean, s.var), 0)) {
        Beside<T, kCount> center;
        WideSums<T, kCount> mean, var;
        for (int i = 0; i < center.kWidth; ++i) center.of[i] = A(s.mean.of[i]);
        (void)set_moments<T, kCount>(x, out, channels, last, center, mean, var);
        for (int i = 0; i < center.kWidth; ++i) {
            const double off = s.mean.of[i] - double(s.center.of[i]);
            if (!(off * off > s.var.of[i])) continue;
            s.mean.of[i] = mean.of[i];
            s.var.of[i] = var.of[i];
        }
    }
    int64_t unsettled = 0;
    for (int i = 0; i < s.center.kWidth; ++i) {
        const double mean = s.mean.of[i], var = s.var.of[i], rstd = 1 / __builtin_sqrt(var + eps);
        s.center.of[i] = A(mean);
        s.offset.of[i] = A((double(s.center.of[i]) - mean) * rstd);
        s.rstd.of[i] = A(rstd);
        unsettled |= int64_t(!(var - var == 0));
    }
    return unsettled != 0;
}

template <class T, int kCount, bool kStream, class Last>
NORMKIT_BLOCK void write_columns(const ColumnsForward& a, const Columns<T>& x, const Statistics<T, kCount>& s,
                                 Target<T, kStream> out_of, Last last) {
    using A = Acc<T>;
    Wide<T> center[kCount], rstd[kCount], offset[kCount];
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
        center[k] = s.center.step(k);
        rstd[k] = s.rstd.step(k);
        offset[k] = s.offset.step(k);
    }
    const A *gain = static_cast<const A*>(a.gain), *shift = static_cast<const A*>(a.shift);
    const T *line = x.at, *next = x.next;
    T* out = out_of.at;
    for (int64_t c = 0; c < a.channels; ++c, line += x.stride, next += x.next_stride, out += out_of.stride) {
        const A gain_c = gain[c], shift_c = shift[c];
        across<kCount>(last, [&](int k, auto lanes) NORMKIT_STEP {
            prefetch<T>(next, k * kStep<T>);
            const Wide<T> v = (load<T>(line + k * kStep<T>, lanes) - center[k]) * rstd[k] + offset[k];
            store_out<kStream>(out + k * kStep<T>, Wide<T>(v * gain_c + shift_c), lanes);
        });
    }
}

// One position, in double: its squares or differences leave the accumulation dtype's range, so that it is scaled by a
// power of two, as rows.h scales a row. One with inf or NaN is left as it is, NaN.
template <class T>
NORMKIT_BLOCK void rescue_position(const ColumnsForward& a, const Columns<T>& x, int64_t i, int64_t position, T* out) {
    using A = Acc<T>;
    const auto value = [&](int64_t c) { return double(scalar<T>(x.at + c * x.stride + i)); };
    double largest = 0;
    for (int64_t c = 0; c < a.channels; ++c) {
        const double v = __builtin_fabs(value(c));
        if (!finite(v)) return;
        if (v > largest) largest = v;
    }
    const double scale = largest > 0 ? __builtin_ldexp(1.0, 30 - __builtin_ilogb(largest)) : 1;
    const double size = double(a.channels), first = value(0) * scale;
    double mean = 0, var = 0;
    for (int64_t c = 0; c < a.channels; ++c) mean += (value(c) * scale - first) / size;
    mean += first;
    for (int64_t c = 0; c < a.channels; ++c) {
        const double d = value(c) * scale - mean;
        var += d * d / size;
    }
    // Where all are equal, eps * scale^2 may be lost, and 1 / sqrt of it not fit.
    const double rstd = var > 0 ? 1 / __builtin_sqrt(var + a.eps * scale * scale) : 0;
    for (int64_t c = 0; c < a.channels; ++c) {
        const double gain = double(static_cast<const A*>(a.gain)[c]), shift = double(static_cast<const A*>(a.shift)[c]);
        const A v = A((value(c) * scale - mean) * rstd * gain + shift);
        store<T>(out + c * a.space + i, splat_wide<T>(v), Partial{1});
    }
    if (a.mean != nullptr) static_cast<A*>(a.mean)[position] = A(mean / scale);
    if (a.rstd != nullptr) static_cast<A*>(a.rstd)[position] = A(var > 0 ? rstd * scale : 1 / __builtin_sqrt(a.eps));
}

template <class T, int kCount, bool kStream, class Last>
void forward_group(const ColumnsForward& a, int64_t b, int64_t s, int64_t n, Last last) {
    using A = Acc<T>;
    const Columns<T> x = columns_at<T>(a.x, b, s, n, a.batch, a.channels, a.space);
    const Target<T, kStream> out{static_cast<T*>(a.out) + b * a.channels * a.space + s, a.space};
    Statistics<T, kCount> statistics;
    const bool unsettled = set_statistics<T, kCount>(x, out, a.channels, a.eps, last, statistics);
    const int64_t position = b * a.space + s;
    if (a.mean != nullptr)
        for (int64_t i = 0; i < n; ++i) static_cast<A*>(a.mean)[position + i] = A(statistics.mean.of[i]);
    if (a.rstd != nullptr) memcpy(static_cast<A*>(a.rstd) + position, statistics.rstd.of, size_t(n) * sizeof(A));
    write_columns<T, kCount>(a, x, statistics, out, last);
    if (__builtin_expect(!unsettled, 1)) return;
    if (kStream) end_stream();
    for (int64_t i = 0; i < n; ++i)
        if (!finite(statistics.var.of[i])) rescue_position<T>(a, x, i, position + i, out.at);
}

// The strips first..last of all samples, kStrip positions each.
template <class T>
void columns_forward(const ColumnsForward& a, int64_t first, int64_t last) {
    constexpr int kNarrowSteps = kWideSteps<T> / 2;
    const bool narrow = prefers_narrow<T>(a.channels, 1, kNarrowSteps);
    const int64_t strips = (a.space + kStrip - 1) / kStrip;
    for (int64_t strip = first; strip < last; ++strip) {
        const int64_t b = strip / strips, start = strip % strips * kStrip;
        const int64_t end = start + kStrip < a.space ? start + kStrip : a.space;
        const auto group = [&](int64_t s, int64_t n, auto count, auto lanes) {
            if (a.stream) {
                forward_group<T, count.value, true>(a, b, s, n, lanes);
            } else {
                forward_group<T, count.value, false>(a, b, s, n, lanes);
            }
        };
        if (narrow) {
            for_groups<T, kNarrowSteps>(start, end, group);
        } else {
            for_groups<T, kWideSteps<T>>(start, end, group);
        }
    }
    if (a.stream) end_stream();
}

// --------------------------------------------------------------------------------------------- backward

// With rstd out of this range its square, or a difference of two elements, may leave the accumulation dtype's: the
// position is computed in double. Where it is NaN or inf, so is everything.
template <class A>
NORMKIT_INLINE bool is_extreme(A rstd) {
    return finite(rstd) && !(rstd > A(0x1p-50) && rstd < A(0x1p50));
}

NORMKIT_INLINE Vec<float> one_vector(Two v) { return v.low + v.high; }
template <class V>
NORMKIT_INLINE V one_vector(V v) {
    return v;
}

template <class T, int kCount>
struct Gradient {
    Columns<T> dout, x;
    Beside<T, kCount> mean, rstd;           // 0 where a position is extreme or absent
    Beside<T, kCount> mean_g, slope;        // slope = -mean(g * xhat) * rstd
    WideSums<T, kCount> sum_g, sum_g_xhat;  // g = dout * gain
};

// Sums of g and g * xhat of every position; with kSums, dout * xhat is added to the channel's vector in dweight, and
// dout to that in dbias.
template <class T, int kCount, bool kSums, bool kStream, class Last>
NORMKIT_BLOCK void sum_gradients(const ColumnsBackward& a, Gradient<T, kCount>& group, Target<T, kStream> dx, Last last,
                                 Acc<T>* dweight, Acc<T>* dbias) {
    using A = Acc<T>;
    constexpr int kWidth = kStep<T>, kVector = kLanes<A>;
    const A* gain = static_cast<const A*>(a.gain);
    Wide<T> mean[kCount], rstd[kCount];
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
        mean[k] = group.mean.step(k);
        rstd[k] = group.rstd.step(k);
    }
    for_runs(a.channels, [&](int64_t c, int64_t end) NORMKIT_STEP {
        Wide<T> sum[kCount] = {}, products[kCount] = {};
        const T *dout = group.dout.at + c * group.dout.stride, *x = group.x.at + c * group.x.stride;
        for (; c < end; ++c, dout += group.dout.stride, x += group.x.stride) {
            const A gain_c = gain[c];
            Wide<T> dweight_c{}, dbias_c{};
            across<kCount>(last, [&](int k, auto lanes) NORMKIT_STEP {
                dx.ask(c, k * kWidth);
                const Wide<T> d = load<T>(dout + k * kWidth, lanes);
                const Wide<T> xhat = (load<T>(x + k * kWidth, lanes) - mean[k]) * rstd[k];
                if constexpr (kSums) {
                    dweight_c += d * xhat;
                    dbias_c += d;
                }
                const Wide<T> g = product(d, splat_wide<T>(gain_c));
                sum[k] += g;
                products[k] += g * xhat;
            });
            if constexpr (kSums) {
                A *dweight_at = dweight + c * kVector, *dbias_at = dbias + c * kVector;
                write(dweight_at, Vec<A>(read(dweight_at, Full{}) + one_vector(dweight_c)), Full{});
                write(dbias_at, Vec<A>(read(dbias_at, Full{}) + one_vector(dbias_c)), Full{});
            }
        }
        group.sum_g.add(sum);
        group.sum_g_xhat.add(products);
    });
}

// dx = rstd * (g - mean_g - xhat * mean_g_xhat), rounded once.
template <class T, int kCount, bool kStream, class Last>
NORMKIT_BLOCK void write_gradients(const ColumnsBackward& a, const Gradient<T, kCount>& group, Target<T, kStream> dx_of,
                                   Last last) {
    using A = Acc<T>;
    constexpr int kWidth = kStep<T>;
    const A* gain = static_cast<const A*>(a.gain);
    Wide<T> mean[kCount], rstd[kCount], mean_g[kCount], slope[kCount];
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
        mean[k] = group.mean.step(k);
        rstd[k] = group.rstd.step(k);
        mean_g[k] = group.mean_g.step(k);
        slope[k] = group.slope.step(k);
    }
    const T *dout = group.dout.at, *x = group.x.at, *next_dout = group.dout.next, *next_x = group.x.next;
    T* dx = dx_of.at;
    for (int64_t c = 0; c < a.channels; ++c) {
        const A gain_c = gain[c];
        across<kCount>(last, [&](int k, auto lanes) NORMKIT_STEP {
            prefetch<T>(next_dout, k * kWidth);
            prefetch<T>(next_x, k * kWidth);
            const Wide<T> g = product(load<T>(dout + k * kWidth, lanes), splat_wide<T>(gain_c));
            const Wide<T> v = (g - mean_g[k]) + (load<T>(x + k * kWidth, lanes) - mean[k]) * slope[k];
            store_out<kStream>(dx + k * kWidth, Wide<T>(v * rstd[k]), lanes);
        });
        dout += group.dout.stride;
        next_dout += group.dout.next_stride;
        x += group.x.stride;
        next_x += group.x.next_stride;
        dx += dx_of.stride;
    }
}

// One position in double; what its dout * xhat adds to dweight goes into lane 0.
template <class T>
NORMKIT_BLOCK void extreme_position(const ColumnsBackward& a, const T* dout, const T* x, double mean, double rstd,
                                    T* dx, Acc<T>* dweight) {
    using A = Acc<T>;
    const auto d = [&](int64_t c) { return double(scalar<T>(dout + c * a.dout.line_stride)); };
    const auto g = [&](int64_t c) { return d(c) * double(static_cast<const A*>(a.gain)[c]); };
    // A difference beyond kMax / 2 among up to 2^48 channels means rstd < 2^25 / kMax.
    const bool factor_by_factor = rstd < 0x1p25 / Types<double>::kMax;
    const auto xhat = [&](int64_t c) {
        const double v = double(scalar<T>(x + c * a.x.line_stride));
        return factor_by_factor ? v * rstd - mean * rstd : (v - mean) * rstd;
    };
    double sum = 0, products = 0;
    for (int64_t c = 0; c < a.channels; ++c) {
        sum += g(c);
        products += g(c) * xhat(c);
        if (dweight != nullptr) dweight[c * kLanes<A>] += A(d(c) * xhat(c));
    }
    if (dx == nullptr) return;
    const double size = double(a.channels), mean_g = sum / size, mean_g_xhat = products / size;
    for (int64_t c = 0; c < a.channels; ++c) {
        const A v = A((g(c) - mean_g - xhat(c) * mean_g_xhat) * rstd);
        store<T>(dx + c * a.space, splat_wide<T>(v), Partial{1});
    }
}

template <class T, int kCount, bool kSums, bool kStream, class Last>
void backward_group(const ColumnsBackward& a, int64_t b, int64_t s, int64_t n, Last last, Acc<T>* dweight,
                    Acc<T>* dbias) {
    using A = Acc<T>;
    constexpr int kWidth = Beside<T, kCount>::kWidth;
    const int64_t position = b * a.space + s;
    const A *mean = static_cast<const A*>(a.mean) + position, *rstd = static_cast<const A*>(a.rstd) + position;
    Gradient<T, kCount> group;
    group.dout = columns_at<T>(a.dout, b, s, n, a.batch, a.channels, a.space);
    group.x = columns_at<T>(a.x, b, s, n, a.batch, a.channels, a.space);
    bool extreme = false;
    for (int64_t i = 0; i < kWidth; ++i) {
        const bool plain = i < n && !is_extreme(rstd[i]);
        group.mean.of[i] = plain ? mean[i] : 0;
        group.rstd.of[i] = plain ? rstd[i] : 0;
        extreme = extreme || (i < n && !plain);
    }
    // without a dx, an address that may be asked for
    T* at = a.dx != nullptr ? static_cast<T*>(a.dx) + b * a.channels * a.space + s : nullptr;
    const Target<T, kStream> dx{at, at != nullptr ? a.space : 0};
    sum_gradients<T, kCount, kSums>(a, group, dx, last, dweight, dbias);
    if (at != nullptr) {
        for (int i = 0; i < kWidth; ++i) {
            group.mean_g.of[i] = A(group.sum_g.of[i] / double(a.channels));
            group.slope.of[i] = A(-group.sum_g_xhat.of[i] / double(a.channels) * double(group.rstd.of[i]));
        }
        write_gradients<T, kCount>(a, group, dx, last);
    }
    if (__builtin_expect(!extreme, 1)) return;
    if (kStream) end_stream();
    for (int64_t i = 0; i < n; ++i)
        if (is_extreme(rstd[i]))
            extreme_position<T>(a, group.dout.at + i, group.x.at + i, double(mean[i]), double(rstd[i]),
                                at != nullptr ? at + i : nullptr, kSums ? dweight : nullptr);
}

// The strips of block after block; each block sums, in their order, into its own line of dweight and dbias. `lanes` is
// memory for a vector of both for every channel.
template <class T, bool kSums, bool kStream>
void backward_blocks(const ColumnsBackward& a, int64_t first, int64_t last, void* lanes) {
    using A = Acc<T>;
    constexpr int kNarrowSteps = kHalf<T> ? 1 : 2;
    const bool narrow = prefers_narrow<T>(a.channels, 2, kNarrowSteps);
    const int64_t strips = (a.space + kStrip - 1) / kStrip, all = strips * a.batch;
    A *dweight = static_cast<A*>(lanes), *dbias = dweight + a.channels * kLanes<A>;
    for (int64_t block = first; block < last; ++block) {
        if (kSums) memset(lanes, 0, size_t(2 * a.channels) * kVectorBytes);
        const int64_t start = block * a.strips_per_block;
        for (int64_t strip = start; strip < all && strip < start + a.strips_per_block; ++strip) {
            const int64_t b = strip / strips, from = strip % strips * kStrip;
            const int64_t to = from + kStrip < a.space ? from + kStrip : a.space;
            const auto group = [&](int64_t s, int64_t n, auto count, auto last_lanes) {
                backward_group<T, count.value, kSums, kStream>(a, b, s, n, last_lanes, dweight, dbias);
            };
            if (narrow) {
                for_groups<T, kNarrowSteps>(from, to, group);
            } else {
                for_groups<T, kWideSteps<T>>(from, to, group);
            }
        }
        if (!kSums) continue;
        for (int64_t c = 0; c < a.channels; ++c) {
            const int64_t at = block * a.channels + c;
            static_cast<A*>(a.dweight)[at] = A(add_lanes(read(dweight + c * kLanes<A>, Full{})));
            static_cast<A*>(a.dbias)[at] = A(add_lanes(read(dbias + c * kLanes<A>, Full{})));
        }
    }
    if (kStream) end_stream();
}

template <class T>
void columns_backward(const ColumnsBackward& a, int64_t first, int64_t last, void* lanes) {
    choose([&](auto sums, auto stream) { backward_blocks<T, sums.value, stream.value>(a, first, last, lanes); },
           a.dweight != nullptr, a.stream);
}

}  // namespace normkit::NORMKIT_ISA
