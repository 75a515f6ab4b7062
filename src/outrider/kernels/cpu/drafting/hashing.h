// Hashes for tables whose keys are not spread by themselves.
#pragma once

#include <cstddef>
#include <cstdint>

namespace outrider {

inline uint64_t mixed(uint64_t value) {
    value = (value ^ (value >> 32)) * 0xD6E8FEB86659FD93;
    value = (value ^ (value >> 32)) * 0xD6E8FEB86659FD93;
    return value ^ (value >> 32);
}

struct MixedHash {
    size_t operator()(uint64_t key) const { return mixed(key); }
};

}  // namespace outrider
