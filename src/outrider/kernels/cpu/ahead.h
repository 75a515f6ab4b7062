// Included after a level's vectors.
#pragma once

namespace OUTRIDER_LEVEL {

using outrider::Fetch;

constexpr int64_t kAheadBytes = 8192;  // between what is asked for and what is read

// Processors drop some of the prefetches that memory has to answer, so every line is asked for once more, so many bytes
// before it is needed.
constexpr uintptr_t kAgainBytes = 2048;

// The lines of weights that are fetched while a tile is computed, in the order in which a thread reads them: a panel to its
// end, then `next`. The portable level leaves that to the processor.
class Ahead {
public:
    // Nothing: the same two lines again and again cost next to nothing.
    explicit Ahead(const uint8_t* panel) : Ahead(panel, nullptr, nullptr, 0, false) {}

    // `step` bytes for each 128 bytes of the tile's own panel. Without an end it goes on and on.
    Ahead(const uint8_t* from, const uint8_t* end, const uint8_t* next, int64_t step, bool is_far)
        : at_(address(from)), end_(end == nullptr ? UINTPTR_MAX : address(end)), next_(address(next)), step_(step),
          is_far_(is_far) {}

    // With 128 bytes of the panel.
    OUTRIDER_INLINE void fetch() {
        if (is_far_) {
            far_lines(at_);
            far_lines(at_ - kAgainBytes);  // before a beginning too: that costs less than to find out
        } else {
            prefetch(line(at_));
            prefetch(line(at_ + 64));
        }
        advance(step_);
    }

    // With 64 bytes of the panel.
    OUTRIDER_INLINE void fetch_line() {
        one_line();
        advance(step_ / 2);
    }

    // So that memory does not wait while outputs are made of sums.
    OUTRIDER_INLINE void fetch_lines(int count) {
        for (; step_ > 0 && count > 0; --count) {
            one_line();
            advance(64);
        }
    }

private:
    static uintptr_t address(const uint8_t* p) { return reinterpret_cast<uintptr_t>(p); }
    static const void* line(uintptr_t at) { return reinterpret_cast<const void*>(at); }

    OUTRIDER_INLINE void one_line() const {
        if (is_far_) prefetch_far(line(at_));
        else prefetch(line(at_));
    }

    // Lines that are asked for twice at once are asked for in vain.
    OUTRIDER_INLINE void far_lines(uintptr_t at) const {
        prefetch_far(line(at));
        if (step_ > 64) prefetch_far(line(at + 64));
    }

    OUTRIDER_INLINE void advance(int64_t num_bytes) {
        at_ += num_bytes;
        const bool is_done = at_ >= end_;
        at_ = is_done ? next_ : at_;
        end_ = is_done ? UINTPTR_MAX : end_;
    }

    uintptr_t at_, end_, next_;  // numbers: what is fetched may lie outside of what there is
    int64_t step_;
    bool is_far_;
};

}  // namespace OUTRIDER_LEVEL
