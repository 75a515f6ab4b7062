// Eight lanes of float32 on AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace OUTRIDER_LEVEL {

constexpr int W = 8;
using vf = __m256;

inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline void stream(float* p, vf x) { _mm256_stream_ps(p, x); }  // whole aligned vectors; `streamed` before others may read them
inline void streamed() { _mm_sfence(); }
inline vf splat(float x) { return _mm256_set1_ps(x); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
// Where either is NaN, max and min give the second operand.
inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf round_even(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// Lane i with lane i + 4, then i + 2, i + 1: always in this order.
template <class F>
inline float fold(vf x, F f) {
    x = f(x, _mm256_permute2f128_ps(x, x, 1));
    x = f(x, _mm256_permute_ps(x, 0x4e));
    return _mm256_cvtss_f32(f(x, _mm256_permute_ps(x, 0xb1)));
}

// x * 2^n for integral n in [-127, 128], in two factors so that neither leaves the normal range.
inline vf scale_by_power(vf x, vf n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 b =
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(x, a), b);
}

// The larger magnitude's bits; NaN counts as larger than infinity, so it is never lost.
inline vf max_magnitude(vf a, vf b) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_and_si256(_mm256_castps_si256(a), mask),
                                                _mm256_and_si256(_mm256_castps_si256(b), mask)));
}

inline vf load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// Rounds to nearest even; NaN stays NaN.
inline void store_bf16(uint16_t* p, vf x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(narrow));
}

inline vf load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline vf load_s8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// Integral x in [-128, 127].
inline void store_s8(int8_t* p, vf x) {
    const __m256i whole = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

// A bit for each lane: whether x is at least y; it is not where either is NaN.
inline uint32_t lanes_at_least(vf x, vf y) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GE_OQ))); }

using outrider::prefetch;
using outrider::prefetch_far;

// The first `count` lanes.
inline void store_lanes(float* p, vf x, int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane), x);
}

// Lanes [low, high) of x, the others of `other`; both may lie outside the vector.
inline vf keep_lanes(vf x, int low, int high, vf other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(low), lane);
    const __m256i kept = _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(high), lane));
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(kept));
}

// Of 32-bit pairs of bf16: the first of each, and the second.
inline vf first_of_bf16(vf pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16)); }
inline vf second_of_bf16(vf pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs), _mm256_set1_epi32(-65536)));
}

// W columns of W rows, which are floats from `offset` bytes on: take(column, vector).
template <class F>
inline void transpose_block(const char* const* rows, int64_t offset, F take) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i] + offset));
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        for (int half = 0; half < 2; ++half) {
            r[4 * i + 2 * half] = _mm256_shuffle_ps(t[4 * i + half], t[4 * i + 2 + half], 0x44);
            r[4 * i + 2 * half + 1] = _mm256_shuffle_ps(t[4 * i + half], t[4 * i + 2 + half], 0xee);
        }
    }
    for (int c = 0; c < 4; ++c) {
        take(c, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
        take(4 + c, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
    }
}

inline void philox(const outrider::PhiloxStream& stream, uint64_t first, int64_t count, uint64_t* words) {
    for (int64_t i = 0; i < count; ++i) stream.block(first + i, words + 4 * i);
}

}  // namespace OUTRIDER_LEVEL
