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

    Ahead(const void* data, int64_t step_bytes, bool is_far)
        : at(static_cast<const char*>(data)), step(step_bytes), is_far(is_far) {}

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

    // What comes after all that the tile of a panel asks for.
    Ahead after(int64_t panel_bytes) const {
        Ahead rest = *this;
        rest.at += panel_bytes / 128 * step;
        return rest;
    }

    // So that memory does not wait while outputs are made of sums.
    OUTRIDER_INLINE void fetch_lines(int count) {
        for (; step > 0 && count > 0; --count, at += 64) {
            if (is_far) prefetch_far(at);
            else prefetch(at);
        }
    }

private:
    // Lines that are asked for twice at once are asked for in vain.
    OUTRIDER_INLINE void far_lines(const char* p) const {
        prefetch_far(p);
        if (step > 64) prefetch_far(p + 64);
    }
};

}  // namespace OUTRIDER_LEVEL
