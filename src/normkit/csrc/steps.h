// Steps along a line: what one takes at once, how it is loaded and stored, stores past the caches, sums of lanes, and
// the choice of a variant. May include: vec.h. Compiled once per instruction set.
// Read next: rows.h.
#pragma once

#include "vec.h"

namespace normkit::NORMKIT_ISA {

// `Wide<T>`: the elements that a step takes at once from storage of T, in the accumulation dtype. A vector; of a half
// type two, whose storage fills a vector as well: with AVX-512 a whole line of memory is loaded, rounded and stored at
// once. That took bfloat16 layer_norm of (2048, 768) from 155 to 129 us, its backward from 313 to 211.

struct Two {
    Vec<float> low, high;
};
// What stands beside a Two serves both halves if it is a vector or a number.
NORMKIT_INLINE Two both(Two v) { return v; }
NORMKIT_INLINE Two both(Vec<float> v) { return {v, v}; }
NORMKIT_INLINE Two both(float v) { return both(v - Vec<float>{}); }
template <class V>
NORMKIT_INLINE Two operator+(Two a, V b) {
    return {a.low + both(b).low, a.high + both(b).high};
}
template <class V>
NORMKIT_INLINE Two operator-(Two a, V b) {
    return {a.low - both(b).low, a.high - both(b).high};
}
template <class V>
NORMKIT_INLINE Two operator*(Two a, V b) {
    return {a.low * both(b).low, a.high * both(b).high};
}
template <class V>
NORMKIT_INLINE void operator+=(Two& a, V b) {
    a = a + b;
}
template <class V>
NORMKIT_INLINE void operator-=(Two& a, V b) {
    a = a - b;
}
template <class V>
NORMKIT_INLINE void operator*=(Two& a, V b) {
    a = a * b;
}

template <class T>
struct WideOf {
    using type = Two;
};
template <>
struct WideOf<float> {
    using type = Vec<float>;
};
template <>
struct WideOf<double> {
    using type = Vec<double>;
};
template <class T>
using Wide = typename WideOf<T>::type;
template <class T>
constexpr int kStep = int(sizeof(Wide<T>) / sizeof(Acc<T>));  // elements
template <class T>
constexpr bool kHalf = sizeof(T) < sizeof(Acc<T>);

NORMKIT_INLINE Full low_of(Full all) { return all; }
NORMKIT_INLINE Full high_of(Full all) { return all; }
NORMKIT_INLINE Partial low_of(Partial lanes) { return {lanes.n < kLanes<float> ? lanes.n : kLanes<float>}; }
NORMKIT_INLINE Partial high_of(Partial lanes) { return {lanes.n < kLanes<float> ? 0 : lanes.n - kLanes<float>}; }
NORMKIT_INLINE Two keep(Two v, Partial lanes) { return {keep(v.low, low_of(lanes)), keep(v.high, high_of(lanes))}; }

// A vector of a half type in memory.
typedef uint16_t Line __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512F__)
NORMKIT_INLINE Line read_line(const void* p, Partial lanes) {
    return (Line)_mm512_maskz_loadu_epi16(bits_of(lanes), p);
}
NORMKIT_INLINE void write_line(void* p, Line line, Partial lanes) {
    _mm512_mask_storeu_epi16(p, bits_of(lanes), (__m512i)line);
}
#else
NORMKIT_INLINE Line read_line(const void* p, Partial lanes) {
    return read_partial<Line>(static_cast<const uint16_t*>(p), lanes);
}
NORMKIT_INLINE void write_line(void* p, Line line, Partial lanes) {
    write_partial(static_cast<uint16_t*>(p), line, lanes);
}
#endif
NORMKIT_INLINE Line read_line(const void* p, Full) { return read_full<Line>(p); }
NORMKIT_INLINE void write_line(void* p, Line line, Full) { memcpy(p, &line, sizeof line); }

