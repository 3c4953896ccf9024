// The arithmetic of row norms: out = (total - mean) * rstd * gain + bias along contiguous rows, and its gradient.
// May include: core.h, steps.h, blocks.h. Compiled once per instruction set.
// Read next: blocks.h, how a row is cut; rows.cpp, which splits the rows; reference.py, the same formulas in torch.
#pragma once

#include "blocks.h"

namespace normkit::NORMKIT_ISA {

// ---------------------------------------------------------------------------------------------- forward

template <class T, int kRows>
NORMKIT_INLINE void set_sums(const Wide<T> (&first)[kRows][kChains<T>], const Wide<T> (&second)[kRows][kChains<T>],
                             Sums* sums) {
    Wide<T> together[2][kRows];
    double found[2][kRows];
    for (int r = 0; r < kRows; ++r) {
        together[0][r] = add_chains(first[r]);
        together[1][r] = add_chains(second[r]);
    }
    add_lanes_of(together[0], found[0]);
    add_lanes_of(together[1], found[1]);
    for (int r = 0; r < kRows; ++r) sums[r] = {found[0][r], found[1][r]};
}

// A row on its way through forward. Its statistics are in the domain total * scale, scale being 1 but for rows whose
// squares overflow. The mean is center + what `offset` makes good, (center - mean) * rstd: rounding takes up to 5e-4
// of the standard deviation from a center of 1e4, std 1 in float32.
template <class T>
struct NormRow {
    const T *x, *residual;            // once total is written, x is the total
    T *total, *out;                   // total is null without a residual
    const T *next_x, *next_residual;  // the row that comes to this place next
    Acc<T> scale, center, offset, rstd;
    double mean, saved_rstd, var;
};

// Sums of d = x * scale - center and of its square for kRows rows; when not centered only squares count. With a
// residual, x is x + residual as rounded to its dtype, and that is stored in total. A row's sums have the same bits
// whatever rows stand beside it.
template <class T, int kRows, bool kCentered, bool kResidual, bool kScaled>
NORMKIT_BLOCK void deviation_block(const NormRow<T>* rows, int64_t start, int64_t n, Sums* sums) {
    using A = Acc<T>;
    const auto x = each<kRows>([&](int r) { return rows[r].x + start; });
    const auto residual = each<kRows>([&](int r) { return kResidual ? rows[r].residual + start : nullptr; });
    const auto total = each<kRows>([&](int r) { return kResidual ? rows[r].total + start : nullptr; });
    const auto center = each<kRows>([&](int r) { return splat<A>(rows[r].center); });
    const A scale = rows[0].scale;
    static_assert(kRows == 1 || !kScaled, "rows with a scale go one by one");
    Wide<T> sum[kRows][kChains<T>] = {}, square[kRows][kChains<T>] = {};
    sweep<T>(n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            Wide<T> d = load<T>(x.of[r] + i, lanes);
            if constexpr (kResidual) {
                d = rounded<T>(d + load<T>(residual.of[r] + i, lanes));
                store<T>(total.of[r] + i, d, lanes);
            }
            if constexpr (kScaled) d *= scale;
            if constexpr (kCentered) {
                d = keep(d - center.of[r], lanes);
                sum[r][k % kChains<T>] += d;
            }
            square[r][k % kChains<T>] = fused(d, d, square[r][k % kChains<T>]);
        }
    });
    set_sums<T, kRows>(sum, square, sums);
}

// Statistics take one pass about a center that a sample of the row gives: the mean of its first kSample elements. The
// mean of m out of n elements lies at most sqrt(n / m - 1) standard deviations from the row's own; where it lies more
// than one away, the difference of squares would lose digits, and the pass is made again about the mean itself.
constexpr int64_t kSample = 128;

template <class T, int kRows, bool kResidual>
NORMKIT_BLOCK void sample_centers(NormRow<T>* rows, int64_t size) {
    const int64_t m = size < kSample ? size : kSample;
    Wide<T> sums[kRows];
    double found[kRows];
    for (int r = 0; r < kRows; ++r) {
        const NormRow<T>& row = rows[r];
        Wide<T> sum[4] = {};
        sweep<T>(m, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
            Wide<T> v = load<T>(row.x + i, lanes);
            if constexpr (kResidual) v += load<T>(row.residual + i, lanes);
            sum[k] += v * row.scale;
        });
        sums[r] = add_chains(sum);
    }
    add_lanes_of(sums, found);
    for (int r = 0; r < kRows; ++r) rows[r].center = Acc<T>(found[r] / double(m));
}

