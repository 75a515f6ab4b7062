// Tiles of a GEMM on AVX-512 with VNNI and BF16: up to 12 rows by 32 outputs, all sums in registers.
#pragma once

#include "kernel_table.h"
#include "simd_avx512.h"

#include "ahead.h"

namespace OUTRIDER_LEVEL {

using outrider::kPanel;
using outrider::start_of_sum;

constexpr int kBlockRows[] = {12, 12, 12, 6};
constexpr int kUnitInputs[] = {1, 2, 4, 4};

template <int R>
inline void store_tile(const vf (&sum)[R][2], float* tile) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        store(tile + r * kPanel, sum[r][0]);
        store(tile + r * kPanel + 16, sum[r][1]);
    }
}

template <int R>
Ahead tile_fp32(const uint32_t* units, const uint8_t* panel, int64_t num_units, float* tile, Ahead ahead) {
    vf sum[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    const float* x = reinterpret_cast<const float*>(units);
    for (int64_t k = 0; k < num_units; ++k, x += R, panel += 128) {
        ahead.fetch();
        const vf w0 = _mm512_loadu_ps(panel), w1 = _mm512_loadu_ps(panel + 64);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const vf v = _mm512_set1_ps(x[r]);
            sum[r][0] = _mm512_fmadd_ps(v, w0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(v, w1, sum[r][1]);
        }
    }
    store_tile<R>(sum, tile);
    return ahead;
}

template <int R>
Ahead tile_bf16(const uint32_t* units, const uint8_t* panel, int64_t num_units, float* tile, Ahead ahead) {
    vf sum[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < num_units; ++k, units += R, panel += 128) {
        ahead.fetch();
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel), w1 = (__m512bh)_mm512_loadu_si512(panel + 64);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512bh v = (__m512bh)_mm512_set1_epi32(static_cast<int>(units[r]));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], w0, v);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], w1, v);
        }
    }
    store_tile<R>(sum, tile);
    return ahead;
}

// sum += four products of unsigned bytes of `weight` and signed bytes of `x` in each lane. The intrinsic is the same
// instruction, around which GCC 12 copies and spills registers.
inline void dot_bytes(__m512i& sum, __m512i weight, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
}

template <int R>
Ahead tile_int8(const uint32_t* units, const int32_t* sums, int num_parts, const uint8_t* panel, int64_t num_units,
               float* tile, Ahead ahead) {
    __m512i starts[R];  // in memory: with calls between them the compiler would keep no sum in a register
    for (int r = 0; r < R; ++r) starts[r] = _mm512_set1_epi32(start_of_sum(sums + r, R, num_parts));
    __m512i sum[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = starts[r];
    const float* scales = reinterpret_cast<const float*>(panel);
    panel += 128;
    ahead.fetch();
    for (int64_t k = 0; k < num_units; ++k, units += R, panel += 128) {
        ahead.fetch();
        const __m512i w0 = _mm512_loadu_si512(panel), w1 = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512i v = _mm512_set1_epi32(static_cast<int>(units[r]));
            dot_bytes(sum[r][0], w0, v);
            dot_bytes(sum[r][1], w1, v);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        store(tile + r * kPanel, mul(_mm512_cvtepi32_ps(sum[r][0]), load(scales)));
        store(tile + r * kPanel + 16, mul(_mm512_cvtepi32_ps(sum[r][1]), load(scales + 16)));
    }
    return ahead;
}

template <int R, bool kZeros>
Ahead tile_int4(const uint32_t* __restrict units, const int32_t* __restrict sums, const uint8_t* __restrict panel,
               int64_t num_groups, int group_size, float* __restrict tile, Ahead ahead) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    vf total[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < num_groups; ++g, sums += R) {
        const uint16_t* head = reinterpret_cast<const uint16_t*>(panel);
        panel += kZeros ? 128 : 64;
        ahead.fetch_line();
        if constexpr (kZeros) ahead.fetch_line();
        __m512i sum[R][2];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = kZeros ? _mm512_setzero_si512() : _mm512_set1_epi32(sums[r]);
        for (int i = 0; i < group_size; i += 8, units += 2 * R, panel += 128) {
            ahead.fetch();
            const __m512i b0 = _mm512_loadu_si512(panel), b1 = _mm512_loadu_si512(panel + 64);
            __m512i w0 = _mm512_and_si512(b0, low), w1 = _mm512_and_si512(b1, low);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const __m512i v = _mm512_set1_epi32(static_cast<int>(units[r]));
                dot_bytes(sum[r][0], w0, v);
                dot_bytes(sum[r][1], w1, v);
            }
            w0 = _mm512_and_si512(_mm512_srli_epi32(b0, 4), low);
            w1 = _mm512_and_si512(_mm512_srli_epi32(b1, 4), low);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const __m512i v = _mm512_set1_epi32(static_cast<int>(units[R + r]));
                dot_bytes(sum[r][0], w0, v);
                dot_bytes(sum[r][1], w1, v);
            }
        }
        const vf scale0 = load_f16(head), scale1 = load_f16(head + 16);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            vf s0 = _mm512_cvtepi32_ps(sum[r][0]), s1 = _mm512_cvtepi32_ps(sum[r][1]);
            if constexpr (kZeros) {  // integers below 2^24: exact
                const vf row_sum = _mm512_set1_ps(static_cast<float>(sums[r]));
                s0 = fma(row_sum, load_f16(head + 32), s0);
                s1 = fma(row_sum, load_f16(head + 48), s1);
            }
            total[r][0] = fma(s0, scale0, total[r][0]);
            total[r][1] = fma(s1, scale1, total[r][1]);
        }
    }
    store_tile<R>(total, tile);
    return ahead;
}

}  // namespace OUTRIDER_LEVEL