NORMKIT_INLINE Half half_of(Line line, int which) {
    return read_full<Half>(reinterpret_cast<const char*>(&line) + which * int(sizeof(Half)));
}
NORMKIT_INLINE Line line_of(Half low, Half high) {
    const Half halves[2] = {low, high};
    return read_full<Line>(halves);
}
template <class T>
NORMKIT_INLINE Two unpack_line(Line line, T type) {
    return {unpack(half_of(line, 0), type), unpack(half_of(line, 1), type)};
}
template <class T>
NORMKIT_INLINE Line pack_line(Two v, T type) {
    return line_of(pack(v.low, type), pack(v.high, type));
}
// Whether a line is converted as a whole; else its halves are loaded and stored one by one.
template <class T>
constexpr bool kByLine = false;
#if defined(__AVX512BW__)
template <>
constexpr bool kByLine<bfloat16> = true;
// Word k, or 16 + k, into the upper half of lane k, zeros below: one permutation, where widening and shifting are two.
NORMKIT_INLINE Two unpack_line(Line line, bfloat16) {
    constexpr Line kLow = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                           0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    constexpr __mmask32 kUpper = 0xaaaaaaaa;
    return {(Vec<float>)_mm512_maskz_permutexvar_epi16(kUpper, (__m512i)kLow, (__m512i)line),
            (Vec<float>)_mm512_maskz_permutexvar_epi16(kUpper, (__m512i)(kLow + 16), (__m512i)line)};
}
#endif
#if defined(__AVX512BF16__)
// The processor's own conversion gives the same bits, but takes denormals for zero: those are asked for first.
NORMKIT_INLINE Line pack_line(Two v, bfloat16 type) {
    constexpr int kDenormal = 0x20;
    const __mmask16 low = _mm512_fpclass_ps_mask((__m512)v.low, kDenormal);
    const __mmask16 high = _mm512_fpclass_ps_mask((__m512)v.high, kDenormal);
    if (__builtin_expect(!_kortestz_mask16_u8(low, high), 0)) return line_of(pack(v.low, type), pack(v.high, type));
    return (Line)_mm512_cvtne2ps_pbh((__m512)v.high, (__m512)v.low);
}
#endif

// load<T>, store<T>: rows of T. load_wide<T>, store_wide<T>: numbers beside them, in T's accumulation dtype.
template <class T, class Lanes>
NORMKIT_INLINE Wide<T> load_wide(const Acc<T>* p, Lanes lanes) {
    if constexpr (kHalf<T>) {
        return {read(p, low_of(lanes)), read(p + kLanes<float>, high_of(lanes))};
    } else {
        return read(p, lanes);
    }
}
template <class T, class Lanes>
NORMKIT_INLINE void store_wide(Acc<T>* p, Wide<T> v, Lanes lanes) {
    if constexpr (kHalf<T>) {
        write(p, v.low, low_of(lanes));
        write(p + kLanes<float>, v.high, high_of(lanes));
    } else {
        write(p, v, lanes);
    }
}
template <class T, class Lanes>
NORMKIT_INLINE Wide<T> load(const T* p, Lanes lanes) {
    if constexpr (kHalf<T> && Lanes::kAll && !kByLine<T>) {
        return {unpack(read_full<Half>(p), T{}), unpack(read_full<Half>(p + kLanes<float>), T{})};
    } else if constexpr (kHalf<T>) {
        return unpack_line(read_line(p, lanes), T{});
    } else {
        return read(p, lanes);
    }
}
template <class T, class Lanes>
NORMKIT_INLINE void store(T* p, Wide<T> v, Lanes lanes) {
    if constexpr (kHalf<T> && Lanes::kAll && !kByLine<T>) {
        write(p, pack(v.low, T{}), lanes);
        write(p + kLanes<float>, pack(v.high, T{}), lanes);
    } else if constexpr (kHalf<T>) {
        write_line(p, pack_line(v, T{}), lanes);
    } else {
        write(p, v, lanes);
    }
}

NORMKIT_INLINE int lane_count(Partial lanes, int) { return lanes.n; }
NORMKIT_INLINE int lane_count(Full, int all) { return all; }