// A row's mean and variance from the sums of d and of d^2.
template <bool kCentered>
NORMKIT_INLINE void set_moments(double center, Sums sums, double size, double& mean, double& var) {
    const double delta = kCentered ? sums.first / size : 0, rest = sums.second / size - delta * delta;
    mean = center + delta;
    var = rest < 0 ? 0 : rest;  // rounding; NaN stays
}

template <class T, int kRows, bool kCentered, bool kResidual, bool kScaled>
void set_statistics(const RowsForward& a, NormRow<T>* rows, int threads) {
    using A = Acc<T>;
    const double size = double(a.size), scale = kScaled ? double(rows[0].scale) : 1;
    Sums sums[kRows] = {};
    constexpr int kStride = kTogether<kRows>;
    if constexpr (kCentered)
        for (int r = 0; r < kRows; r += kStride) sample_centers<T, kStride, kResidual>(rows + r, a.size);
    sum_blocks<kRows>(a.size, threads, a.partials, sums, [&](int64_t start, int64_t n, Sums* part) {
        for (int r = 0; r < kRows; r += kStride)
            deviation_block<T, kStride, kCentered, kResidual, kScaled>(rows + r, start, n, part + r);
    });
    // Arrays of the rows' numbers, for the compiler to divide and take roots of several at once.
    double center[kRows], mean[kRows], var[kRows], rstd[kRows], far[kRows], most = 0;
    for (int r = 0; r < kRows; ++r) center[r] = double(rows[r].center);
    for (int r = 0; r < kRows; ++r) {
        set_moments<kCentered>(center[r], sums[r], size, mean[r], var[r]);
        const double off = mean[r] - center[r];
        far[r] = kCentered && off * off > var[r] ? 1 : 0;
    }
    for (int r = 0; r < kRows; ++r) most += far[r];
    for (int r = 0; r < kRows; ++r) {
        NormRow<T>& row = rows[r];
        if constexpr (kResidual) row.x = row.total;
        if (__builtin_expect(most == 0, 1) || far[r] == 0) continue;
        row.center = A(mean[r]);
        Sums again{0, 0};
        sum_blocks<1>(a.size, threads, a.partials, &again, [&](int64_t start, int64_t n, Sums* part) {
            deviation_block<T, 1, true, false, kScaled>(&row, start, n, part);
        });
        set_moments<true>(double(row.center), again, size, mean[r], var[r]);
    }
    for (int r = 0; r < kRows; ++r) rstd[r] = 1 / __builtin_sqrt(var[r] + a.eps * scale * scale);
    for (int r = 0; r < kRows; ++r) {
        NormRow<T>& row = rows[r];
        row.center = A(mean[r]);
        row.offset = A((double(row.center) - mean[r]) * rstd[r]);
        row.rstd = A(rstd[r]);
        row.mean = mean[r] / scale;
        row.saved_rstd = rstd[r] * scale;
        row.var = var[r];
    }
}

// 1 unless every element is finite; else the power of two that brings the largest to about 2^30, where squares and
// differences have room and neither the scale nor its inverse is denormal.
template <class T>
double rescue_scale(const T* x, int64_t n) {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double v = __builtin_fabs(double(scalar<T>(x + i)));
        if (!finite(v)) return 1;
        if (v > largest) largest = v;
    }
    return largest > 0 ? __builtin_ldexp(1.0, 30 - __builtin_ilogb(largest)) : 1;
}

// Sets the statistics of a row again if its sum of squares overflowed though every element is finite.
template <class T, bool kCentered>
NORMKIT_BLOCK void rescue(const RowsForward& a, NormRow<T>& row, int threads) {
    using A = Acc<T>;
    row.scale = A(rescue_scale<T>(row.x, a.size));
    if (row.scale == 1) return;
    set_statistics<T, 1, kCentered, false, true>(a, &row, threads);
    if (row.var == 0) {  // eps * scale^2 is lost beside nothing else, and 1 / sqrt of it may not fit
        row.saved_rstd = 1 / __builtin_sqrt(a.eps);
        row.rstd = Types<A>::kMax;
        row.offset = 0;
    }
}

