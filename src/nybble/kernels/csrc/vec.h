// One vocabulary of fp32 vectors for every instruction set, so that most kernels are written once.
//
// F32 and I32 are compiler vector types of kLanes lanes (16 with AVX-512, else 8): + - * /, comparisons and the
// ternary operator work on them lane by lane. What those cannot say is a function below. Loads and stores take any
// alignment; with a count they touch only the first `count` elements and fill the other lanes with zero.
// Nothing contracts a * b + c into a fused operation by itself (-ffp-contract=off): `fma` does, where the set has it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// What the C ABI calls an element type; backends/cpp/library.py holds the same numbers.
enum NybbleDtype : int { NYBBLE_F32 = 0, NYBBLE_BF16 = 1, NYBBLE_F16 = 2 };

// RUN(T, W) with the types that two dtypes mean, each fp32 or bf16.
#define NYBBLE_OF_TWO_TYPES(dtype, other, RUN)                                  \
    if ((dtype) == NYBBLE_F32 && (other) == NYBBLE_F32) RUN(float, float);      \
    if ((dtype) == NYBBLE_F32 && (other) == NYBBLE_BF16) RUN(float, bf16);      \
    if ((dtype) == NYBBLE_BF16 && (other) == NYBBLE_F32) RUN(bf16, float);      \
    if ((dtype) == NYBBLE_BF16 && (other) == NYBBLE_BF16) RUN(bf16, bf16);

namespace nybble::NYBBLE_ISA {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes), aligned(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes), aligned(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes), aligned(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes), aligned(2 * kLanes)));

inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

inline F32 splat(float x) { return F32{} + x; }
inline I32 splat(int32_t x) { return I32{} + x; }

// ---- scalars -------------------------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
    if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);  // infinity, NaN
    if (magnitude < 0x400u) {                                                                      // subnormal
        const float value = float(magnitude) * 0x1p-24f;
        return sign ? -value : value;
    }
    return float_of(sign | ((magnitude << 13) + 0x38000000u));
}

// Round to nearest, ties to even; NaN stays NaN; subnormals are kept.
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
    const uint32_t u = bits_of(x);
    out->bits = x != x ? 0x7FC0u : uint16_t((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
inline void from_float(float x, fp16* out) {
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
        half = 0x7E00u;
    } else if (magnitude >= 0x477FF000u) {  // 65520 and more round to infinity
        half = 0x7C00u;
    } else if (magnitude < 0x38800000u) {   // below the least normal: let an addition of 0.5 do the rounding
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    }
    out->bits = uint16_t(sign | half);
}

// ---- load ----------------------------------------------------------------------------------------------------------

inline F32 load(const float* p) { F32 v; memcpy(&v, p, sizeof v); return v; }

inline F32 load(const bf16* p) {
#if defined(__AVX512F__)
    return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (F32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    U16 half;
    memcpy(&half, p, sizeof half);
    return (F32)(__builtin_convertvector(half, U32) << 16);
#endif
}

inline F32 load(const fp16* p) {
#if defined(__AVX512F__)
    return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    F32 v;
    for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
    return v;
#endif
}

#if defined(__AVX512F__)
inline __mmask16 first(int count) { return __mmask16((1u << count) - 1u); }
inline F32 load(const float* p, int count) { return (F32)_mm512_maskz_loadu_ps(first(count), p); }
inline F32 load(const bf16* p, int count) {
    return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p)), 16);
}
inline F32 load(const fp16* p, int count) { return (F32)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p)); }
#else
template <typename T>
inline F32 load(const T* p, int count) {
    T padded[kLanes] = {};
    memcpy(padded, p, size_t(count) * sizeof(T));
    return load(padded);
}
#endif

// ---- store: round to nearest, ties to even -------------------------------------------------------------------------

