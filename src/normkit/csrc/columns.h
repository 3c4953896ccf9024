// LayerNorm over the channels of (B, C, S), one position of one sample sharing statistics, where S is contiguous:
// out[b,c,s] = (x[b,c,s] - mean[b,s]) * rstd[b,s] * gain[c] + shift[c], and its gradient.
// May include: core.h, steps.h, column_groups.h. Compiled once per instruction set; no threads.
// Read next: column_groups.h, how a line is cut; columns.cpp, which splits the positions; reference.py, rows_forward
// and rows_backward, the same formulas in torch.
#pragma once

#include "column_groups.h"

namespace normkit::NORMKIT_ISA {

// ---------------------------------------------------------------------------------------------- forward

// out = ((x - mean) * rstd + offset) * gain + shift, where `offset` makes good what rounding took from the mean.
template <class T, int kCount>
struct Statistics {
    Beside<T, kCount> mean, rstd, offset;
    bool settled[Beside<T, kCount>::kWidth];
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
                square[k] = fused(d, d, square[k]);
            });
        sums.add(sum);
        squares.add(square);
    });
}

// What a pass about a center finds: the mean's distance from it, and the variance.
template <class T, int kCount>
struct Moments {
    Beside<T, kCount> center;
    WideSums<T, kCount> delta, var;

    // Whether the center lies more than a standard deviation from the mean.
    NORMKIT_INLINE bool far(int i) const { return delta.of[i] * delta.of[i] > var.of[i]; }
};

// True: some position's center lies far off.
template <class T, int kCount, bool kStream, class Last>
NORMKIT_INLINE bool set_moments(const Columns<T>& x, Target<T, kStream> out, int64_t channels, Last last,
                                Moments<T, kCount>& m) {
    sum_deviations<T, kCount>(x, out, channels, m.center, last, m.delta, m.var);
    int64_t far = 0;
    for (int i = 0; i < m.center.kWidth; ++i) {
        m.delta.of[i] /= double(channels);
        m.var.of[i] = m.var.of[i] / double(channels) - m.delta.of[i] * m.delta.of[i];
        far |= int64_t(m.far(i));
    }
    return far != 0;
}

// As for rows (rows.h, set_statistics) one pass about a sampled center, and another about the mean itself where that
// center lies far off; the other positions keep what they have. True: some position's are not finite.
template <class T, int kCount, bool kStream, class Last>
NORMKIT_INLINE bool set_statistics(const Columns<T>& x, Target<T, kStream> out, int64_t channels, double eps, Last last,
                                   Statistics<T, kCount>& s) {
    using A = Acc<T>;
    Moments<T, kCount> m;
    constexpr int kWidth = Beside<T, kCount>::kWidth;
    sample_center<T, kCount>(x, channels, last, m.center);
    if (__builtin_expect(set_moments<T, kCount>(x, out, channels, last, m), 0)) {
        Moments<T, kCount> again;
        for (int i = 0; i < kWidth; ++i) again.center.of[i] = A(double(m.center.of[i]) + m.delta.of[i]);
        (void)set_moments<T, kCount>(x, out, channels, last, again);
        for (int i = 0; i < kWidth; ++i) {
            if (!m.far(i)) continue;
            m.center.of[i] = again.center.of[i];
            m.delta.of[i] = again.delta.of[i];
            m.var.of[i] = again.var.of[i];
        }
    }
    int64_t unsettled = 0;
    for (int i = 0; i < kWidth; ++i) {
        const double mean = double(m.center.of[i]) + m.delta.of[i];
        const double var = m.var.of[i] < 0 ? 0 : m.var.of[i];  // rounding; NaN stays
        const double rstd = 1 / __builtin_sqrt(var + eps);
        s.mean.of[i] = A(mean);
        s.offset.of[i] = A((double(s.mean.of[i]) - mean) * rstd);
        s.rstd.of[i] = A(rstd);
        s.settled[i] = var - var == 0;
        unsettled |= int64_t(!(var - var == 0));
    }
    return unsettled != 0;
}