// out = ((x * scale - center) * rstd + offset) * gain + shift.
template <class T, int kRows, bool kCentered, bool kResidual, bool kShift, bool kStream, bool kScaled>
NORMKIT_BLOCK void affine_block(const NormRow<T>* rows, int64_t start, int64_t n, const Acc<T>* gain,
                                const Acc<T>* shift) {
    using A = Acc<T>;
    const auto x = each<kRows>([&](int r) { return rows[r].x + start; });
    const auto out = each<kRows>([&](int r) { return rows[r].out + start; });
    const auto next_x = each<kRows>([&](int r) { return rows[r].next_x + start; });
    const auto next_residual = each<kRows>([&](int r) { return kResidual ? rows[r].next_residual + start : nullptr; });
    const auto center = each<kRows>([&](int r) { return splat<A>(rows[r].center); });
    const auto rstd = each<kRows>([&](int r) { return splat<A>(rows[r].rstd); });
    const auto offset = each<kRows>([&](int r) { return splat<A>(rows[r].offset); });
    const A scale = rows[0].scale;
    sweep<T>(n, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        const Wide<T> gain_i = load_wide<T>(gain + i, lanes),
                      shift_i = kShift ? load_wide<T>(shift + i, lanes) : Wide<T>{};
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            prefetch<T>(next_x.of[r], i);
            if constexpr (kResidual) prefetch<T>(next_residual.of[r], i);
            Wide<T> v = load<T>(x.of[r] + i, lanes);
            if constexpr (kScaled) v *= scale;
            v = kCentered ? fused(v - center.of[r], rstd.of[r], offset.of[r]) : v * rstd.of[r];
            v = kShift ? fused(v, gain_i, shift_i) : v * gain_i;
            store_out<kStream>(out.of[r] + i, v, lanes);
        }
    });
}

template <class T, int kRows, bool kCentered, bool kResidual, bool kShift, bool kStream, bool kScaled>
void affine_rows(const RowsForward& a, const NormRow<T>* rows, int threads) {
    for_blocks(a.size, threads, [&](int64_t start, int64_t n) {
        Acc<T> buffers[2][kWeightPiece];
        const bool wide = a.gain != nullptr && (!kShift || a.shift != nullptr);
        for_pieces(start, n, wide, [&](int64_t at, int64_t m) {
            const Acc<T>* gain = weight_piece<T>(a.weight, a.gain, at, m, buffers[0]);
            const Acc<T>* shift = kShift ? weight_piece<T>(a.bias, a.shift, at, m, buffers[1]) : nullptr;
            for (int r = 0; r < kRows; r += kTogether<kRows>)
                affine_block<T, kTogether<kRows>, kCentered, kResidual, kShift, kStream, kScaled>(rows + r, at, m, gain,
                                                                                                  shift);
        });
        if (kStream && threads > 1) end_stream();
    });
}

// kRows rows from r on. Writing them, it asks for the rows that follow: their reading would else wait for memory while
// nothing is computed (up to `last`, the end of this thread's).
template <class T, int kRows, bool kCentered, bool kResidual, bool kShift, bool kStream>
void forward_group(const RowsForward& a, int64_t r, int64_t last, int threads) {
    using A = Acc<T>;
    NormRow<T> rows[kRows];
    for (int k = 0; k < kRows; ++k) {
        rows[k].x = row_of<T>(a.x, r + k);
        rows[k].residual = kResidual ? row_of<T>(a.residual, r + k) : nullptr;
        const int64_t next = r + k + kRows < last ? r + k + kRows : r + k;
        rows[k].next_x = row_of<T>(a.x, next);
        rows[k].next_residual = kResidual ? row_of<T>(a.residual, next) : nullptr;
        rows[k].total = kResidual ? static_cast<T*>(a.total) + (r + k) * a.size : nullptr;
        rows[k].out = static_cast<T*>(a.out) + (r + k) * a.size;
        rows[k].scale = 1;
        rows[k].center = 0;
    }
    set_statistics<T, kRows, kCentered, kResidual, false>(a, rows, threads);
    bool scaled = false;
    for (int k = 0; k < kRows; ++k) {
        if (__builtin_expect(!finite(rows[k].var), 0)) rescue<T, kCentered>(a, rows[k], threads);
        scaled = scaled || rows[k].scale != 1;
        if (a.mean != nullptr) static_cast<A*>(a.mean)[r + k] = A(rows[k].mean);
        if (a.rstd != nullptr) static_cast<A*>(a.rstd)[r + k] = A(rows[k].saved_rstd);
    }
    if (__builtin_expect(!scaled, 1)) {
        affine_rows<T, kRows, kCentered, kResidual, kShift, kStream, false>(a, rows, threads);
    } else {
        for (int k = 0; k < kRows; ++k)
            affine_rows<T, 1, kCentered, kResidual, kShift, kStream, true>(a, rows + k, threads);
    }
}

