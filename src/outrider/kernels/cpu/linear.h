// Linear layers from tiles. A panel's weights are read from memory once and used for all blocks of rows; threads
// divide the panels, so that no sum depends on how many threads or rows there are.
#pragma once

#include "kernel_table.h"

namespace OUTRIDER_LEVEL {

using outrider::Epilogue;

#ifdef OUTRIDER_HAS_MATRICES
constexpr int kMostRows = kMostMatrixRows;
#else
constexpr int kMostRows = kMostVectorRows;

struct Matrices {};  // none

inline outrider::RowsForm rows_form(const PackedLinear& weight, int) { return {kBlockRows[weight.format], 1}; }
#endif
constexpr int64_t kAheadBytes = 8192;
constexpr int kLinesPerOutputs = 1, kLinesPerGated = 3;  // what memory has while W outputs are made

template <int R>
inline Ahead run_tile_of(const PackedLinear& weight, const PackedRows& rows, int start, const uint8_t* panel, float* tile, Ahead ahead) {
    const uint32_t* units = rows.units + start * rows.num_units;
    const int32_t* sums = rows.sums + start * rows.num_groups;
    switch (weight.format) {  // tiles of more rows than a format's blocks have are not even compiled
        case outrider::kFp32:
            if constexpr (R <= kBlockRows[0]) return tile_fp32<R>(units, panel, rows.num_units, tile, ahead);
            break;
        case outrider::kBf16:
            if constexpr (R <= kBlockRows[1]) return tile_bf16<R>(units, panel, rows.num_units, tile, ahead);
            break;
        case outrider::kInt8:
            if constexpr (R <= kBlockRows[2]) return tile_int8<R>(units, sums, rows.num_parts, panel, rows.num_units, tile, ahead);
            break;
        default:
            if constexpr (R <= kBlockRows[3]) {
                const int64_t groups = rows.num_groups;
                if (weight.has_zeros) return tile_int4<R, true>(units, sums, panel, groups, weight.group_size, tile, ahead);
                return tile_int4<R, false>(units, sums, panel, groups, weight.group_size, tile, ahead);
            }
    }
    return ahead;
}

template <int R = kMostVectorRows>
inline Ahead run_tile_for(int num_rows, const PackedLinear& weight, const PackedRows& rows, int start, const uint8_t* panel, float* tile, Ahead ahead) {
    if constexpr (R > 0) {
        if constexpr (R <= kBlockRows[0] || R <= kBlockRows[1] || R <= kBlockRows[2] || R <= kBlockRows[3])
            if (num_rows == R) return run_tile_of<R>(weight, rows, start, panel, tile, ahead);
        return run_tile_for<R - 1>(num_rows, weight, rows, start, panel, tile, ahead);
    }
    return ahead;
}

// What a block of rows fetches while it goes through a panel: one alone the same stream, a little ahead, and then the
// beginning of `next`; more of them each its share of `later`. Null if there is none.
inline Ahead ahead_of(const PackedRows& rows, int block, const uint8_t* panel, int64_t bytes, const uint8_t* next, const uint8_t* later) {
    const int blocks = rows.num_blocks();
    if (rows.fetch == outrider::Fetch::kProcessor || (blocks > 1 && later == nullptr)) return Ahead(panel);
    const bool is_far = rows.fetch == outrider::Fetch::kFar;
    if (blocks > 1) return {later + bytes * block / blocks, nullptr, nullptr, 128 / blocks, is_far};
    if (next == nullptr) next = panel;  // which is in the cache
    if (bytes <= kAheadBytes) return {next, nullptr, nullptr, 128, is_far};
    return {panel + kAheadBytes, panel + bytes, next, 128, is_far};
}

// The tile of one panel and one block of rows, without the rows' scales and the bias.
inline Ahead run_tile(const PackedLinear& weight, const PackedRows& rows, int block, const uint8_t* panel, float* tile, Ahead ahead, [[maybe_unused]] Matrices& matrices) {
#ifdef OUTRIDER_HAS_MATRICES
    if (rows.chunk_units > 1) return run_matrix_tile(weight, rows, block, panel, tile, ahead, matrices);
#endif
    const int start = rows.block_start(block);
    return run_tile_for(rows.block_start(block + 1) - start, weight, rows, start, panel, tile, ahead);
}

// Where a panel's outputs of a block of rows go.
inline void prefetch_outputs(const PackedRows& rows, int block, const float* out, int64_t row_stride) {
    for (int row = rows.block_start(block); row < rows.block_start(block + 1); ++row)
        for (int c = 0; c < outrider::kPanel; c += 16) outrider::prefetch_for_write(out + row * row_stride + c);
}

inline vf finish(const PackedLinear& weight, const PackedRows& rows, int row, const float* tile, int64_t output, int c) {
    vf y = load(tile + c);
    if (weight.format == outrider::kInt8 || weight.format == outrider::kInt4) y = mul(y, splat(rows.scales[row]));
    if (weight.bias != nullptr) y = add(y, load_part(weight.bias + output + c, weight.num_outputs - output - c));
    return y;
}

inline void linear(const PackedLinear& weight, const PackedRows& rows, float* out, int64_t row_stride, int64_t panel_stride, Epilogue epilogue, int64_t begin, int64_t end, const uint8_t* then) {
    const int64_t bytes = weight.panel_bytes();
    alignas(64) float tile[kMostRows * outrider::kPanel];
    Matrices matrices;
    for (int64_t p = begin; p < end; ++p) {
        const int64_t output = p * outrider::kPanel;
        float* const outs = out + (p - begin) * panel_stride;
        const uint8_t *panel = weight.data + p * bytes, *next = p + 1 == end ? then : panel + bytes;
        for (int block = 0; block < rows.num_blocks(); ++block) {
            prefetch_outputs(rows, block, outs, row_stride);
            Ahead ahead = ahead_of(rows, block, panel, bytes, next, next);
            ahead = run_tile(weight, rows, block, panel, tile, ahead, matrices);
            const int start = rows.block_start(block), stop = rows.block_start(block + 1);
            for (int row = start; row < stop; ++row) {
                const float* sums = tile + (row - start) * outrider::kPanel;
                for (int c = 0; c < outrider::kPanel && output + c < weight.num_outputs; c += W) {
                    float* to = outs + row * row_stride + c;
                    const int64_t count = weight.num_outputs - output - c;
                    ahead.fetch_lines(kLinesPerOutputs);
                    vf y = finish(weight, rows, row, sums, output, c);
                    if (epilogue == Epilogue::kAdd) y = add(load_part(to, count), y);
                    store_part(to, y, count);
                }
            }
        }
    }
}

inline void gated_silu(const PackedLinear& gate, const PackedLinear& up, const PackedRows& gate_rows, const PackedRows& up_rows, float* out, int64_t begin, int64_t end, const uint8_t* then) {
    const int64_t gate_bytes = gate.panel_bytes(), up_bytes = up.panel_bytes();
    alignas(64) float gates[kMostRows * outrider::kPanel], ups[kMostRows * outrider::kPanel];
    Matrices matrices;
    for (int64_t p = begin; p < end; ++p) {
        const int64_t output = p * outrider::kPanel;
        const uint8_t *gate_panel = gate.data + p * gate_bytes, *up_panel = up.data + p * up_bytes;
        float* const outs = out + (p - begin) * gate_rows.num_rows * outrider::kPanel;
        const uint8_t* next_gate = p + 1 == end ? then : gate_panel + gate_bytes;
        const uint8_t* next_up = p + 1 < end ? up_panel + up_bytes : then == nullptr ? nullptr : then + gate_bytes;
        for (int block = 0; block < gate_rows.num_blocks(); ++block) {
            prefetch_outputs(gate_rows, block, outs, outrider::kPanel);
            Ahead ahead = ahead_of(gate_rows, block, gate_panel, gate_bytes, up_panel, next_gate);
            ahead = run_tile(gate, gate_rows, block, gate_panel, gates, ahead, matrices);
            ahead = ahead_of(up_rows, block, up_panel, up_bytes, next_gate, next_up);
            ahead = run_tile(up, up_rows, block, up_panel, ups, ahead, matrices);
            const int start = gate_rows.block_start(block), stop = gate_rows.block_start(block + 1);
            for (int row = start; row < stop; ++row) {
                const int at = (row - start) * outrider::kPanel;
                for (int c = 0; c < outrider::kPanel && output + c < gate.num_outputs; c += W) {
                    ahead.fetch_lines(kLinesPerGated);
                    const vf g = finish(gate, gate_rows, row, gates + at, output, c);
                    const vf u = finish(up, up_rows, row, ups + at, output, c);
                    store(outs + row * outrider::kPanel + c, mul(silu(g), u));
                }
            }
        }
    }
}

}  // namespace OUTRIDER_LEVEL