template <class T, int kCount, bool kStream, class Last>
NORMKIT_BLOCK void write_columns(const ColumnsForward& a, const Columns<T>& x, const Statistics<T, kCount>& s,
                                 Target<T, kStream> out_of, Last last) {
    using A = Acc<T>;
    Wide<T> mean[kCount], rstd[kCount], offset[kCount];
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
        mean[k] = s.mean.step(k);
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
            const Wide<T> v = fused(load<T>(line + k * kStep<T>, lanes) - mean[k], rstd[k], offset[k]);
            store_out<kStream>(out + k * kStep<T>, fused(v, splat_wide<T>(gain_c), splat_wide<T>(shift_c)), lanes);
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
    if (a.mean != nullptr) memcpy(static_cast<A*>(a.mean) + position, statistics.mean.of, size_t(n) * sizeof(A));
    if (a.rstd != nullptr) memcpy(static_cast<A*>(a.rstd) + position, statistics.rstd.of, size_t(n) * sizeof(A));
    write_columns<T, kCount>(a, x, statistics, out, last);
    if (__builtin_expect(!unsettled, 1)) return;
    if (kStream) end_stream();
    for (int64_t i = 0; i < statistics.mean.kWidth; ++i)
        if (i < n && !statistics.settled[i]) rescue_position<T>(a, x, i, position + i, out.at);
}

// The strips first..last of all samples, kStrip positions each.
template <class T>
void columns_forward(const ColumnsForward& a, int64_t first, int64_t last) {
    const int steps = group_steps<T>(a.channels, kForwardWidth);
    const int64_t strips = (a.space + kStrip - 1) / kStrip;
    for (int64_t strip = first; strip < last; ++strip) {
        const int64_t b = strip / strips, start = strip % strips * kStrip;
        const int64_t end = start + kStrip < a.space ? start + kStrip : a.space;
        for_groups<T, kWideSteps<T>>(steps, start, end, [&](int64_t s, int64_t n, auto count, auto lanes) {
            if (a.stream) {
                forward_group<T, count.value, true>(a, b, s, n, lanes);
            } else {
                forward_group<T, count.value, false>(a, b, s, n, lanes);
            }
        });
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
                    dweight_c = fused(d, xhat, dweight_c);
                    dbias_c += d;
                }
                const Wide<T> g = d * gain_c;
                sum[k] += g;
                products[k] = fused(g, xhat, products[k]);
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
            const Wide<T> g = load<T>(dout + k * kWidth, lanes) * gain_c;
            const Wide<T> v = fused(load<T>(x + k * kWidth, lanes) - mean[k], slope[k], g - mean_g[k]);
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
    T* at = a.dx != nullptr ? static_cast<T*>(a.dx) + b * a.channels * a.space + s : nullptr;
    const Target<T, kStream> dx{at, a.space};
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
    const int steps = group_steps<T>(a.channels, kBackwardWidth);
    const int64_t strips = (a.space + kStrip - 1) / kStrip, all = strips * a.batch;
    A *dweight = static_cast<A*>(lanes), *dbias = dweight + a.channels * kLanes<A>;
    for (int64_t block = first; block < last; ++block) {
        if (kSums) memset(lanes, 0, size_t(2 * a.channels) * kVectorBytes);
        const int64_t start = block * a.strips_per_block;
        for (int64_t strip = start; strip < all && strip < start + a.strips_per_block; ++strip) {
            const int64_t b = strip / strips, from = strip % strips * kStrip;
            const int64_t to = from + kStrip < a.space ? from + kStrip : a.space;
            for_groups<T, kWideSteps<T>>(steps, from, to, [&](int64_t s, int64_t n, auto count, auto last_lanes) {
                backward_group<T, count.value, kSums, kStream>(a, b, s, n, last_lanes, dweight, dbias);
            });
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
