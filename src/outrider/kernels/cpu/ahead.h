// Included after a level's vectors.
#pragma once

namespace OUTRIDER_LEVEL {

// Who brings weights into the caches before they are needed.
enum class Fetch {
    kProcessor,  // alone: where memory is the limit its own prefetchers are the fastest
    kFar,        // and we, into the outer caches: what is on its way does not take up the first cache's few places
    kNear,       // and we, into the first cache: where arithmetic is the limit
};

// While a tile is computed, lines of later weights are fetched: `step` bytes for each 128 bytes of this panel. The
// portable level leaves that to the processor.
struct Ahead {
    const char* at;
    int64_t step;
    Fetch fetch_to;

    inline void fetch() {
        if (fetch_to == Fetch::kProcessor) return;
        if (fetch_to == Fetch::kFar) {
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
