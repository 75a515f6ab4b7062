// Linear layers from tiles. A panel's weights are read from memory once and used for all blocks of rows; threads
// divide the panels, so that no sum depends on how many threads or rows there are.
#pragma once

#include <algorithm>

#include "kernel_table.h"

namespace OUTRIDER_LEVEL {

using outrider::Epilogue;

constexpr int kMostVectorRows = std::max({kBlockRows[0], kBlockRows[1], kBlockRows[2], kBlockRows[3]});
#ifdef OUTRIDER_HAS_MATRICES
constexpr int kMostRows = kTileBlocks * kMostMatrixRows;  // of tiles that are made together
#else
constexpr int kMostRows = kMostVectorRows;

struct Matrices {};  // none

inline outrider::RowsForm rows_form(const PackedLinear& weight, int) { return {kBlockRows[weight.format], 1}; }
#endif
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

// How a panel goes through the rows' blocks: slab after slab, with all panels in each; and in a slab `per_tile` at a time.
struct Tiling {
    int num_blocks, per_slab, per_tile;

    explicit Tiling(const PackedRows& rows) : num_blocks(rows.num_blocks()), per_slab(num_blocks), per_tile(1) {
#ifdef OUTRIDER_HAS_MATRICES
        if (rows.chunk_units == 1) return;
        per_tile = kTileBlocks;
        const int64_t tile_bytes = 4 * rows.num_units * kMostMatrixRows * kTileBlocks;
        per_slab = kTileBlocks * static_cast<int>(kSlabBytes > tile_bytes ? kSlabBytes / tile_bytes : 1);
#endif
    }
};

// Some of a slab's blocks, whose tiles are made together.
struct Blocks {
    int first, end;
    int part, num_parts;  // of the slab

