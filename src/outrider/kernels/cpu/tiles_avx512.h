// Tiles of a GEMM on AVX-512 with VNNI and BF16, all sums in registers: few rows by 32 outputs, or twice as many by 16,
// so that the weights come from memory once for them too.
#pragma once

#include "kernel_table.h"
#include "simd_avx512.h"

#include "ahead.h"

namespace OUTRIDER_LEVEL {

using outrider::kPanel;
using outrider::start_of_sum;

constexpr int kBlockRows[] = {12, 12, 12, 6};
constexpr int kLoneRows[] = {18, 18, 18, 8};
constexpr int kUnitInputs[] = {1, 2, 4, 4};

// The sums of more rows than a block's do not fit into registers: a lone block of them takes the panel's first 16 outputs,
// then the others.


// What the tiles of fp32, bf16 and int8 do: sum += weight * x for each unit of inputs, V vectors of outputs at a time.
template <int R, int V, class Sum, class Dot>
inline void sum_units(Sum (&sum)[R][V], const uint32_t* units, const uint8_t* panel, int64_t num_units, Ahead& ahead, Dot dot) {
    for (int64_t k = 0; k < num_units; ++k, units += R, panel += 128) {
        ahead.fetch();
        __m512i w[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) w[v] = _mm512_loadu_si512(panel + 64 * v);
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) dot(sum[r], w, units[r]);
    }
}

struct DotFp32 {
    template <int V>
    inline void operator()(vf (&sum)[V], const __m512i (&w)[V], const uint32_t& x) const {
        const vf v = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x)));
#pragma GCC unroll 2
        for (int i = 0; i < V; ++i) sum[i] = _mm512_fmadd_ps(v, _mm512_castsi512_ps(w[i]), sum[i]);
    }
};

struct DotBf16 {
    template <int V>
    inline void operator()(vf (&sum)[V], const __m512i (&w)[V], const uint32_t& x) const {
        const __m512bh v = (__m512bh)_mm512_set1_epi32(static_cast<int>(x));
#pragma GCC unroll 2
        for (int i = 0; i < V; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)w[i], v);
    }
};

// sum += four products of unsigned bytes of `weight` and signed bytes of `x` in each lane. The intrinsic is the same
// instruction, around which GCC 12 copies and spills registers.
inline void dot_bytes(__m512i& sum, __m512i weight, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
}

// The same with one unit of x for all lanes, read by the instruction itself: no register and no load of its own.
inline void dot_bytes(__m512i& sum, __m512i weight, const uint32_t& x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weight), "m"(x));
}

struct DotInt8 {
    inline void operator()(__m512i (&sum)[2], const __m512i (&w)[2], const uint32_t& x) const {
        const __m512i v = _mm512_set1_epi32(static_cast<int>(x));
        dot_bytes(sum[0], w[0], v);
        dot_bytes(sum[1], w[1], v);
    }
    inline void operator()(__m512i (&sum)[1], const __m512i (&w)[1], const uint32_t& x) const { dot_bytes(sum[0], w[0], x); }
};

template <int R, int V, class Dot>
inline void sum_floats(const uint32_t* units, const uint8_t* panel, int64_t num_units, float* tile, Ahead& ahead, Dot dot) {
    vf sum[R][V];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
    sum_units<R, V>(sum, units, panel, num_units, ahead, dot);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(tile + r * kPanel + 16 * v, sum[r][v]);
}

template <int R>
void tile_fp32(const uint32_t* units, const uint8_t* panel, int64_t num_units, float* tile, Ahead ahead) {
    if constexpr (R <= kBlockRows[0]) return sum_floats<R, 2>(units, panel, num_units, tile, ahead, DotFp32());
    sum_floats<R, 1>(units, panel, num_units, tile, ahead, DotFp32());
    sum_floats<R, 1>(units, panel + 64, num_units, tile + 16, ahead, DotFp32());
}

template <int R>
void tile_bf16(const uint32_t* units, const uint8_t* panel, int64_t num_units, float* tile, Ahead ahead) {
    if constexpr (R <= kBlockRows[1]) return sum_floats<R, 2>(units, panel, num_units, tile, ahead, DotBf16());
    sum_floats<R, 1>(units, panel, num_units, tile, ahead, DotBf16());
    sum_floats<R, 1>(units, panel + 64, num_units, tile + 16, ahead, DotBf16());
}

