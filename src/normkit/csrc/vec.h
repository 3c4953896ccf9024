// Vectors of the native width, conversion between storage and accumulation dtypes, and the one place for the tail.
// May include: C headers and, for float16, the compiler's intrinsics. Compiled once per instruction set: everything
// lives in a namespace of that name, and no std template is used, so that AVX-512 code can never be linked into the
// baseline path under a shared symbol.
// Read next: rows.h.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef NORMKIT_ISA
#error "vec.h: compile with -DNORMKIT_ISA=<name>; see CMakeLists.txt"
#endif

#define NORMKIT_INLINE inline __attribute__((always_inline))
#define NORMKIT_STEP __attribute__((always_inline))  // on lambdas: a loop body must not become a call
// One copy of a block's machine code, whoever calls it: the same bits whether threads share a row or not.
#define NORMKIT_BLOCK __attribute__((noinline))

namespace normkit::NORMKIT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class A>
struct Types;  // of an accumulation dtype: the vector, integers of the same lanes
template <>
struct Types<float> {
    typedef float Vector __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));
    typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    using Lane = int32_t;
    static constexpr float kMax = __FLT_MAX__;
};
template <>
struct Types<double> {
    typedef double Vector __attribute__((vector_size(kVectorBytes)));
    typedef int64_t Signed __attribute__((vector_size(kVectorBytes)));
    using Lane = int64_t;
    static constexpr double kMax = __DBL_MAX__;
};

template <class A>
using Vec = typename Types<A>::Vector;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class T>
struct AccumulationOf {
    using type = float;
};
template <>
struct AccumulationOf<double> {
    using type = double;
};
template <class T>
using Acc = typename AccumulationOf<T>::type;

// ------------------------------------------------------------------------------- storage dtype <-> vector
// `Packed<T>` is what lies in memory for one vector of T.

template <class T>
struct PackedOf {
    using type = Types<float>::Half;
};
template <>
struct PackedOf<float> {
    using type = Vec<float>;
};
template <>
struct PackedOf<double> {
    using type = Vec<double>;
};
template <class T>
using Packed = typename PackedOf<T>::type;

using Bits = Types<float>::Unsigned;
using Half = Types<float>::Half;

NORMKIT_INLINE Vec<float> unpack(Vec<float> v, float) { return v; }
NORMKIT_INLINE Vec<double> unpack(Vec<double> v, double) { return v; }
NORMKIT_INLINE Vec<float> pack(Vec<float> v, float) { return v; }
NORMKIT_INLINE Vec<double> pack(Vec<double> v, double) { return v; }

// GCC makes four instructions of __builtin_convertvector where the processor has one. The masked forms: GCC 12's
// headers give false warnings about the plain ones, and the instruction is the same.
#if defined(__AVX512F__)
NORMKIT_INLINE Bits zero_extend(Half raw) { return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)raw); }
NORMKIT_INLINE Half truncate(Bits bits) { return (Half)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits); }
#else
NORMKIT_INLINE Half truncate(Bits bits) { return __builtin_convertvector(bits, Half); }
#if defined(__AVX2__)
NORMKIT_INLINE Bits zero_extend(Half raw) { return (Bits)_mm256_cvtepu16_epi32((__m128i)raw); }
#else
NORMKIT_INLINE Bits zero_extend(Half raw) { return __builtin_convertvector(raw, Bits); }
#endif
#endif

NORMKIT_INLINE Vec<float> unpack(Half raw, bfloat16) { return (Vec<float>)(zero_extend(raw) << 16); }

// Round to nearest even by integer arithmetic.
NORMKIT_INLINE Half round_to_bfloat16(Vec<float> v) {
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return truncate(v == v ? rounded : (bits >> 16) | 0x40);
}
#if defined(__AVX512BF16__)
// The processor's own conversion gives the same bits, but takes denormals for zero: those are asked for first.
NORMKIT_INLINE Half pack(Vec<float> v, bfloat16) {
    constexpr int kDenormal = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, kDenormal) != 0, 0)) return round_to_bfloat16(v);
    return (Half)_mm512_cvtneps_pbh((__m512)v);
}
#else
NORMKIT_INLINE Half pack(Vec<float> v, bfloat16) { return round_to_bfloat16(v); }
#endif

#if defined(__AVX512F__)
NORMKIT_INLINE Vec<float> unpack(Half raw, float16) { return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)raw); }
NORMKIT_INLINE Half pack(Vec<float> v, float16) {
    return (Half)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__) && defined(__F16C__)
