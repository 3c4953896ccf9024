// The arithmetic of row norms: out = (total - mean) * rstd * gain + bias along contiguous rows, and its gradient.
// May include: core.h, vec.h. Compiled once per instruction set; no threads of its own (parallel_ranges is handed in
// work and never decides arithmetic).
// Read next: rows.cpp, which splits the rows; reference.py, the same formulas in torch.
#pragma once

#include "core.h"
#include "vec.h"

namespace normkit::NORMKIT_ISA {

template <class T>
NORMKIT_INLINE const T* row_of(const StridedRows& rows, int64_t r) {
    const int64_t outer = r < rows.inner ? 0 : r / rows.inner;
    return static_cast<const T*>(rows.data) + outer * rows.outer_stride + (r - outer * rows.inner) * rows.inner_stride;
}

// -------------------------------------------------------------------------------- the blocks of one row

// block(start, n) for each block of a row of `size` elements, shared by `threads`.
template <class Block>
void for_blocks(int64_t size, int threads, const Block& block) {
    struct Job {
        const Block& block;
        int64_t size;
    } job{block, size};
    const auto range = [](void* context, int64_t first, int64_t last) {
        const Job& job = *static_cast<const Job*>(context);
        for (int64_t start = first * kRowBlock; start < last * kRowBlock && start < job.size; start += kRowBlock)
            job.block(start, job.size - start < kRowBlock ? job.size - start : kRowBlock);
    };
    const int64_t blocks = (size + kRowBlock - 1) / kRowBlock;
    if (threads == 1) {
        range(&job, 0, blocks);
    } else {
        parallel_ranges(blocks, threads, range, &job);
    }
}

// The sum of block(start, n) over the blocks in their order, in double: the same bits for any number of threads.
template <class Block>
Sums sum_blocks(int64_t size, int threads, Sums* partials, const Block& block) {
    Sums sums{0, 0};
    const auto add = [&](Sums part) {
        sums.first += part.first;
        sums.second += part.second;
    };
    if (threads == 1) {
        for_blocks(size, 1, [&](int64_t start, int64_t n) { add(block(start, n)); });
    } else {
        for_blocks(size, threads, [&](int64_t start, int64_t n) { partials[start / kRowBlock] = block(start, n); });
        for (int64_t i = 0; i * kRowBlock < size; ++i) add(partials[i]);
    }
    return sums;
}

// ---------------------------------------------------------------------------------------------- forward

// Sums of x * scale and of its square. With a residual, x + residual is stored in total, and as stored it is summed.
template <class T>
NORMKIT_BLOCK Sums sum_block(const T* x, const T* residual, T* total, int64_t n, Acc<T> scale) {
    using A = Acc<T>;
    Vec<A> sum[4] = {}, square[4] = {};
    sweep<A>(n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
        Vec<A> v = load<T>(x + i, lanes);
        if (residual != nullptr) {
            v = rounded<T>(v + load<T>(residual + i, lanes));
            store<T>(total + i, v, lanes);
        }
        v *= scale;
        sum[k] += v;
        square[k] += v * v;
    });
    return {add_lanes<A>(sum), add_lanes<A>(square)};
}

// Sums of d = x * scale - mean and of its square.
template <class T>
NORMKIT_BLOCK Sums deviation_block(const T* x, int64_t n, Acc<T> scale, Acc<T> mean) {
    using A = Acc<T>;
    Vec<A> sum[4] = {}, square[4] = {};
    sweep<A>(n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
        const Vec<A> d = keep<A>(load<T>(x + i, lanes) * scale - mean, lanes);
        sum[k] += d;
        square[k] += d * d;
    });
    return {add_lanes<A>(sum), add_lanes<A>(square)};
}

// A row's statistics in the domain x * scale. The mean has two parts: `delta` is what the sum of deviations from
// `mean` showed to be missing, worth 5e-4 of the standard deviation at mean 1e4, std 1 in float32.
template <class T>
struct RowStatistics {
    Acc<T> scale, mean, delta, rstd;
    double saved_mean, saved_rstd;
    double var;
};

