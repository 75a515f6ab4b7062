// Included after a level's vectors.
#pragma once

namespace OUTRIDER_LEVEL {

using outrider::Fetch;

// Processors drop some of the prefetches that memory has to answer, so every line is asked for once more, so many bytes
// before it is needed.
constexpr int64_t kAgainBytes = 2048;

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

    OUTRIDER_INLINE void fetch() {
        if (is_far) {
            far_lines(at);
            far_lines(at - kAgainBytes);
        } else {
            prefetch(at);
            prefetch(at + 64);
        }
        at += step;
    }

private:
    // Lines that are asked for twice at once are asked for in vain.
    OUTRIDER_INLINE void far_lines(const char* p) const {
        prefetch_far(p);
        if (step > 64) prefetch_far(p + 64);
    }
};

}  // namespace OUTRIDER_LEVEL
