// Tiles of a GEMM on AVX2: few rows by 32 outputs.
#pragma once

#include "kernel_table.h"
#include "simd_avx2.h"

#include "ahead.h"

namespace OUTRIDER_LEVEL {

using outrider::kPanel;

constexpr int kBlockRows[] = {3, 3, 2, 2};
constexpr int kUnitInputs[] = {1, 1, 4, 4};  // bf16 rows are kept as float32 that bf16 can hold

template <int R>
inline void store_tile(const vf (&sum)[R][4], float* tile) {
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) store(tile + r * kPanel + 8 * c, sum[r][c]);
}

template <int R>
Ahead tile_fp32(const uint32_t* units, const uint8_t* panel, int64_t num_units, float* tile, Ahead ahead) {
    vf sum[R][4];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) sum[r][c] = _mm256_setzero_ps();
    const float* x = reinterpret_cast<const float*>(units);
    for (int64_t k = 0; k < num_units; ++k, x += R, panel += 128) {
        ahead.fetch();
        vf v[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) v[r] = _mm256_broadcast_ss(x + r);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            const vf w = load(reinterpret_cast<const float*>(panel) + 8 * c);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sum[r][c] = fma(v[r], w, sum[r][c]);
        }
    }
    store_tile<R>(sum, tile);
    return ahead;
}

// Pairs of inputs lie next to each other, the first in the low half of each 32 bits.
template <int R>
Ahead tile_bf16(const uint32_t* units, const uint8_t* panel, int64_t num_units, float* tile, Ahead ahead) {
    vf sum[R][4];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) sum[r][c] = _mm256_setzero_ps();
    const float* x = reinterpret_cast<const float*>(units);
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    for (int64_t k = 0; k < num_units; k += 2, x += 2 * R, panel += 128) {
        ahead.fetch();
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel) + c);
            const vf first = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
            const vf second = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                sum[r][c] = fma(_mm256_broadcast_ss(x + r), first, sum[r][c]);
                sum[r][c] = fma(_mm256_broadcast_ss(x + R + r), second, sum[r][c]);
            }
        }
    }
    store_tile<R>(sum, tile);
    return ahead;
}

// Four products |w| * (sign of w) x per lane. |w| and |x| are at most 127: no pair of products overflows 16 bits.
inline __m256i dot_signed(__m256i sum, __m256i magnitude, __m256i weight, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, weight));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int R>
Ahead tile_int8(const uint32_t* units, const int32_t*, int, const uint8_t* panel, int64_t num_units, float* tile,
               Ahead ahead) {
    __m256i sum[R][4];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) sum[r][c] = _mm256_setzero_si256();
    const float* scales = reinterpret_cast<const float*>(panel);
    panel += 128;
    ahead.fetch();
    const __m256i offset = _mm256_set1_epi8(static_cast<char>(0x80));
    for (int64_t k = 0; k < num_units; ++k, units += R, panel += 128) {
        ahead.fetch();
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel) + c);
            const __m256i weight = _mm256_xor_si256(bytes, offset), magnitude = _mm256_abs_epi8(weight);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                sum[r][c] = dot_signed(sum[r][c], magnitude, weight, _mm256_set1_epi32(static_cast<int>(units[r])));
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c)
            store(tile + r * kPanel + 8 * c, mul(_mm256_cvtepi32_ps(sum[r][c]), load(scales + 8 * c)));
    return ahead;
}

inline __m256i dot_unsigned(__m256i sum, __m256i weight, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(weight, x), _mm256_set1_epi16(1)));
}

template <int R, bool kZeros>
Ahead tile_int4(const uint32_t* units, const int32_t* sums, const uint8_t* panel, int64_t num_groups, int group_size,
               float* tile, Ahead ahead) {
    const __m256i low = _mm256_set1_epi8(0x0f);
    vf total[R][4];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) total[r][c] = _mm256_setzero_ps();
    for (int64_t g = 0; g < num_groups; ++g, sums += R) {
        const uint16_t* head = reinterpret_cast<const uint16_t*>(panel);
        panel += kZeros ? 128 : 64;
        ahead.fetch_line();
        if constexpr (kZeros) ahead.fetch_line();
        __m256i sum[R][4];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < 4; ++c) sum[r][c] = kZeros ? _mm256_setzero_si256() : _mm256_set1_epi32(sums[r]);
        for (int i = 0; i < group_size; i += 8, units += 2 * R, panel += 128) {
            ahead.fetch();
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
                const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel) + c);
                const __m256i first = _mm256_and_si256(bytes, low);
                const __m256i second = _mm256_and_si256(_mm256_srli_epi32(bytes, 4), low);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    sum[r][c] = dot_unsigned(sum[r][c], first, _mm256_set1_epi32(static_cast<int>(units[r])));
                    sum[r][c] = dot_unsigned(sum[r][c], second, _mm256_set1_epi32(static_cast<int>(units[R + r])));
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < 4; ++c) {
                vf s = _mm256_cvtepi32_ps(sum[r][c]);
                if constexpr (kZeros)  // integers below 2^24: exact
                    s = fma(splat(static_cast<float>(sums[r])), load_f16(head + kPanel + 8 * c), s);
                total[r][c] = fma(s, load_f16(head + 8 * c), total[r][c]);
            }
        }
    }
    store_tile<R>(total, tile);
    return ahead;
}

}  // namespace OUTRIDER_LEVEL