NORMKIT_INLINE Vec<float> unpack(Half raw, float16) { return (Vec<float>)_mm256_cvtph_ps((__m128i)raw); }
NORMKIT_INLINE Half pack(Vec<float> v, float16) {
    return (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// A float16's exponent and mantissa, moved into a float's places, read 2^112 too small, denormals included.
NORMKIT_INLINE Vec<float> unpack(Half raw, float16) {
    const Bits half = zero_extend(raw);
    const Bits magnitude = half & 0x7fff;
    const Bits finite = (Bits)((Vec<float>)(magnitude << 13) * 0x1p112f);
    const Bits special = (magnitude << 13) | 0x7f800000;  // inf and NaN
    return (Vec<float>)((magnitude >= 0x7c00 ? special : finite) | ((half & 0x8000) << 16));
}
NORMKIT_INLINE Half pack(Vec<float> v, float16) {
    const Bits bits = (Bits)v, magnitude = bits & 0x7fffffff;
    // Normal numbers: subtract 112 from the exponent and round to nearest even; 65520 and up carry into infinity.
    const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14: adding 0.5 lets the float unit round at 2^-24, a float16's last denormal bit.
    const Bits denormal = (Bits)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
    const Bits nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
    Bits out = magnitude < 0x38800000u ? denormal : normal;
    out = magnitude >= 0x47800000u ? out * 0 + 0x7c00 : out;
    out = v == v ? out : nan;
    return truncate(out | ((bits >> 16) & 0x8000));
}
#endif

// --------------------------------------------------------------------------------------------- the tail
// A step of a sweep gets `Full`, or at the end of the line `Partial` with fewer lanes than a vector has. Absent lanes
// read 0 and are not written. AVX-512 has masks for that, which took a row of 17 floats from 150 to 60 ns.

struct Full {};
struct Partial {
    int n;
};

template <class T>
NORMKIT_INLINE Packed<T> read(const T* p, Full) {
    Packed<T> raw;
    memcpy(&raw, p, sizeof raw);
    return raw;
}
template <class T>
NORMKIT_INLINE void write(T* p, Packed<T> raw, Full) {
    memcpy(p, &raw, sizeof raw);
}

#if defined(__AVX512F__)
NORMKIT_INLINE unsigned bits_of(Partial lanes) { return (1u << lanes.n) - 1; }

template <class T>
NORMKIT_INLINE Packed<T> read(const T* p, Partial lanes) {
    if constexpr (sizeof(T) == 2) return (Packed<T>)_mm256_maskz_loadu_epi16(__mmask16(bits_of(lanes)), p);
    if constexpr (sizeof(T) == 4) return (Packed<T>)_mm512_maskz_loadu_ps(__mmask16(bits_of(lanes)), p);
    if constexpr (sizeof(T) == 8) return (Packed<T>)_mm512_maskz_loadu_pd(__mmask8(bits_of(lanes)), p);
}
template <class T>
NORMKIT_INLINE void write(T* p, Packed<T> raw, Partial lanes) {
    if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, __mmask16(bits_of(lanes)), (__m256i)raw);
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16(bits_of(lanes)), (__m512)raw);
    if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, __mmask8(bits_of(lanes)), (__m512d)raw);
}
template <class A>
NORMKIT_INLINE Vec<A> keep(Vec<A> v, Partial lanes) {
    if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_maskz_mov_ps(__mmask16(bits_of(lanes)), (__m512)v);
    if constexpr (sizeof(A) == 8) return (Vec<A>)_mm512_maskz_mov_pd(__mmask8(bits_of(lanes)), (__m512d)v);
}
#else
template <class T>
NORMKIT_INLINE Packed<T> read(const T* p, Partial lanes) {
    T padded[kLanes<Acc<T>>] = {};
    for (int i = 0; i < lanes.n; ++i) padded[i] = p[i];
    return read<T>(padded, Full{});
}
template <class T>
NORMKIT_INLINE void write(T* p, Packed<T> raw, Partial lanes) {
    T padded[kLanes<Acc<T>>];
    write<T>(padded, raw, Full{});
    for (int i = 0; i < lanes.n; ++i) p[i] = padded[i];
}
template <class A>
NORMKIT_INLINE Vec<A> keep(Vec<A> v, Partial lanes) {
    typename Types<A>::Signed present;
    for (int i = 0; i < kLanes<A>; ++i) present[i] = i < lanes.n ? -1 : 0;
    return present ? v : Vec<A>{};
}
#endif
template <class A>
NORMKIT_INLINE Vec<A> keep(Vec<A> v, Full) {
    return v;
}

template <class T, class Lanes>
NORMKIT_INLINE Vec<Acc<T>> load(const T* p, Lanes lanes) {
    return unpack(read<T>(p, lanes), T{});
}
template <class T, class Lanes>
NORMKIT_INLINE void store(T* p, Vec<Acc<T>> v, Lanes lanes) {
    write<T>(p, pack(v, T{}), lanes);
}