template <class A, class Lanes>
NORMKIT_INLINE Vec<A> where_lanes_valid(const uint8_t* mask, Vec<A> v, Lanes lanes) {
    typename Types<A>::Lane valid[kLanes<A>] = {};
    for (int i = 0, n = lane_count(lanes, kLanes<A>); i < n; ++i) valid[i] = mask[i] ? -1 : 0;
    typename Types<A>::Signed chosen;
    memcpy(&chosen, valid, sizeof chosen);
    return chosen ? v : Vec<A>{};
}
template <class T, class Lanes>
NORMKIT_INLINE Wide<T> where_valid(const uint8_t* mask, Wide<T> v, Lanes lanes) {  // 0 elsewhere, whatever stood there
    if constexpr (kHalf<T>) {
        return {where_lanes_valid<float>(mask, v.low, low_of(lanes)),
                where_lanes_valid<float>(mask + kLanes<float>, v.high, high_of(lanes))};
    } else {
        return where_lanes_valid<T>(mask, v, lanes);
    }
}

#if defined(__SSE2__)
NORMKIT_INLINE void write_past(void* p, Vec<float> v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#else
    _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#endif
}
NORMKIT_INLINE void end_stream() { _mm_sfence(); }
#else
NORMKIT_INLINE void write_past(void* p, Vec<float> v) { memcpy(p, &v, sizeof v); }
NORMKIT_INLINE void end_stream() {}
#endif

// As store, but past the caches if kStream: the line is not read first, which a copy of 64 MiB showed to be 0.74 of the
// time, and does not displace others. p must be aligned to the vector; end_stream() orders what was written so.
template <bool kStream, class T, class Lanes>
NORMKIT_INLINE void store_out(T* p, Wide<T> v, Lanes lanes) {
    if constexpr (!kStream || !Lanes::kAll) {
        store<T>(p, v, lanes);
    } else if constexpr (kHalf<T>) {
        write_past(p, (Vec<float>)pack_line(v, T{}));
    } else {
        write_past(p, (Vec<float>)v);
    }
}

// Ask for the line at p + i. No fault where there is no memory.
template <class T>
NORMKIT_INLINE void prefetch(const T* p, int64_t i) {
    __builtin_prefetch(p + i, 0, 2);
}

// step(index, accumulator 0..3, lanes) over n elements beside rows of T; four accumulators hide an addition's latency.
template <class T, class Step>
NORMKIT_INLINE void sweep(int64_t n, const Step& step) {
    constexpr int kWidth = kStep<T>;
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
        step(i, 0, Full{});
        step(i + kWidth, 1, Full{});
        step(i + 2 * kWidth, 2, Full{});
        step(i + 3 * kWidth, 3, Full{});
    }
    if (i + 2 * kWidth <= n) {
        step(i, 0, Full{});
        step(i + kWidth, 1, Full{});
        i += 2 * kWidth;
    }
    if (i + kWidth <= n) {
        step(i, 2, Full{});
        i += kWidth;
    }
    if (i < n) step(i, 3, Partial{int(n - i)});
}

// ---------------------------------------------------------------------------------------------- helpers

template <class A>
NORMKIT_INLINE Vec<A> splat(A value) {
    return value - Vec<A>{};
}

template <class T>
NORMKIT_INLINE Wide<T> splat_wide(Acc<T> value) {
    if constexpr (kHalf<T>) {
        return both(value);
    } else {
        return splat<T>(value);
    }
}

NORMKIT_INLINE Two fused(Two a, Two b, Two c) { return {fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)}; }
// Beside rows of a half type, what serves both halves of a step.
NORMKIT_INLINE Two fused(Two a, Vec<float> b, Two c) { return fused(a, both(b), c); }
NORMKIT_INLINE Two fused(Two a, Vec<float> b, Vec<float> c) { return fused(a, both(b), both(c)); }

template <class T>
NORMKIT_INLINE Wide<T> rounded(Wide<T> v) {  // as it will be read back from storage
    if constexpr (kHalf<T>) {
        return unpack_line(pack_line(v, T{}), T{});
    } else {
        return v;
    }
}