template <class T>
RowStatistics<T> row_statistics(const RowsForward& a, const T* x, const T* residual, T* total, double scale,
                                int threads) {
    using A = Acc<T>;
    RowStatistics<T> s{A(scale), 0, 0, 0, 0, 0, 0};
    const double size = double(a.size);
    const Sums sums = sum_blocks(a.size, threads, a.partials, [&](int64_t start, int64_t n) {
        return sum_block<T>(x + start, residual ? residual + start : nullptr, total ? total + start : nullptr, n,
                            s.scale);
    });
    double delta = 0;
    if (a.centered) {
        const T* stored = residual != nullptr ? total : x;
        s.mean = A(sums.first / size);
        const Sums deviations = sum_blocks(a.size, threads, a.partials, [&](int64_t start, int64_t n) {
            return deviation_block<T>(stored + start, n, s.scale, s.mean);
        });
        delta = deviations.first / size;
        s.var = deviations.second / size - delta * delta;
        if (s.var < 0) s.var = 0;  // rounding; NaN stays
    } else {
        s.var = sums.second / size;
    }
    const double rstd = 1 / __builtin_sqrt(s.var + a.eps * scale * scale);
    s.delta = A(delta);
    s.rstd = A(rstd);
    s.saved_mean = (double(s.mean) + delta) / scale;
    s.saved_rstd = rstd * scale;
    return s;
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

// The statistics of a finite row whose sum of squares overflowed.
template <class T>
NORMKIT_BLOCK RowStatistics<T> rescued_statistics(const RowsForward& a, const T* stored, double scale, int threads) {
    using A = Acc<T>;
    RowStatistics<T> s = row_statistics<T>(a, stored, nullptr, nullptr, scale, threads);
    if (s.var == 0) {  // eps * scale^2 is lost beside nothing else, and 1 / sqrt of it may not fit
        s.saved_rstd = 1 / __builtin_sqrt(a.eps);
        s.rstd = Types<A>::kMax;
    }
    return s;
}

template <class T>
NORMKIT_BLOCK void affine_block(const T* x, const Acc<T>* gain, const Acc<T>* bias, T* out, int64_t n,
                                const RowStatistics<T>& s) {
    using A = Acc<T>;
    const A scale = s.scale, mean = s.mean, delta = s.delta, rstd = s.rstd;
    sweep<A>(n, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        Vec<A> v = (load<T>(x + i, lanes) * scale - mean - delta) * rstd;
        if (gain != nullptr) v *= load<A>(gain + i, lanes);
        if (bias != nullptr) v += load<A>(bias + i, lanes);
        store<T>(out + i, v, lanes);
    });
}

template <class T>
void forward_row(const RowsForward& a, int64_t r, int threads) {
    using A = Acc<T>;
    const T* x = row_of<T>(a.x, r);
    const T* residual = a.residual.data != nullptr ? row_of<T>(a.residual, r) : nullptr;
    T* total = residual != nullptr ? static_cast<T*>(a.total) + r * a.size : nullptr;
    const T* stored = residual != nullptr ? total : x;
    RowStatistics<T> s = row_statistics<T>(a, x, residual, total, 1, threads);
    if (__builtin_expect(!finite(s.var), 0)) {
        const double scale = rescue_scale<T>(stored, a.size);
        if (scale != 1) s = rescued_statistics<T>(a, stored, scale, threads);
    }
    const A *gain = static_cast<const A*>(a.gain), *bias = static_cast<const A*>(a.bias);
    T* out = static_cast<T*>(a.out) + r * a.size;
    for_blocks(a.size, threads, [&](int64_t start, int64_t n) {
        affine_block<T>(stored + start, gain ? gain + start : nullptr, bias ? bias + start : nullptr, out + start, n,
                        s);
    });
    if (a.mean != nullptr) static_cast<A*>(a.mean)[r] = A(s.saved_mean);
    static_cast<A*>(a.rstd)[r] = A(s.saved_rstd);
}

template <class T>
void rows_forward(const RowsForward& a, int64_t first, int64_t last, int threads) {
    for (int64_t r = first; r < last; ++r) forward_row<T>(a, r, threads);
}

// --------------------------------------------------------------------------------------------- backward

// xhat = (total * factor - offset) * outer: (total - mean) * rstd, or total * rstd - mean * rstd for rows so wide that
// the difference could overflow.
template <class A>
struct Normalizer {
    A factor, offset, outer;
};

template <class A>
NORMKIT_INLINE Normalizer<A> normalizer(A mean, A rstd) {
    // A difference beyond kMax / 2 in a row of up to 2^48 elements means rstd < 2^25 / kMax.
    if (rstd < 0x1p25 / Types<A>::kMax) return {rstd, mean * rstd, 1};
    return {1, mean, rstd};
}

// Sums of g = dout * gain and of g * xhat; adds dout * xhat to dweight and dout to dbias.
template <class T>
NORMKIT_BLOCK Sums gradient_block(const T* dout, const T* total, const Acc<T>* gain, Acc<T>* dweight, Acc<T>* dbias,
                                  int64_t n, Normalizer<Acc<T>> h) {
    using A = Acc<T>;
    Vec<A> sum[4] = {}, product[4] = {};
    sweep<A>(n, [&](int64_t i, int k, auto lanes) NORMKIT_STEP {
        Vec<A> g = load<T>(dout + i, lanes);
        const Vec<A> xhat = (load<T>(total + i, lanes) * h.factor - h.offset) * h.outer;
        if (dweight != nullptr) store<A>(dweight + i, load<A>(dweight + i, lanes) + g * xhat, lanes);
        if (dbias != nullptr) store<A>(dbias + i, load<A>(dbias + i, lanes) + g, lanes);
        if (gain != nullptr) g *= load<A>(gain + i, lanes);
        sum[k] += g;
        product[k] += g * xhat;
    });
    return {add_lanes<A>(sum), add_lanes<A>(product)};
}

