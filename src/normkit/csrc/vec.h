// Vectors of the native width, conversion between storage and accumulation dtypes, and the tail of a line.
// May include: C headers and, for float16, the compiler's intrinsics. Compiled once per instruction set: everything
// lives in a namespace of that name, and no std template is used, so that AVX-512 code can never be linked into the
// baseline path under a shared symbol.
// Read next: steps.h.
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

using Bits = Types<float>::Unsigned;
using Half = Types<float>::Half;  // what lies in memory for one vector of a half type

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
NORMKIT_INLINE Half pack(Vec<float> v, bfloat16) { return round_to_bfloat16(v); }

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

// ------------------------------------------------------------------------------------- a multiplication and an
// addition

// a * b + c, rounded once where the instruction set can. Nothing else is fused (-ffp-contract=off): the compiler would
// fuse or not as the code around happens to be cut, and with AVX2 a row of 37 floats alone had other bits than in a
// pair.
#if defined(__AVX512F__)
NORMKIT_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
NORMKIT_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__) && defined(__FMA__)
NORMKIT_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
NORMKIT_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
template <class V>
NORMKIT_INLINE V fused(V a, V b, V c) {
    return a * b + c;
}
#endif

// --------------------------------------------------------------------------------------------- the tail
// A step of a sweep gets `Full`, or at the end of the line `Partial` with fewer lanes than a vector has. Absent lanes
// read 0 and are not written. AVX-512 has masks for that, which took a row of 17 floats from 150 to 60 ns.

struct Full {
    static constexpr bool kAll = true;
};
struct Partial {
    static constexpr bool kAll = false;
    int n;
};

#if defined(__AVX512F__)
NORMKIT_INLINE unsigned bits_of(Partial lanes) { return unsigned((uint64_t(1) << lanes.n) - 1); }

NORMKIT_INLINE Vec<float> read(const float* p, Partial lanes) {
    return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16(bits_of(lanes)), p);
}
NORMKIT_INLINE Vec<double> read(const double* p, Partial lanes) {
    return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8(bits_of(lanes)), p);
}
NORMKIT_INLINE void write(float* p, Vec<float> v, Partial lanes) {
    _mm512_mask_storeu_ps(p, __mmask16(bits_of(lanes)), (__m512)v);
}
NORMKIT_INLINE void write(double* p, Vec<double> v, Partial lanes) {
    _mm512_mask_storeu_pd(p, __mmask8(bits_of(lanes)), (__m512d)v);
}
NORMKIT_INLINE Vec<float> keep(Vec<float> v, Partial lanes) {
    return (Vec<float>)_mm512_maskz_mov_ps(__mmask16(bits_of(lanes)), (__m512)v);
}
NORMKIT_INLINE Vec<double> keep(Vec<double> v, Partial lanes) {
    return (Vec<double>)_mm512_maskz_mov_pd(__mmask8(bits_of(lanes)), (__m512d)v);
}
#else
template <class V, class T>
NORMKIT_INLINE V read_partial(const T* p, Partial lanes) {
    T padded[sizeof(V) / sizeof(T)] = {};
    for (int i = 0; i < lanes.n; ++i) padded[i] = p[i];
    V v;
    memcpy(&v, padded, sizeof v);
    return v;
}
template <class V, class T>
NORMKIT_INLINE void write_partial(T* p, V v, Partial lanes) {
    T padded[sizeof(V) / sizeof(T)];
    memcpy(padded, &v, sizeof v);
    for (int i = 0; i < lanes.n; ++i) p[i] = padded[i];
}
NORMKIT_INLINE Vec<float> read(const float* p, Partial lanes) { return read_partial<Vec<float>>(p, lanes); }
NORMKIT_INLINE Vec<double> read(const double* p, Partial lanes) { return read_partial<Vec<double>>(p, lanes); }
NORMKIT_INLINE void write(float* p, Vec<float> v, Partial lanes) { write_partial(p, v, lanes); }
NORMKIT_INLINE void write(double* p, Vec<double> v, Partial lanes) { write_partial(p, v, lanes); }
template <class A>
NORMKIT_INLINE typename Types<A>::Vector keep_lanes(typename Types<A>::Vector v, Partial lanes) {
    typename Types<A>::Signed present;
    for (int i = 0; i < kLanes<A>; ++i) present[i] = i < lanes.n ? -1 : 0;
    return present ? v : Vec<A>{};
}
NORMKIT_INLINE Vec<float> keep(Vec<float> v, Partial lanes) { return keep_lanes<float>(v, lanes); }
NORMKIT_INLINE Vec<double> keep(Vec<double> v, Partial lanes) { return keep_lanes<double>(v, lanes); }
#endif
template <class V>
NORMKIT_INLINE V keep(V v, Full) {
    return v;
}
template <class V, class T>
NORMKIT_INLINE V read_full(const T* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
NORMKIT_INLINE Vec<float> read(const float* p, Full) { return read_full<Vec<float>>(p); }
NORMKIT_INLINE Vec<double> read(const double* p, Full) { return read_full<Vec<double>>(p); }
template <class V, class T>
NORMKIT_INLINE void write(T* p, V v, Full) {
    memcpy(p, &v, sizeof v);
}

}  // namespace normkit::NORMKIT_ISA