// Rows first..last by the variant that fits the arguments: what does not change within a call is not asked for every
// element.
template <class T>
void rows_forward(const RowsForward& a, int64_t first, int64_t last, int threads) {
    const auto rows = [&](auto centered, auto residual, auto shift, auto stream) {
        int64_t r = first;
        if (a.size <= kShort)
            for (; r + kBatch <= last; r += kBatch)
                forward_group<T, kBatch, centered.value, residual.value, shift.value, stream.value>(a, r, last,
                                                                                                    threads);
        for (; r + kGroup <= last; r += kGroup)
            forward_group<T, kGroup, centered.value, residual.value, shift.value, stream.value>(a, r, last, threads);
        for (; r < last; ++r)
            forward_group<T, 1, centered.value, residual.value, shift.value, stream.value>(a, r, last, threads);
        if (stream.value) end_stream();
    };
    choose(rows, a.centered, a.residual.data != nullptr, a.bias.data != nullptr, a.stream);
}

// --------------------------------------------------------------------------------------------- backward

template <class T>
struct GradientRow {
    const T *dout, *total, *dtotal;  // dtotal may be null
    T* dx;
    const T *next_dout, *next_total;  // of the row that comes to this place next
    Acc<T> mean, rstd;
    Acc<T> mean_g, mean_g_xhat, slope;  // slope = -mean_g_xhat * rstd
};

// For kRows rows: sums[r] = sums of g = dout * gain and of g * xhat; adds dout * xhat to dweight and dout to dbias.
// A row's sums have the same bits whatever rows stand beside it.
template <class T, int kRows, bool kCentered, bool kWeight, bool kBias>
NORMKIT_BLOCK void gradient_block(const GradientRow<T>* rows, int64_t start, int64_t n, const Acc<T>* gain,
                                  Acc<T>* dweight, Acc<T>* dbias, Sums* sums) {
    using A = Acc<T>;
    const auto dout = each<kRows>([&](int r) { return rows[r].dout + start; });
    const auto total = each<kRows>([&](int r) { return rows[r].total + start; });
    const auto next_dout = each<kRows>([&](int r) { return rows[r].next_dout + start; });
    const auto mean = each<kRows>([&](int r) { return splat<A>(rows[r].mean); });
    const auto rstd = each<kRows>([&](int r) { return splat<A>(rows[r].rstd); });
    Wide<T> sum[kRows][kChains<T>] = {}, products[kRows][kChains<T>] = {};
    sweep<T>(n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
        const Wide<T> gain_i = load_wide<T>(gain + i, lanes);
        Wide<T> dweight_i = kWeight ? load_wide<T>(dweight + i, lanes) : Wide<T>{};
        Wide<T> dbias_i = kBias ? load_wide<T>(dbias + i, lanes) : Wide<T>{};
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            prefetch<T>(next_dout.of[r], i);
            const Wide<T> d = load<T>(dout.of[r] + i, lanes), t = load<T>(total.of[r] + i, lanes);
            const Wide<T> xhat = keep((kCentered ? t - mean.of[r] : t) * rstd.of[r], lanes);
            if constexpr (kWeight) dweight_i = fused(d, xhat, dweight_i);
            if constexpr (kBias) dbias_i += d;
            const Wide<T> g = d * gain_i;
            if constexpr (kCentered) sum[r][k % kChains<T>] += g;
            products[r][k % kChains<T>] = fused(g, xhat, products[r][k % kChains<T>]);
        }
        if constexpr (kWeight) store_wide<T>(dweight + i, dweight_i, lanes);
        if constexpr (kBias) store_wide<T>(dbias + i, dbias_i, lanes);
    });
    set_sums<T, kRows>(sum, products, sums);
}