template <int R, int V>
inline void sum_int8(const uint32_t* units, const int32_t* sums, int num_parts, const float* scales, const uint8_t* panel,
                     int64_t num_units, float* tile, Ahead& ahead) {
    __m512i starts[R];  // in memory: with calls between them the compiler would keep no sum in a register
    for (int r = 0; r < R; ++r) starts[r] = _mm512_set1_epi32(start_of_sum(sums + r, R, num_parts));
    __m512i sum[R][V];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] = starts[r];
    sum_units<R, V>(sum, units, panel, num_units, ahead, DotInt8());
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v)
            store(tile + r * kPanel + 16 * v, mul(_mm512_cvtepi32_ps(sum[r][v]), load(scales + 16 * v)));
}

template <int R>
void tile_int8(const uint32_t* units, const int32_t* sums, int num_parts, const uint8_t* panel, int64_t num_units,
               float* tile, Ahead ahead) {
    const float* scales = reinterpret_cast<const float*>(panel);
    panel += 128;
    if constexpr (R <= kBlockRows[2]) return sum_int8<R, 2>(units, sums, num_parts, scales, panel, num_units, tile, ahead);
    sum_int8<R, 1>(units, sums, num_parts, scales, panel, num_units, tile, ahead);
    sum_int8<R, 1>(units, sums, num_parts, scales + 16, panel + 64, num_units, tile + 16, ahead);
}

template <int R, int V, bool kZeros>
inline void sum_int4(const uint32_t* __restrict units, const int32_t* __restrict sums, const uint8_t* __restrict panel, int64_t num_groups,
                     int group_size, int half, float* __restrict tile, Ahead& ahead) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    tile += 16 * half;
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(tile + r * kPanel + 16 * v, _mm512_setzero_ps());
    for (int64_t g = 0; g < num_groups; ++g, sums += R) {
        const uint16_t* head = reinterpret_cast<const uint16_t*>(panel) + 16 * half;
        panel += kZeros ? 128 : 64;
        __m512i sum[R][V];
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sum[r][v] = kZeros ? _mm512_setzero_si512() : _mm512_set1_epi32(sums[r]);
        for (int i = 0; i < group_size; i += 8, units += 2 * R, panel += 128) {
            ahead.fetch();
            __m512i b[V], w[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) b[v] = _mm512_loadu_si512(panel + 64 * (half + v));
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) w[v] = _mm512_and_si512(b[v], low);
#pragma GCC unroll 24
            for (int r = 0; r < R; ++r) DotInt8()(sum[r], w, units[r]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) w[v] = _mm512_and_si512(_mm512_srli_epi32(b[v], 4), low);
#pragma GCC unroll 24
            for (int r = 0; r < R; ++r) DotInt8()(sum[r], w, units[R + r]);
        }
        // The totals live in the tile: registers hold the integers.
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            const vf scale = load_f16(head + 16 * v);
#pragma GCC unroll 24
            for (int r = 0; r < R; ++r) {
                vf s = _mm512_cvtepi32_ps(sum[r][v]);
                if constexpr (kZeros)  // integers below 2^24: exact
                    s = fma(_mm512_set1_ps(static_cast<float>(sums[r])), load_f16(head + 32 + 16 * v), s);
                float* total = tile + r * kPanel + 16 * v;
                store(total, fma(s, scale, load(total)));
            }
        }
    }
}

template <int R, bool kZeros>
void tile_int4(const uint32_t* units, const int32_t* sums, const uint8_t* panel, int64_t num_groups, int group_size,
               float* tile, Ahead ahead) {
    if constexpr (R <= kBlockRows[3]) return sum_int4<R, 2, kZeros>(units, sums, panel, num_groups, group_size, 0, tile, ahead);
    sum_int4<R, 1, kZeros>(units, sums, panel, num_groups, group_size, 0, tile, ahead);
    sum_int4<R, 1, kZeros>(units, sums, panel, num_groups, group_size, 1, tile, ahead);
}

}  // namespace OUTRIDER_LEVEL