    Blocks(const Tiling& tiling, int slab, int first)
        : first(first), end(first + tiling.per_tile), part((first - slab) / tiling.per_tile) {
        const int left = tiling.num_blocks - slab, count = left < tiling.per_slab ? left : tiling.per_slab;
        if (end > slab + count) end = slab + count;
        num_parts = (count + tiling.per_tile - 1) / tiling.per_tile;
    }
};

// run(panel, blocks, whether this is the last slab) for panels [begin, end).
template <class Run>
inline void for_each_tile(const Tiling& tiling, int64_t begin, int64_t end, Run run) {
    for (int slab = 0; slab < tiling.num_blocks; slab += tiling.per_slab) {
        const int slab_end = slab + tiling.per_slab;
        for (int64_t p = begin; p < end; ++p)
            for (int first = slab; first < slab_end && first < tiling.num_blocks; first += tiling.per_tile)
                run(p, Blocks(tiling, slab, first), slab_end >= tiling.num_blocks);
    }
}

// What is fetched while blocks go through a panel: by the only ones of a slab the same stream, a little ahead, and then the
// beginning of `next`; by each of several a share of `later`. Null if there is none.
inline Ahead ahead_of(const PackedRows& rows, const Blocks& blocks, const uint8_t* panel, int64_t bytes, const uint8_t* next, const uint8_t* later) {
    const int parts = blocks.num_parts;
    if (rows.fetch == outrider::Fetch::kProcessor || (parts > 1 && later == nullptr)) return Ahead(panel);
    const bool is_far = rows.fetch == outrider::Fetch::kFar;
    if (parts > 1) return {later + bytes * blocks.part / parts, nullptr, nullptr, 128 / parts, is_far};
    if (next == nullptr) next = panel;  // which is in the cache
    if (bytes <= kAheadBytes) return {next, nullptr, nullptr, 128, is_far};
    return {panel + kAheadBytes, panel + bytes, next, 128, is_far};
}

// The tiles of one panel and some blocks of rows, [row][kPanel], without the rows' scales and the bias.
inline Ahead run_tiles(const PackedLinear& weight, const PackedRows& rows, const Blocks& blocks, const uint8_t* panel, float* tiles, Ahead ahead, [[maybe_unused]] Matrices& matrices) {
#ifdef OUTRIDER_HAS_MATRICES
    if (rows.chunk_units > 1) return run_matrix_tiles(weight, rows, blocks.first, blocks.end, panel, tiles, ahead, matrices);
#endif
    const int start = rows.block_start(blocks.first);
    return run_tile_for(rows.block_start(blocks.end) - start, weight, rows, start, panel, tiles, ahead);
}

inline bool starts_line(const float* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// Where a panel's outputs of some rows go.
inline void prefetch_outputs(int begin, int end, const float* out, int64_t row_stride) {
    for (int row = begin; row < end; ++row)
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
    const Tiling tiling(rows);
    alignas(64) float tiles[kMostRows * outrider::kPanel];
    Matrices matrices;
    const bool streams = epilogue == Epilogue::kStream && starts_line(out) && starts_line(out + row_stride) && starts_line(out + panel_stride);
    const auto run = [&](int64_t p, const Blocks& blocks, const uint8_t* next) {
        const int64_t output = p * outrider::kPanel;
        const uint8_t* const panel = weight.data + p * bytes;
        float* const outs = out + (p - begin) * panel_stride;
        const int start = rows.block_start(blocks.first), stop = rows.block_start(blocks.end);
        if (!streams) prefetch_outputs(start, stop, outs, row_stride);
        Ahead ahead = ahead_of(rows, blocks, panel, bytes, next, next);
        ahead = run_tiles(weight, rows, blocks, panel, tiles, ahead, matrices);
        for (int row = start; row < stop; ++row) {
            const float* sums = tiles + (row - start) * outrider::kPanel;
            for (int c = 0; c < outrider::kPanel && output + c < weight.num_outputs; c += W) {
                float* to = outs + row * row_stride + c;
                const int64_t count = weight.num_outputs - output - c;
                ahead.fetch_lines(kLinesPerOutputs);
                vf y = finish(weight, rows, row, sums, output, c);
                if (epilogue == Epilogue::kAdd) y = add(load_part(to, count), y);
                if (streams && count >= W) stream(to, y);
                else store_part(to, y, count);
            }
        }
    };
    for_each_tile(tiling, begin, end, [&](int64_t p, const Blocks& blocks, bool is_last_slab) {
        const int64_t next = p + 1 < end ? p + 1 : begin;
        run(p, blocks, p + 1 < end || !is_last_slab ? weight.data + next * bytes : then);
    });
    if (streams) streamed();
}

inline void gated_silu(const PackedLinear& gate, const PackedLinear& up, const PackedRows& gate_rows, const PackedRows& up_rows, float* out, int64_t begin, int64_t end, const uint8_t* then) {
    const int64_t gate_bytes = gate.panel_bytes(), up_bytes = up.panel_bytes();
    const Tiling tiling(gate_rows);
    alignas(64) float gates[kMostRows * outrider::kPanel], ups[kMostRows * outrider::kPanel];
    Matrices matrices;
    const auto run = [&](int64_t p, const Blocks& blocks, const uint8_t* next_gate, const uint8_t* next_up) {
        const int64_t output = p * outrider::kPanel;
        const uint8_t *gate_panel = gate.data + p * gate_bytes, *up_panel = up.data + p * up_bytes;
        float* const outs = out + (p - begin) * gate_rows.num_rows * outrider::kPanel;
        const int start = gate_rows.block_start(blocks.first), stop = gate_rows.block_start(blocks.end);
        prefetch_outputs(start, stop, outs, outrider::kPanel);
        Ahead ahead = ahead_of(gate_rows, blocks, gate_panel, gate_bytes, up_panel, next_gate);
        ahead = run_tiles(gate, gate_rows, blocks, gate_panel, gates, ahead, matrices);
        ahead = ahead_of(up_rows, blocks, up_panel, up_bytes, next_gate, next_up);
        ahead = run_tiles(up, up_rows, blocks, up_panel, ups, ahead, matrices);
        for (int row = start; row < stop; ++row) {
            const int at = (row - start) * outrider::kPanel;
            for (int c = 0; c < outrider::kPanel && output + c < gate.num_outputs; c += W) {
                ahead.fetch_lines(kLinesPerGated);
                const vf g = finish(gate, gate_rows, row, gates + at, output, c);
                const vf u = finish(up, up_rows, row, ups + at, output, c);
                store(outs + row * outrider::kPanel + c, mul(silu(g), u));
            }
        }
    };
    for_each_tile(tiling, begin, end, [&](int64_t p, const Blocks& blocks, bool is_last_slab) {
        const int64_t next = p + 1 < end ? p + 1 : begin;
        const bool goes_on = p + 1 < end || !is_last_slab;
        run(p, blocks, goes_on ? gate.data + next * gate_bytes : then,
            goes_on ? up.data + next * up_bytes : then == nullptr ? nullptr : then + gate_bytes);
    });
}

}  // namespace OUTRIDER_LEVEL