// dx = rstd * (g - mean_g - xhat * mean_g_xhat) + dtotal, rounded once.
template <class T, int kRows, bool kCentered, bool kTotal, bool kStream>
NORMKIT_BLOCK void dx_block(const GradientRow<T>* rows, int64_t start, int64_t n, const Acc<T>* gain) {
    using A = Acc<T>;
    const auto dout = each<kRows>([&](int r) { return rows[r].dout + start; });
    const auto total = each<kRows>([&](int r) { return rows[r].total + start; });
    const auto dtotal = each<kRows>([&](int r) { return kTotal ? rows[r].dtotal + start : nullptr; });
    const auto dx = each<kRows>([&](int r) { return rows[r].dx + start; });
    const auto next_total = each<kRows>([&](int r) { return rows[r].next_total + start; });
    const auto mean = each<kRows>([&](int r) { return splat<A>(rows[r].mean); });
    const auto rstd = each<kRows>([&](int r) { return splat<A>(rows[r].rstd); });
    const auto slope = each<kRows>([&](int r) { return splat<A>(rows[r].slope); });
    const auto mean_g = each<kRows>([&](int r) { return splat<A>(rows[r].mean_g); });
    sweep<T>(n, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        const Wide<T> gain_i = load_wide<T>(gain + i, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            prefetch<T>(next_total.of[r], i);
            Wide<T> v = load<T>(dout.of[r] + i, lanes) * gain_i, t = load<T>(total.of[r] + i, lanes);
            if constexpr (kCentered) {
                v -= mean_g.of[r];
                t -= mean.of[r];
            }
            v = fused(t, slope.of[r], v) * rstd.of[r];
            if constexpr (kTotal) v += load<T>(dtotal.of[r] + i, lanes);
            store_out<kStream>(dx.of[r] + i, v, lanes);
        }
    });
}

// The same two steps where rstd is so small or large that its square, or a difference of two elements, may leave the
// range: (total * factor - offset) * outer is then total * rstd - mean * rstd, and dx is computed factor by factor.
template <class T>
struct Extreme {
    const GradientRow<T>& row;
    Acc<T> factor, offset, outer;

    NORMKIT_INLINE explicit Extreme(const GradientRow<T>& of) : row(of), factor(1), offset(of.mean), outer(of.rstd) {
        // A difference beyond kMax / 2 in a row of up to 2^48 elements means rstd < 2^25 / kMax.
        if (of.rstd < 0x1p25 / Types<Acc<T>>::kMax) {
            factor = of.rstd;
            offset = of.mean * of.rstd;
            outer = 1;
        }
    }
    template <class Lanes>
    NORMKIT_INLINE Wide<T> xhat(int64_t i, Lanes lanes) const {
        return keep((load<T>(row.total + i, lanes) * factor - offset) * outer, lanes);
    }
    static bool is(Acc<T> rstd) { return !(rstd > Acc<T>(0x1p-50) && rstd < Acc<T>(0x1p50)); }
};

template <class T>
NORMKIT_BLOCK void extreme_gradient_block(const GradientRow<T>& row, int64_t start, int64_t n, const Acc<T>* gain,
                                          Acc<T>* dweight, Acc<T>* dbias, Sums* sums) {
    const Extreme<T> extreme(row);
    Wide<T> sum[kChains<T>] = {}, products[kChains<T>] = {};
    sweep<T>(n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
        const Wide<T> d = load<T>(row.dout + start + i, lanes), xhat = extreme.xhat(start + i, lanes);
        if (dweight != nullptr) store_wide<T>(dweight + i, load_wide<T>(dweight + i, lanes) + d * xhat, lanes);
        if (dbias != nullptr) store_wide<T>(dbias + i, load_wide<T>(dbias + i, lanes) + d, lanes);
        const Wide<T> g = d * load_wide<T>(gain + i, lanes);
        sum[k % kChains<T>] += g;
        products[k % kChains<T>] += g * xhat;
    });
    *sums = {add_lanes(sum), add_lanes(products)};
}

