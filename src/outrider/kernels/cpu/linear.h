// Linear layers from tiles. A panel's weights are read from memory once and used for all blocks of rows; threads
// divide the panels, so that no sum depends on how many threads or rows there are.
#pragma once

#include "kernel_table.h"

namespace OUTRIDER_LEVEL {

using outrider::Epilogue;

constexpr int kMostRows = 12;
constexpr int64_t kAheadBytes = 8192;

template <int R>
inline void run_tile_of(const PackedLinear& weight, const PackedRows& rows, int start, const uint8_t* panel, float* tile, Ahead ahead) {
    const uint32_t* units = rows.units + start * rows.num_units;
    const int32_t* sums = rows.sums + start * rows.num_groups;
    switch (weight.format) {  // tiles of more rows than a format's blocks have are not even compiled
        case outrider::kFp32:
            if constexpr (R <= kBlockRows[0]) tile_fp32<R>(units, panel, rows.num_units, tile, ahead);
            return;
        case outrider::kBf16:
            if constexpr (R <= kBlockRows[1]) tile_bf16<R>(units, panel, rows.num_units, tile, ahead);
            return;
        case outrider::kInt8:
            if constexpr (R <= kBlockRows[2]) tile_int8<R>(units, sums, rows.num_parts, panel, rows.num_units, tile, ahead);
            return;
        default:
            if constexpr (R <= kBlockRows[3]) {
                const int64_t groups = rows.num_groups;
                if (weight.has_zeros) return tile_int4<R, true>(units, sums, panel, groups, weight.group_size, tile, ahead);
                return tile_int4<R, false>(units, sums, panel, groups, weight.group_size, tile, ahead);
            }
    }
}

template <int R = kMostRows>
inline void run_tile_for(int num_rows, const PackedLinear& weight, const PackedRows& rows, int start, const uint8_t* panel, float* tile, Ahead ahead) {
    if constexpr (R > 0) {
        if constexpr (R <= kBlockRows[0] || R <= kBlockRows[1] || R <= kBlockRows[2] || R <= kBlockRows[3])
            if (num_rows == R) return run_tile_of<R>(weight, rows, start, panel, tile, ahead);
        run_tile_for<R - 1>(num_rows, weight, rows, start, panel, tile, ahead);
    }
}

// The tile of one panel and one block of rows, without the rows' scales and the bias.
inline void run_tile(const PackedLinear& weight, const PackedRows& rows, int block, const uint8_t* panel, float* tile) {
    const int start = rows.block_start(block), blocks = rows.num_blocks();
    const int64_t bytes = weight.panel_bytes();
    // One block: fetch a little ahead in the same stream. More: each fetches its share of the next panel.
    const int64_t bytes_ahead = blocks > 1 ? bytes + bytes * block / blocks : kAheadBytes;
    const Ahead ahead(rows.fetch, panel, bytes_ahead, 128 / blocks);
    run_tile_for(rows.block_start(block + 1) - start, weight, rows, start, panel, tile, ahead);
}

inline vf finish(const PackedLinear& weight, const PackedRows& rows, int row, const float* tile, int64_t output, int c) {
    vf y = load(tile + c);
    if (weight.format == outrider::kInt8 || weight.format == outrider::kInt4) y = mul(y, splat(rows.scales[row]));
    if (weight.bias != nullptr) y = add(y, load_part(weight.bias + output + c, weight.num_outputs - output - c));
    return y;
}

inline void linear(const PackedLinear& weight, const PackedRows& rows, float* out, int64_t out_stride, Epilogue epilogue, int64_t begin, int64_t end) {
    const int64_t bytes = weight.panel_bytes();
    alignas(64) float tile[kMostRows * outrider::kPanel];
    for (int64_t p = begin; p < end; ++p) {
        const int64_t output = p * outrider::kPanel;
        for (int block = 0; block < rows.num_blocks(); ++block) {
            run_tile(weight, rows, block, weight.data + p * bytes, tile);
            const int start = rows.block_start(block), stop = rows.block_start(block + 1);
            for (int row = start; row < stop; ++row) {
                const float* sums = tile + (row - start) * outrider::kPanel;
                for (int c = 0; c < outrider::kPanel && output + c < weight.num_outputs; c += W) {
                    float* to = out + row * out_stride + (p - begin) * outrider::kPanel + c;
                    const int64_t count = weight.num_outputs - output - c;
                    vf y = finish(weight, rows, row, sums, output, c);
                    if (epilogue == Epilogue::kAdd) y = add(load_part(to, count), y);
                    store_part(to, y, count);
                }
            }
        }
    }
}

inline void gated_silu(const PackedLinear& gate, const PackedLinear& up, const PackedRows& gate_rows, const PackedRows& up_rows, float* out, int64_t out_stride, int64_t begin, int64_t end) {
    const int64_t gate_bytes = gate.panel_bytes(), up_bytes = up.panel_bytes();
    alignas(64) float gates[kMostRows * outrider::kPanel], ups[kMostRows * outrider::kPanel];
    for (int64_t p = begin; p < end; ++p) {
        const int64_t output = p * outrider::kPanel;
        for (int block = 0; block < gate_rows.num_blocks(); ++block) {
            run_tile(gate, gate_rows, block, gate.data + p * gate_bytes, gates);
            run_tile(up, up_rows, block, up.data + p * up_bytes, ups);
            const int start = gate_rows.block_start(block), stop = gate_rows.block_start(block + 1);
            for (int row = start; row < stop; ++row) {
                const int at = (row - start) * outrider::kPanel;
                for (int c = 0; c < outrider::kPanel && output + c < gate.num_outputs; c += W) {
                    const vf g = finish(gate, gate_rows, row, gates + at, output, c);
                    const vf u = finish(up, up_rows, row, ups + at, output, c);
                    float* to = out + row * out_stride + (p - begin) * outrider::kPanel + c;
                    store_part(to, mul(silu(g), u), gate.num_outputs - output - c);
                }
            }
        }
    }
}

}  // namespace OUTRIDER_LEVEL
