// One level's table; included last by level_*.cpp, which is compiled with that level's instructions.
#pragma once

#include "rows.h"

#include "attention.h"
#include "linear.h"
#include "selection.h"

namespace OUTRIDER_LEVEL {

constexpr outrider::KernelTable table(const char* name) {
    return {name,
            {kUnitInputs[0], kUnitInputs[1], kUnitInputs[2], kUnitInputs[3]},
            rows_form,
            largest_magnitude,
            pack_row,
            interleave,
            linear,
            gated_silu,
            rms_norm,
            rotate,
            write_kv,
            read_row,
            attention_scratch,
            attention,
            block_maxima,
            greatest,
            philox,
            noise_hits,
            common_bound,
            places_reaching,
            rank_keys,
            read_memory};
}

}  // namespace OUTRIDER_LEVEL
