// Tiles of a GEMM in plain C++: up to 4 rows by 32 outputs.
#pragma once

#include "kernel_table.h"
#include "simd_portable.h"

#include "ahead.h"

namespace OUTRIDER_LEVEL {

using outrider::kPanel;
using outrider::start_of_sum;

constexpr int kBlockRows[] = {4, 4, 4, 4};
constexpr int kUnitInputs[] = {1, 1, 4, 4};  // bf16 rows are kept as float32 that bf16 can hold

template <int R>
Ahead tile_fp32(const uint32_t* units, const uint8_t* panel, int64_t num_units, float* tile, Ahead ahead) {
    float sum[R][kPanel] = {};
    for (int64_t k = 0; k < num_units; ++k) {
        const float* w = reinterpret_cast<const float*>(panel) + k * kPanel;
        for (int r = 0; r < R; ++r) {
            const float x = float_of(units[k * R + r]);
            for (int c = 0; c < kPanel; ++c) sum[r][c] += x * w[c];
        }
    }
    std::memcpy(tile, sum, sizeof sum);
    return ahead;
}

template <int R>
Ahead tile_bf16(const uint32_t* units, const uint8_t* panel, int64_t num_units, float* tile, Ahead ahead) {
    float sum[R][kPanel] = {};
    for (int64_t k = 0; k < num_units; k += 2) {
        const uint32_t* pairs = reinterpret_cast<const uint32_t*>(panel) + k / 2 * kPanel;
        for (int r = 0; r < R; ++r) {
            const float x0 = float_of(units[k * R + r]), x1 = float_of(units[(k + 1) * R + r]);
            for (int c = 0; c < kPanel; ++c) {
                sum[r][c] += x0 * float_of(pairs[c] << 16);
                sum[r][c] += x1 * float_of(pairs[c] & 0xffff0000);
            }
        }
    }
    std::memcpy(tile, sum, sizeof sum);
    return ahead;
}

// Sum of four products of bytes: of the unit's as signed, of the weight's as unsigned.
inline int32_t dot_unsigned(uint32_t weight, uint32_t unit) {
    int32_t sum = 0;
    for (int b = 0; b < 4; ++b)
        sum += static_cast<int32_t>((weight >> (8 * b)) & 0xff) * static_cast<int8_t>((unit >> (8 * b)) & 0xff);
    return sum;
}

template <int R>
Ahead tile_int8(const uint32_t* units, const int32_t* sums, int num_parts, const uint8_t* panel, int64_t num_units,
               float* tile, Ahead ahead) {
    const float* scales = reinterpret_cast<const float*>(panel);
    int32_t sum[R][kPanel];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < kPanel; ++c) sum[r][c] = start_of_sum(sums + r, R, num_parts);
    for (int64_t k = 0; k < num_units; ++k) {
        const uint32_t* w = reinterpret_cast<const uint32_t*>(panel + 128) + k * kPanel;
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < kPanel; ++c) sum[r][c] += dot_unsigned(w[c], units[k * R + r]);
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < kPanel; ++c) tile[r * kPanel + c] = static_cast<float>(sum[r][c]) * scales[c];
    return ahead;
}

template <int R, bool kZeros>
Ahead tile_int4(const uint32_t* units, const int32_t* sums, const uint8_t* panel, int64_t num_groups, int group_size,
               float* tile, Ahead ahead) {
    float total[R][kPanel] = {};
    for (int64_t g = 0; g < num_groups; ++g, sums += R) {
        const uint16_t* head = reinterpret_cast<const uint16_t*>(panel);
        panel += kZeros ? 128 : 64;
        int32_t sum[R][kPanel];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < kPanel; ++c) sum[r][c] = kZeros ? 0 : sums[r];
        for (int i = 0; i < group_size; i += 8, units += 2 * R, panel += 128) {
            const uint32_t* w = reinterpret_cast<const uint32_t*>(panel);
            for (int r = 0; r < R; ++r) {
                for (int c = 0; c < kPanel; ++c) {
                    sum[r][c] += dot_unsigned(w[c] & 0x0f0f0f0f, units[r]);
                    sum[r][c] += dot_unsigned((w[c] >> 4) & 0x0f0f0f0f, units[R + r]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < kPanel; ++c) {
                float s = static_cast<float>(sum[r][c]);
                if constexpr (kZeros) s += static_cast<float>(sums[r]) * float_of_f16(head[kPanel + c]);
                total[r][c] += s * float_of_f16(head[c]);
            }
        }
    }
    std::memcpy(tile, total, sizeof total);
    return ahead;
}

}  // namespace OUTRIDER_LEVEL
