// Included after a level's vectors.
#pragma once

namespace OUTRIDER_LEVEL {

// While a tile is computed, lines of later weights are fetched: `step` bytes for each 128 bytes of this panel. The
// portable level leaves that to the hardware.
struct Ahead {
    const char* at;
    int64_t step;

    inline void fetch() {
        prefetch(at);
        prefetch(at + 64);
        at += step;
    }
};

}  // namespace OUTRIDER_LEVEL