NORMKIT_INLINE int lane_count(Partial lanes, int) { return lanes.n; }
NORMKIT_INLINE int lane_count(Full, int all) { return all; }

template <class A, class Lanes>
NORMKIT_INLINE Vec<A> where_valid(const uint8_t* mask, Vec<A> v, Lanes lanes) {  // 0 elsewhere, whatever stood there
    typename Types<A>::Lane valid[kLanes<A>] = {};
    for (int i = 0, n = lane_count(lanes, kLanes<A>); i < n; ++i) valid[i] = mask[i] ? -1 : 0;
    typename Types<A>::Signed chosen;
    memcpy(&chosen, valid, sizeof chosen);
    return chosen ? v : Vec<A>{};
}

// As store, but past the caches if kStream: the line is not read first, which a copy of 64 MiB showed to be 0.74 of the
// time, and does not displace others. Not for half types: a vector of them is half a line, and filling lines by halves
// took 1.5 times as long as not streaming; see stream_copy. p must be aligned to the vector; end_stream() orders what
// was written so.
template <bool kStream, class T, class Lanes>
NORMKIT_INLINE void store_out(T* p, Vec<Acc<T>> v, Lanes lanes) {
    store<T>(p, v, lanes);
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
template <bool kStream, class T>
NORMKIT_INLINE void store_out(T* p, Vec<Acc<T>> v, Full lanes) {
    if constexpr (kStream && sizeof(T) == sizeof(Acc<T>)) {
        write_past(p, (Vec<float>)v);
    } else {
        store<T>(p, v, lanes);
    }
}
NORMKIT_INLINE void end_stream() { _mm_sfence(); }
#else
NORMKIT_INLINE void write_past(void* p, Vec<float> v) { memcpy(p, &v, sizeof v); }
NORMKIT_INLINE void end_stream() {}
#endif

// Copies n elements past the caches, whole vectors of bytes to a target that is aligned to them.
template <class T>
NORMKIT_INLINE void stream_copy(const T* source, T* target, int64_t n) {
    for (int64_t i = 0; i < n; i += kVectorBytes / int64_t(sizeof(T))) {
        Vec<float> v;
        memcpy(&v, source + i, sizeof v);
        write_past(target + i, v);
    }
}

// Ask for the line at p + i, once per line, in step k of a sweep. No fault where there is no memory.
template <class T>
NORMKIT_INLINE void prefetch(const T* p, int64_t i, int k) {
    if (sizeof(T) == sizeof(Acc<T>) || k % 2 == 0) __builtin_prefetch(p + i, 0, 2);
}

// step(index, accumulator 0..3, lanes) over n elements; four accumulators hide the latency of an addition.
template <class A, class Step>
NORMKIT_INLINE void sweep(int64_t n, const Step& step) {
    constexpr int kWidth = kLanes<A>;
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
        step(i, 0, Full{});
        step(i + kWidth, 1, Full{});
        step(i + 2 * kWidth, 2, Full{});
        step(i + 3 * kWidth, 3, Full{});
    }
    for (; i + kWidth <= n; i += kWidth) step(i, 0, Full{});
    if (i < n) step(i, 0, Partial{int(n - i)});
}

// ---------------------------------------------------------------------------------------------- helpers

template <class A>
NORMKIT_INLINE Vec<A> splat(A value) {
    return value - Vec<A>{};
}

// The product as a value of its own, not as a part of a fused multiply-add: what cancels with it later was rounded too.
template <class V>
NORMKIT_INLINE V product(V a, V b) {
    V p = a * b;
#if defined(__AVX512F__)
    asm("" : "+v"(p));
#elif defined(__SSE2__)
    asm("" : "+x"(p));
#elif defined(__aarch64__)
    asm("" : "+w"(p));
#endif
    return p;
}

template <class T>
NORMKIT_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {  // as it will be read back from storage
    return unpack(pack(v, T{}), T{});
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
template <class A>
NORMKIT_INLINE double add_lanes(const Vec<A> (&v)[4]) {
    return double(add_halves<A, kVectorBytes>((v[0] + v[1]) + (v[2] + v[3])));
}
template <class A>
NORMKIT_INLINE double add_lanes(const Vec<A> (&v)[2]) {
    return double(add_halves<A, kVectorBytes>(v[0] + v[1]));
}

template <class T>
NORMKIT_INLINE Acc<T> scalar(const T* p) {
    return load<T>(p, Partial{1})[0];
}

template <class A>
NORMKIT_INLINE bool finite(A value) {
    return value - value == 0;
}

}  // namespace normkit::NORMKIT_ISA