template <class T>
NORMKIT_BLOCK void extreme_dx_block(const GradientRow<T>& row, int64_t start, int64_t n, const Acc<T>* gain) {
    const Extreme<T> extreme(row);
    sweep<T>(n, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        const Wide<T> g = load<T>(row.dout + start + i, lanes) * load_wide<T>(gain + i, lanes);
        Wide<T> v = (g - row.mean_g - extreme.xhat(start + i, lanes) * row.mean_g_xhat) * row.rstd;
        if (row.dtotal != nullptr) v += load<T>(row.dtotal + start + i, lanes);
        store<T>(row.dx + start + i, v, lanes);
    });
}

template <class T, int kRows, bool kCentered, bool kStream>
void dx_rows(const RowsBackward& a, const GradientRow<T>* rows, bool extreme, int threads) {
    for_blocks(a.size, threads, [&](int64_t start, int64_t n) {
        Acc<T> buffer[kWeightPiece];
        for_pieces(start, n, a.gain != nullptr, [&](int64_t at, int64_t m) {
            const Acc<T>* gain = weight_piece<T>(a.weight, a.gain, at, m, buffer);
            if (kRows == 1 && extreme) {
                extreme_dx_block<T>(rows[0], at, m, gain);
                return;
            }
            for (int r = 0; r < kRows; r += kTogether<kRows>) {
                if (a.dtotal.data != nullptr) {
                    dx_block<T, kTogether<kRows>, kCentered, true, kStream>(rows + r, at, m, gain);
                } else {
                    dx_block<T, kTogether<kRows>, kCentered, false, kStream>(rows + r, at, m, gain);
                }
            }
        });
        if (kStream && threads > 1) end_stream();
    });
}

// kRows rows from r on; `fresh`: the line of dweight and dbias is not yet set.
template <class T, int kRows, bool kCentered, bool kWeight, bool kBias, bool kStream>
void backward_group(const RowsBackward& a, int64_t r, Acc<T>* dweight, Acc<T>* dbias, bool fresh, int threads) {
    using A = Acc<T>;
    GradientRow<T> rows[kRows];
    bool extreme = false;
    for (int k = 0; k < kRows; ++k) {
        GradientRow<T>& row = rows[k];
        const int64_t next = r + k + kRows < a.rows ? r + k + kRows : r + k;
        row.dout = row_of<T>(a.dout, r + k);
        row.total = row_of<T>(a.total, r + k);
        row.dtotal = a.dtotal.data != nullptr ? row_of<T>(a.dtotal, r + k) : nullptr;
        row.dx = a.dx != nullptr ? static_cast<T*>(a.dx) + (r + k) * a.size : nullptr;
        row.next_dout = row_of<T>(a.dout, next);
        row.next_total = row_of<T>(a.total, next);
        row.mean = kCentered ? static_cast<const A*>(a.mean)[r + k] : A(0);
        row.rstd = static_cast<const A*>(a.rstd)[r + k];
        extreme = extreme || Extreme<T>::is(rows[k].rstd);
    }
    if constexpr (kRows > 1) {
        if (extreme) {
            for (int k = 0; k < kRows; ++k)
                backward_group<T, 1, kCentered, kWeight, kBias, kStream>(a, r + k, dweight, dbias, fresh && k == 0,
                                                                         threads);
            return;
        }
    }
    Sums sums[kRows] = {};
    sum_blocks<kRows>(a.size, threads, a.partials, sums, [&](int64_t start, int64_t n, Sums* part) {
        A buffer[kRowBlock], dweight_own[kWeight ? kRowBlock : 1], dbias_own[kBias ? kRowBlock : 1];
        const A* gain = weight_piece<T>(a.weight, a.gain, start, n, buffer);
        A *dweight_block = nullptr, *dbias_block = nullptr;
        if (kWeight) dweight_block = a.narrow ? dweight_own : dweight + start;
        if (kBias) dbias_block = a.narrow ? dbias_own : dbias + start;
        if (kWeight && fresh) memset(dweight_block, 0, size_t(n) * sizeof(A));
        if (kBias && fresh) memset(dbias_block, 0, size_t(n) * sizeof(A));
        if (kRows == 1 && extreme) {
            extreme_gradient_block<T>(rows[0], start, n, gain, dweight_block, dbias_block, part);
        } else {
            for (int r = 0; r < kRows; r += kTogether<kRows>)
                gradient_block<T, kTogether<kRows>, kCentered, kWeight, kBias>(rows + r, start, n, gain, dweight_block,
                                                                               dbias_block, part + r);
        }
        if (kWeight && a.narrow) narrow<T>(dweight_own, static_cast<T*>(a.dweight) + start, n);
        if (kBias && a.narrow) narrow<T>(dbias_own, static_cast<T*>(a.dbias) + start, n);
    });
    if (a.dx == nullptr) return;
    for (int k = 0; k < kRows; ++k) {
        GradientRow<T>& row = rows[k];
        const double mean_g_xhat = sums[k].second / double(a.size);
        row.mean_g = kCentered ? A(sums[k].first / double(a.size)) : A(0);
        row.mean_g_xhat = A(mean_g_xhat);
        row.slope = A(-mean_g_xhat * double(row.rstd));
    }
    dx_rows<T, kRows, kCentered, kStream>(a, rows, extreme, threads);
}