// dx = rstd * (g - mean_g - xhat * mean_g_xhat) + dtotal, rounded once.
template <class T>
NORMKIT_BLOCK void dx_block(const T* dout, const T* total, const T* dtotal, const Acc<T>* gain, T* dx, int64_t n,
                            Normalizer<Acc<T>> h, Acc<T> rstd, Acc<T> mean_g, Acc<T> mean_g_xhat) {
    using A = Acc<T>;
    sweep<A>(n, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        Vec<A> g = load<T>(dout + i, lanes);
        const Vec<A> xhat = (load<T>(total + i, lanes) * h.factor - h.offset) * h.outer;
        if (gain != nullptr) g *= load<A>(gain + i, lanes);
        Vec<A> v = (g - mean_g - xhat * mean_g_xhat) * rstd;
        if (dtotal != nullptr) v += load<T>(dtotal + i, lanes);
        store<T>(dx + i, v, lanes);
    });
}

template <class T>
void backward_row(const RowsBackward& a, int64_t r, Acc<T>* dweight, Acc<T>* dbias, int threads) {
    using A = Acc<T>;
    const T *dout = row_of<T>(a.dout, r), *total = row_of<T>(a.total, r);
    const T* dtotal = a.dtotal.data != nullptr ? row_of<T>(a.dtotal, r) : nullptr;
    const A* gain = a.dx != nullptr ? static_cast<const A*>(a.gain) : nullptr;
    const A mean = a.mean != nullptr ? static_cast<const A*>(a.mean)[r] : A(0);
    const A rstd = static_cast<const A*>(a.rstd)[r];
    const Normalizer<A> h = normalizer<A>(mean, rstd);
    const Sums sums = sum_blocks(a.size, threads, a.partials, [&](int64_t start, int64_t n) {
        return gradient_block<T>(dout + start, total + start, gain ? gain + start : nullptr,
                                 dweight ? dweight + start : nullptr, dbias ? dbias + start : nullptr, n, h);
    });
    if (a.dx == nullptr) return;
    const A mean_g = a.mean != nullptr ? A(sums.first / double(a.size)) : A(0);
    const A mean_g_xhat = A(sums.second / double(a.size));
    T* dx = static_cast<T*>(a.dx) + r * a.size;
    for_blocks(a.size, threads, [&](int64_t start, int64_t n) {
        dx_block<T>(dout + start, total + start, dtotal ? dtotal + start : nullptr, gain ? gain + start : nullptr,
                    dx + start, n, h, rstd, mean_g, mean_g_xhat);
    });
}

// Row blocks first..last; each sums its rows, in their order, into its own line of dweight and dbias.
template <class T>
void rows_backward(const RowsBackward& a, int64_t first, int64_t last, int threads) {
    using A = Acc<T>;
    for (int64_t block = first; block < last; ++block) {
        A* dweight = a.dweight != nullptr ? static_cast<A*>(a.dweight) + block * a.size : nullptr;
        A* dbias = a.dbias != nullptr ? static_cast<A*>(a.dbias) + block * a.size : nullptr;
        if (dweight != nullptr) memset(dweight, 0, size_t(a.size) * sizeof(A));
        if (dbias != nullptr) memset(dbias, 0, size_t(a.size) * sizeof(A));
        const int64_t end = (block + 1) * a.rows_per_block < a.rows ? (block + 1) * a.rows_per_block : a.rows;
        for (int64_t r = block * a.rows_per_block; r < end; ++r) backward_row<T>(a, r, dweight, dbias, threads);
    }
}

// The sum of all lines, in their order, in double; columns first..last.
template <class A>
void sum_lines(const LineSum& a, int64_t first, int64_t last) {
    constexpr int64_t kColumns = 256;
    for (int64_t start = first; start < last; start += kColumns) {
        double sums[kColumns] = {};
        const int64_t n = last - start < kColumns ? last - start : kColumns;
        const A* line = static_cast<const A*>(a.lines) + start;
        for (int64_t k = 0; k < a.count; ++k, line += a.size)
            for (int64_t i = 0; i < n; ++i) sums[i] += double(line[i]);
        for (int64_t i = 0; i < n; ++i) static_cast<A*>(a.out)[start + i] = A(sums[i]);
    }
}

// weight + offset in the accumulation dtype.
template <class T>
void widen(const void* source, double offset, void* target, int64_t n) {
    using A = Acc<T>;
    sweep<A>(n, [&](int64_t i, int, auto lanes) NORMKIT_STEP {
        const Vec<A> v = load<T>(static_cast<const T*>(source) + i, lanes) + A(offset);
        store<A>(static_cast<A*>(target) + i, v, lanes);
    });
}

}  // namespace normkit::NORMKIT_ISA