inline void store(float* p, F32 v) { memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
inline __m256i narrow_exact(F32 v) {
    const __m512i u = (__m512i)v;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
#if defined(__AVX512BF16__)
// The instruction takes subnormal inputs as zero. Where bits must agree between bodies: `store_exact`.
inline __m256i narrow(F32 v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
#else
inline __m256i narrow(F32 v) { return narrow_exact(v); }
#endif
#endif

#if defined(__AVX512F__)
inline void store(bf16* p, F32 v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
inline void store_exact(bf16* p, F32 v) { _mm256_storeu_si256((__m256i*)p, narrow_exact(v)); }
inline void store(float* p, F32 v, int count) { _mm512_mask_storeu_ps(p, first(count), (__m512)v); }
inline void store(bf16* p, F32 v, int count) { _mm256_mask_storeu_epi16(p, first(count), narrow(v)); }
#else
inline void store(bf16* p, F32 v) {
    const U32 u = (U32)v;
    const U32 rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    const U32 kept = v == v ? rounded : U32{} + 0x7FC0u;
#if defined(__AVX2__)
    const __m256i pairs = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);  // within each 128-bit half
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
    const U16 half = __builtin_convertvector(kept, U16);
    memcpy(p, &half, sizeof half);
#endif
}
inline void store_exact(bf16* p, F32 v) { store(p, v); }
template <typename T>
inline void store(T* p, F32 v, int count) {
    T whole[kLanes];
    store(whole, v);
    memcpy(p, whole, size_t(count) * sizeof(T));
}
#endif

inline void store_exact(float* p, F32 v) { store(p, v); }
inline void store_exact(fp16* p, F32 v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
#endif
}

// The same with what is left of an array: whole where `left` allows it.
template <typename T>
inline F32 load_up_to(const T* p, int64_t left) { return left >= kLanes ? load(p) : load(p, int(left)); }
template <typename T>
inline void store_up_to(T* p, F32 v, int64_t left) {
    if (left >= kLanes) {
        store(p, v);
    } else {
        store(p, v, int(left));
    }
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// a * b + c, with one rounding where the set has it.
inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
    return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// a > b ? a : b and a < b ? a : b, as the instructions have it: a NaN in b comes through, one in a does not.
#if defined(__AVX512F__)
inline F32 max(F32 a, F32 b) { return (F32)_mm512_max_ps((__m512)a, (__m512)b); }
inline F32 min(F32 a, F32 b) { return (F32)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline F32 max(F32 a, F32 b) { return (F32)_mm256_max_ps((__m256)a, (__m256)b); }
inline F32 min(F32 a, F32 b) { return (F32)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
inline F32 min(F32 a, F32 b) { return a < b ? a : b; }
#endif
inline F32 abs(F32 v) { return (F32)((I32)v & 0x7FFFFFFF); }

inline F32 sqrt(F32 v) {
#if defined(__AVX512F__)
    return (F32)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
    return (F32)_mm256_sqrt_ps((__m256)v);
#else
    F32 root;
    for (int i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(v[i]);
    return root;
#endif
}

// Lane sums and maxima in one fixed order: halves, quarters, ... Written out where there are instructions for it: of the
// plain form compilers make a loop through memory that costs more than the products it sums.
#if defined(__AVX2__)
inline float sum(F32 v) {
#if defined(__AVX512F__)
    const __m256 eight = _mm512_castps512_ps256((__m512)v) + _mm512_extractf32x8_ps((__m512)v, 1);
#else
    const __m256 eight = (__m256)v;
#endif
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(two + _mm_movehdup_ps(two));
}
inline float largest(F32 v) {
#if defined(__AVX512F__)
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    const __m256 eight = (__m256)v;
#endif
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ps(two, _mm_movehdup_ps(two)));
}
#else
inline float sum(F32 v) {
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
}
inline float largest(F32 v) {
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) v[i] = v[i] > v[i + width] ? v[i] : v[i + width];
    return v[0];
}
#endif

// e^x within 2 ulp; 0 below -104, infinity above 89, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, so that r is exact), then Taylor's series to r^7 / 7!, whose
// remainder there is below 6e-9.
inline F32 exp(F32 x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    x = max(splat(-104.0f), min(splat(89.0f), x));
    const F32 shifted = fma(x, splat(1.44269504f), splat(round));
    const F32 n = shifted - round;
    const F32 r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
    F32 p = splat(1.0f / 5040.0f);
    p = fma(p, r, splat(1.0f / 720.0f));
    p = fma(p, r, splat(1.0f / 120.0f));
    p = fma(p, r, splat(1.0f / 24.0f));
    p = fma(p, r, splat(1.0f / 6.0f));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
    return (F32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // 2^n as a product of two powers: each has a normal exponent even where 2^n overflows or is subnormal.
    const I32 whole = (I32)shifted - (I32)splat(round), half = whole >> 1;
    return p * (F32)((half + 127) << 23) * (F32)((whole - half + 127) << 23);
#endif
}

// tanh x within 4 ulp; NaN for NaN. From e^(-2 |x|); below 1/4, where that cancels, the odd Taylor series to x^9, whose
// next term there is below 1e-8 of x.
inline F32 tanh(F32 x) {
    const F32 square = x * x;
    F32 p = splat(62.0f / 2835.0f);
    p = fma(p, square, splat(-17.0f / 315.0f));
    p = fma(p, square, splat(2.0f / 15.0f));
    p = fma(p, square, splat(-1.0f / 3.0f));
    const F32 near = fma(x * square, p, x);
    const F32 e = exp(-2.0f * abs(x)), size = (1.0f - e) / (1.0f + e);
    const F32 far = x < 0.0f ? -size : size;
    return abs(x) < 0.25f ? near : far;
}

// 1 / v for v in [1, 2^126), within 2 ulp; 0 for larger ones.
inline F32 reciprocal(F32 v) {
#if defined(__AVX512F__)
    const F32 guess = (F32)_mm512_rcp14_ps((__m512)v);  // 14 bits; one step of Newton's method doubles them
    return guess * (2.0f - v * guess);
#else
    return 1.0f / v;
#endif
}

}  // namespace nybble::NYBBLE_ISA
