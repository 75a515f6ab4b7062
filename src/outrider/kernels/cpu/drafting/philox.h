// Philox4x64-10 (Salmon et al., SC 2011), as sampling/noise.py lays it out: token i has half i of the words.
#pragma once

#include <cstdint>

namespace outrider {

__extension__ typedef unsigned __int128 uint128_t;

struct PhiloxStream {
    uint64_t seed, position, purpose, trial;

    // The half of a word that is a token's: eight tokens have a block, the low 32 bits of a word come first.
    uint32_t half(int64_t token) const {
        uint64_t c0 = static_cast<uint64_t>(token) / 8 + 1, c1 = 0, c2 = position, c3 = trial, k0 = seed, k1 = purpose;
        for (int round = 0; round < 10; ++round) {
            const uint128_t first = static_cast<uint128_t>(0xD2E7470EE14C6C93) * c0;
            const uint128_t second = static_cast<uint128_t>(0xCA5A826395121157) * c2;
            c0 = static_cast<uint64_t>(second >> 64) ^ c1 ^ k0;
            c1 = static_cast<uint64_t>(second);
            c2 = static_cast<uint64_t>(first >> 64) ^ c3 ^ k1;
            c3 = static_cast<uint64_t>(first);
            k0 += 0x9E3779B97F4A7C15;
            k1 += 0xBB67AE8584CAA73B;
        }
        const uint64_t words[4] = {c0, c1, c2, c3};
        return static_cast<uint32_t>(words[token % 8 / 2] >> (token % 2 ? 32 : 0));
    }
};

}  // namespace outrider