// Row blocks first..last; each sums its rows, in their order, into its own line of dweight and dbias.
template <class T, bool kCentered, bool kWeight, bool kBias, bool kStream>
void backward_blocks(const RowsBackward& a, int64_t first, int64_t last, int threads) {
    using A = Acc<T>;
    for (int64_t block = first; block < last; ++block) {
        A* dweight = kWeight ? static_cast<A*>(a.dweight) + block * a.size : nullptr;
        A* dbias = kBias ? static_cast<A*>(a.dbias) + block * a.size : nullptr;
        const int64_t start = block * a.rows_per_block;
        const int64_t end = start + a.rows_per_block < a.rows ? start + a.rows_per_block : a.rows;
        int64_t r = start;
        if (a.size <= kShort)
            for (; r + kBatch <= end; r += kBatch)
                backward_group<T, kBatch, kCentered, kWeight, kBias, kStream>(a, r, dweight, dbias, r == start,
                                                                              threads);
        for (; r + kGroup <= end; r += kGroup)
            backward_group<T, kGroup, kCentered, kWeight, kBias, kStream>(a, r, dweight, dbias, r == start, threads);
        for (; r < end; ++r)
            backward_group<T, 1, kCentered, kWeight, kBias, kStream>(a, r, dweight, dbias, r == start, threads);
    }
    if (kStream) end_stream();
}

template <class T>
void rows_backward(const RowsBackward& a, int64_t first, int64_t last, int threads) {
    choose(
        [&](auto centered, auto weight, auto bias, auto stream) {
            backward_blocks<T, centered.value, weight.value, weight.value && bias.value, stream.value>(a, first, last,
                                                                                                       threads);
        },
        a.mean != nullptr, a.dweight != nullptr, a.dbias != nullptr, a.stream);
}

// The sum of all lines, in their order, in double; columns first..last.
template <class T>
void sum_lines(const LineSum& a, int64_t first, int64_t last) {
    using A = Acc<T>;
    constexpr int64_t kColumns = 256;
    for (int64_t start = first; start < last; start += kColumns) {
        double sums[kColumns] = {};
        const int64_t n = last - start < kColumns ? last - start : kColumns;
        const A* line = static_cast<const A*>(a.lines) + start;
        for (int64_t k = 0; k < a.count; ++k, line += a.size)
            for (int64_t i = 0; i < n; ++i) sums[i] += double(line[i]);
        if (a.narrow) {
            narrow<T>(sums, static_cast<T*>(a.out) + start, n);
        } else {
            narrow<A>(sums, static_cast<A*>(a.out) + start, n);
        }
    }
}

}  // namespace normkit::NORMKIT_ISA
