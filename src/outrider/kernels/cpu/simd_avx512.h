// Sixteen lanes of float32 on AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernel_table.h"

namespace OUTRIDER_LEVEL {

constexpr int W = 16;
using vf = __m512;

inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline void stream(float* p, vf x) { _mm512_stream_ps(p, x); }  // whole aligned vectors; `streamed` before others may read them
inline void streamed() { _mm_sfence(); }
inline vf splat(float x) { return _mm512_set1_ps(x); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
// Where either is NaN, max and min give the second operand.
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf round_even(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// Lane i with lane i + 8, then i + 4, i + 2, i + 1: always in this order.
template <class F>
inline float fold(vf x, F f) {
    x = f(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    x = f(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    x = f(x, _mm512_permute_ps(x, 0x4e));
    return _mm512_cvtss_f32(f(x, _mm512_permute_ps(x, 0xb1)));
}

// x * 2^n for integral n in [-127, 128].
inline vf scale_by_power(vf x, vf n) { return _mm512_scalef_ps(x, n); }

// The larger magnitude's bits; NaN counts as larger than infinity, so it is never lost.
inline vf max_magnitude(vf a, vf b) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a), mask),
                                                _mm512_and_si512(_mm512_castps_si512(b), mask)));
}

inline vf load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Rounds to nearest even; NaN stays NaN.
inline void store_bf16(uint16_t* p, vf x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

inline vf load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline vf load_s8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Integral x in [-128, 127].
inline void store_s8(int8_t* p, vf x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

// A bit for each lane: whether x is at least y; it is not where either is NaN.
inline uint32_t lanes_at_least(vf x, vf y) { return _mm512_cmp_ps_mask(x, y, _CMP_GE_OQ); }

using outrider::prefetch;
using outrider::prefetch_far;

// The first `count` lanes.
inline void store_lanes(float* p, vf x, int count) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), x); }

// Lanes [low, high) of x, the others of `other`; both may lie outside the vector.
inline vf keep_lanes(vf x, int low, int high, vf other) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 kept = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(low));
    return _mm512_mask_blend_ps(_mm512_mask_cmplt_epi32_mask(kept, lane, _mm512_set1_epi32(high)), other, x);
}

// Of 32-bit pairs of bf16: the first of each, and the second.
inline vf first_of_bf16(vf pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
inline vf second_of_bf16(vf pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(-65536)));
}

// Sixteen columns of sixteen rows, which are floats from `offset` bytes on: take(column, vector).
template <class F>
inline void transpose_block(const char* const* rows, int64_t offset, F take) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(rows[i] + offset);
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        for (int half = 0; half < 2; ++half) {
            const __m512d a = _mm512_castps_pd(t[4 * i + half]), b = _mm512_castps_pd(t[4 * i + 2 + half]);
            r[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // r[4 i + c] now holds, per 128-bit lane l, column 4 l + c of rows 4 i .. 4 i + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512 low = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), high = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
        const __m512 low2 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd), high2 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
        take(c, _mm512_shuffle_f32x4(low, high, 0x88));
        take(4 + c, _mm512_shuffle_f32x4(low2, high2, 0x88));
        take(8 + c, _mm512_shuffle_f32x4(low, high, 0xdd));
        take(12 + c, _mm512_shuffle_f32x4(low2, high2, 0xdd));
    }
}

// Philox blocks, eight at a time; products of 64 bits from four of 32.
inline void philox_words(const outrider::PhiloxStream& stream, uint64_t first, uint64_t* words) {
    using Stream = outrider::PhiloxStream;
    const __m512i low = _mm512_set1_epi64(0xffffffff);
    const auto multiply = [&](__m512i c, uint64_t by, __m512i& most, __m512i& least) {
        const __m512i by_low = _mm512_set1_epi64(static_cast<int64_t>(by & 0xffffffff));
        const __m512i by_high = _mm512_set1_epi64(static_cast<int64_t>(by >> 32)), c_high = _mm512_srli_epi64(c, 32);
        const __m512i p = _mm512_mul_epu32(c, by_low);
        const __m512i q = _mm512_add_epi64(_mm512_mul_epu32(c_high, by_low), _mm512_srli_epi64(p, 32));
        const __m512i r = _mm512_add_epi64(_mm512_mul_epu32(c, by_high), _mm512_and_si512(q, low));
        most = _mm512_add_epi64(_mm512_add_epi64(_mm512_mul_epu32(c_high, by_high), _mm512_srli_epi64(q, 32)),
                                _mm512_srli_epi64(r, 32));
        least = _mm512_or_si512(_mm512_slli_epi64(r, 32), _mm512_and_si512(p, low));
    };
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first + 1)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    __m512i c1 = _mm512_setzero_si512(), c2 = _mm512_set1_epi64(static_cast<int64_t>(stream.position));
    __m512i c3 = _mm512_set1_epi64(static_cast<int64_t>(stream.trial));
    uint64_t k0 = stream.seed, k1 = stream.purpose;
    for (int round = 0; round < Stream::kRounds; ++round, k0 += Stream::kSeedStep, k1 += Stream::kPurposeStep) {
        __m512i most_first, least_first, most_second, least_second;
        multiply(c0, Stream::kFirst, most_first, least_first);
        multiply(c2, Stream::kSecond, most_second, least_second);
        c0 = _mm512_xor_si512(_mm512_xor_si512(most_second, c1), _mm512_set1_epi64(static_cast<int64_t>(k0)));
        c2 = _mm512_xor_si512(_mm512_xor_si512(most_first, c3), _mm512_set1_epi64(static_cast<int64_t>(k1)));
        c1 = least_second;
        c3 = least_first;
    }
    // From words by block to blocks of four words.
    const __m512i even01 = _mm512_unpacklo_epi64(c0, c1), odd01 = _mm512_unpackhi_epi64(c0, c1);
    const __m512i even23 = _mm512_unpacklo_epi64(c2, c3), odd23 = _mm512_unpackhi_epi64(c2, c3);
    const auto put = [&](int pair, __m128i a, __m128i b, __m128i c, __m128i d) {
        __m128i* to = reinterpret_cast<__m128i*>(words + 8 * pair);
        _mm_storeu_si128(to, a), _mm_storeu_si128(to + 1, b), _mm_storeu_si128(to + 2, c), _mm_storeu_si128(to + 3, d);
    };
#define OUTRIDER_PAIR(i)                                                                        \
    put(i, _mm512_extracti64x2_epi64(even01, i), _mm512_extracti64x2_epi64(even23, i),          \
        _mm512_extracti64x2_epi64(odd01, i), _mm512_extracti64x2_epi64(odd23, i))
    OUTRIDER_PAIR(0);
    OUTRIDER_PAIR(1);
    OUTRIDER_PAIR(2);
    OUTRIDER_PAIR(3);
#undef OUTRIDER_PAIR
}

inline void philox(const outrider::PhiloxStream& stream, uint64_t first, int64_t count, uint64_t* words) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) philox_words(stream, first + i, words + 4 * i);
    for (; i < count; ++i) stream.block(first + i, words + 4 * i);
}

}  // namespace OUTRIDER_LEVEL
