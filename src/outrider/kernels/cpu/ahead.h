// Included after a level's vectors.
#pragma once

namespace OUTRIDER_LEVEL {

using outrider::Fetch;

// While a tile is computed, lines of later weights are fetched: `step` bytes for each 128 bytes of this panel. The
// portable level leaves that to the processor.
struct Ahead {
    const char* at;
    int64_t step;
    bool is_far;

    // From `data` on; where the processor is to do it alone, the same two lines again and again, which costs next to nothing.
    Ahead(Fetch fetch, const void* data, int64_t bytes_ahead, int64_t step_bytes)
        : at(static_cast<const char*>(data) + (fetch == Fetch::kProcessor ? 0 : bytes_ahead)),
          step(fetch == Fetch::kProcessor ? 0 : step_bytes),
          is_far(fetch == Fetch::kFar) {}

    inline void fetch() {
        if (is_far) {
            prefetch_far(at);
            if (step > 64) prefetch_far(at + 64);  // lines asked for twice are asked for in vain there
        } else {
            prefetch(at);
            prefetch(at + 64);
        }
        at += step;
    }
};

}  // namespace OUTRIDER_LEVEL
