// Included after a level's vectors.
#pragma once

namespace OUTRIDER_LEVEL {

using outrider::Fetch;

// While a tile is computed, lines of later weights are fetched: `step` bytes for each 128 bytes of this panel. The
// portable level leaves that to the processor.
struct Ahead {
    const char* at;
    int64_t step;
    Fetch to;

    inline void fetch() {
        if (to == Fetch::kProcessor) return;
        if (to == Fetch::kFar) {
            prefetch_far(at);
            if (step > 64) prefetch_far(at + 64);
        } else {
            prefetch(at);
            if (step > 64) prefetch(at + 64);
        }
        at += step;
    }
};

}  // namespace OUTRIDER_LEVEL