template <class A, int kBytes>
struct VectorOf {
    typedef A type __attribute__((vector_size(kBytes)));
};
template <class A, int kBytes>
NORMKIT_INLINE A add_halves(typename VectorOf<A, kBytes>::type v) {
    if constexpr (kBytes == 2 * sizeof(A)) {
        return v[0] + v[1];
    } else {
        typename VectorOf<A, kBytes / 2>::type low, high;
        memcpy(&low, &v, sizeof low);
        memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return add_halves<A, kBytes / 2>(low + high);
    }
}
NORMKIT_INLINE double add_lanes(Vec<float> v) { return double(add_halves<float, kVectorBytes>(v)); }
NORMKIT_INLINE double add_lanes(Vec<double> v) { return add_halves<double, kVectorBytes>(v); }
NORMKIT_INLINE double add_lanes(Two v) { return add_lanes(v.low + v.high); }
template <class V>
NORMKIT_INLINE V add_chains(const V (&v)[4]) {
    return (v[0] + v[1]) + (v[2] + v[3]);
}
template <class V>
NORMKIT_INLINE V add_chains(const V (&v)[2]) {
    return v[0] + v[1];
}
template <class V>
NORMKIT_INLINE V add_chains(const V (&v)[1]) {
    return v[0];
}
template <class V, int kChains>
NORMKIT_INLINE double add_lanes(const V (&v)[kChains]) {
    return add_lanes(add_chains(v));
}

template <class T>
NORMKIT_INLINE Acc<T> scalar(const T* p) {
    Acc<T> value[kStep<T>];
    store_wide<T>(value, load<T>(p, Partial{1}), Full{});
    return value[0];
}

// add_lanes of some vectors: the same additions, so the same bits, and where a processor takes two vectors apart and
// puts them together at once, half the steps.
template <class V, int kCount>
NORMKIT_INLINE void add_lanes_of(const V (&v)[kCount], double* sums) {
    for (int i = 0; i < kCount; ++i) sums[i] = add_lanes(v[i]);
}
#if defined(__AVX512F__)
NORMKIT_INLINE void add_lanes_of(const Vec<float> (&v)[4], double* sums) {
    const auto eights = [](Vec<float> a, Vec<float> b) NORMKIT_STEP {  // lanes i + (i + 8): those of a, then of b
        return (Vec<float>)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)a, (__m512)b, 0x44) +
               (Vec<float>)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)a, (__m512)b, 0xee);
    };
    const Vec<float> ab = eights(v[0], v[1]), cd = eights(v[2], v[3]);
    // lanes i + (i + 4): a quarter of the vector for each of the four
    const Vec<float> abcd = (Vec<float>)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)ab, (__m512)cd, 0x88) +
                            (Vec<float>)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)ab, (__m512)cd, 0xdd);
    const Vec<float> twos = abcd + (Vec<float>)_mm512_maskz_shuffle_ps(0xffff, (__m512)abcd, (__m512)abcd, 0x4e);
    const Vec<float> ones = twos + (Vec<float>)_mm512_maskz_shuffle_ps(0xffff, (__m512)twos, (__m512)twos, 0xb1);
    for (int i = 0; i < 4; ++i) sums[i] = double(ones[4 * i]);
}
NORMKIT_INLINE void add_lanes_of(const Two (&v)[4], double* sums) {
    const Vec<float> both[4] = {v[0].low + v[0].high, v[1].low + v[1].high, v[2].low + v[2].high, v[3].low + v[3].high};
    add_lanes_of(both, sums);
}
#endif

template <class A>
NORMKIT_INLINE bool finite(A value) {
    return value - value == 0;
}

// ------------------------------------------------------------------------------------- from values to variants

template <bool kValue>
struct Flag {
    static constexpr bool value = kValue;
};
template <int kValue>
struct Number {
    static constexpr int value = kValue;
};
// call(Flag...) for the values of some conditions.
template <class Call>
void choose(const Call& call) {
    call();
}
template <class Call, class... Conditions>
void choose(const Call& call, bool condition, Conditions... rest) {
    if (condition) {
        choose([&](auto... flags) { call(Flag<true>{}, flags...); }, rest...);
    } else {
        choose([&](auto... flags) { call(Flag<false>{}, flags...); }, rest...);
    }
}

}  // namespace normkit::NORMKIT_ISA
