// Linear layers from tiles. A panel's weights are read from memory once and used for all blocks of rows; threads
// divide the panels, so that no sum depends on how many threads or rows there are.
#pragma once

#include "kernel_table.h"

namespace OUTRIDER_LEVEL {

using outrider::Epilogue;

constexpr int kMostRows = 12;
constexpr int64_t kAheadBytes = 8192;
constexpr int kLinesPerOutputs = 1, kLinesPerGated = 3;  // what memory has while W outputs are made

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

// What a block of rows fetches while it goes through a panel: one alone the same stream, a little ahead; more of them
// each its share of what comes next, which is `then` (or null) after the last panel.
inline Ahead ahead_of(const PackedRows& rows, int block, const uint8_t* panel, int64_t bytes, bool is_last, const uint8_t* then) {
    const int blocks = rows.num_blocks();
    const uint8_t* next = is_last ? then : panel + bytes;
    // The same two lines again and again cost next to nothing.
    if (rows.fetch == outrider::Fetch::kProcessor || (blocks > 1 && next == nullptr)) return {panel, 0, false};
    const bool is_far = rows.fetch == outrider::Fetch::kFar;
    if (blocks > 1) return {next + bytes * block / blocks, 128 / blocks, is_far};
    // What lies behind the last panel is another thread's, or another layer's: there it ends with the panel.
    if (!is_last || then == panel + bytes) return {panel + kAheadBytes, 128, is_far};
    return bytes > kAheadBytes ? Ahead(panel + kAheadBytes, 128 * (bytes - kAheadBytes) / bytes, is_far) : Ahead(panel, 0, false);
}

// The tile of one panel and one block of rows, without the rows' scales and the bias.
inline void run_tile(const PackedLinear& weight, const PackedRows& rows, int block, const uint8_t* panel, float* tile, Ahead ahead) {
    const int start = rows.block_start(block);
    run_tile_for(rows.block_start(block + 1) - start, weight, rows, start, panel, tile, ahead);
}

// Where a panel's outputs of a block of rows go.
inline void prefetch_outputs(const PackedRows& rows, int block, const float* out, int64_t out_stride) {
    for (int row = rows.block_start(block); row < rows.block_start(block + 1); ++row)
        for (int c = 0; c < outrider::kPanel; c += 16) outrider::prefetch_for_write(out + row * out_stride + c);
}

inline vf finish(const PackedLinear& weight, const PackedRows& rows, int row, const float* tile, int64_t output, int c) {
    vf y = load(tile + c);
    if (weight.format == outrider::kInt8 || weight.format == outrider::kInt4) y = mul(y, splat(rows.scales[row]));
    if (weight.bias != nullptr) y = add(y, load_part(weight.bias + output + c, weight.num_outputs - output - c));
    return y;
}

inline void linear(const PackedLinear& weight, const PackedRows& rows, float* out, int64_t out_stride, Epilogue epilogue, int64_t begin, int64_t end, const uint8_t* then) {
    const int64_t bytes = weight.panel_bytes();
    alignas(64) float tile[kMostRows * outrider::kPanel];
    for (int64_t p = begin; p < end; ++p) {
        const int64_t output = p * outrider::kPanel;
        const uint8_t* panel = weight.data + p * bytes;
        for (int block = 0; block < rows.num_blocks(); ++block) {
            prefetch_outputs(rows, block, out + (p - begin) * outrider::kPanel, out_stride);
            const Ahead ahead = ahead_of(rows, block, panel, bytes, p + 1 == end, then);
            run_tile(weight, rows, block, panel, tile, ahead);
            Ahead rest = ahead.after(bytes);
            const int start = rows.block_start(block), stop = rows.block_start(block + 1);
            for (int row = start; row < stop; ++row) {
                const float* sums = tile + (row - start) * outrider::kPanel;
                for (int c = 0; c < outrider::kPanel && output + c < weight.num_outputs; c += W) {
                    float* to = out + row * out_stride + (p - begin) * outrider::kPanel + c;
                    const int64_t count = weight.num_outputs - output - c;
                    rest.fetch_lines(kLinesPerOutputs);
                    vf y = finish(weight, rows, row, sums, output, c);
                    if (epilogue == Epilogue::kAdd) y = add(load_part(to, count), y);
                    store_part(to, y, count);
                }
            }
        }
    }
}

inline void gated_silu(const PackedLinear& gate, const PackedLinear& up, const PackedRows& gate_rows, const PackedRows& up_rows, float* out, int64_t out_stride, int64_t begin, int64_t end, const uint8_t* then) {
    const int64_t gate_bytes = gate.panel_bytes(), up_bytes = up.panel_bytes();
    alignas(64) float gates[kMostRows * outrider::kPanel], ups[kMostRows * outrider::kPanel];
    for (int64_t p = begin; p < end; ++p) {
        const int64_t output = p * outrider::kPanel;
        const bool is_last = p + 1 == end;
        const uint8_t *gate_panel = gate.data + p * gate_bytes, *up_panel = up.data + p * up_bytes;
        const uint8_t* after = then == nullptr ? nullptr : then + gate_bytes;
        for (int block = 0; block < gate_rows.num_blocks(); ++block) {
            prefetch_outputs(gate_rows, block, out + (p - begin) * outrider::kPanel, out_stride);
            const Ahead ahead = ahead_of(gate_rows, block, gate_panel, gate_bytes, is_last, then);
            run_tile(gate, gate_rows, block, gate_panel, gates, ahead);
            Ahead rest = ahead.after(gate_bytes);
            run_tile(up, up_rows, block, up_panel, ups, ahead_of(up_rows, block, up_panel, up_bytes, is_last, after));
            const int start = gate_rows.block_start(block), stop = gate_rows.block_start(block + 1);
            for (int row = start; row < stop; ++row) {
                const int at = (row - start) * outrider::kPanel;
                for (int c = 0; c < outrider::kPanel && output + c < gate.num_outputs; c += W) {
                    rest.fetch_lines(kLinesPerGated);
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
