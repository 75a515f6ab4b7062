// Pieces of finding the largest of a row (drafting/largest.h), generic over the level's vectors.
#pragma once

#include "kernel_table.h"

namespace OUTRIDER_LEVEL {

// By bisection, which does not branch by the numbers: partial sorts guess wrong at every comparison.
inline float common_bound(const float* x, int64_t size, int64_t count, int32_t* ordered) {
    int32_t least = INT32_MAX, greatest = INT32_MIN;
    for (int64_t i = 0; i < size; ++i) {
        const int32_t order = outrider::in_order(x[i]);
        ordered[i] = order;
        least = order < least ? order : least;
        greatest = order > greatest ? order : greatest;
    }
    int64_t reached = least, missed = int64_t{greatest} + 1;
    while (missed - reached > 1) {
        const int64_t middle = reached + (missed - reached) / 2;
        const int32_t bound = static_cast<int32_t>(middle);
        int32_t num_reaching = 0;
        for (int64_t i = 0; i < size; ++i) num_reaching += ordered[i] >= bound;
        (num_reaching >= count ? reached : missed) = middle;
        if (num_reaching >= count && num_reaching <= count + count / 4) break;
    }
    return outrider::out_of_order(static_cast<int32_t>(reached));
}

inline int64_t places_reaching(const float* x, int64_t size, float bound, uint32_t first, uint32_t* places) {
    const vf least = splat(bound);
    int64_t found = 0;
    for (int64_t i = 0; i < size; i += 16) {
        uint32_t lanes = 0;
        for (int part = 0; part < 16; part += W) lanes |= lanes_at_least(load(x + i + part), least) << part;
        for (; lanes != 0; lanes &= lanes - 1) {
            places[found++] = first + static_cast<uint32_t>(i + __builtin_ctz(lanes));
        }
    }
    return found;
}

inline void rank_keys(const int32_t* keys, int64_t size, int32_t* ranks) {
    for (int64_t i = 0; i < size; ++i) ranks[i] = 0;
    for (int64_t other = 0; other < size; ++other) {
        const int32_t key = keys[other];
        // Of equals the first comes first: it counts for those behind it.
        for (int64_t i = 0; i < size; ++i) ranks[i] += (key > keys[i]) | ((key == keys[i]) & (other < i));
    }
}

}  // namespace OUTRIDER_LEVEL
