// Candidates ranked with the Gumbel noise of sampling/noise.py: Philox4x64-10 (Salmon et al., SC 2011), of which token
// i has half i of the words.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace outrider {

__extension__ typedef unsigned __int128 uint128_t;

constexpr uint64_t kTargetPurpose = 0;  // Purpose.TARGET

struct PhiloxStream {
    uint64_t seed, position, purpose, trial;

    // The four words of eight tokens.
    void block(uint64_t index, uint64_t* words) const {
        uint64_t c0 = index + 1, c1 = 0, c2 = position, c3 = trial, k0 = seed, k1 = purpose;
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
        words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
    }

    // The half of a word that is a token's: the low 32 bits come first.
    uint32_t half(int64_t token) const {
        uint64_t words[4];
        block(static_cast<uint64_t>(token) / 8, words);
        return static_cast<uint32_t>(words[token % 8 / 2] >> (token % 2 ? 32 : 0));
    }
};

inline float gumbel_of(uint32_t half) {
    return static_cast<float>(-std::log(-std::log((half + 0.5) * 0x1p-32)));
}

// A key may differ from NumPy's, whose logarithms may round differently, by less than this share of what it is made of.
constexpr float kKeyError = 4e-6f;

// The first `count` of some tokens by logits plus temperature times noise, of equals the first; none where two are so
// near to each other that the rounding of a logarithm could decide.
inline std::vector<int64_t> rank_with_noise(const PhiloxStream& stream, const int64_t* tokens, const float* logits,
                                            int64_t num_tokens, float temperature, int64_t count) {
    struct Ranked {
        float key;
        int64_t token;
    };
    std::vector<Ranked> ranked(num_tokens);
    float greatest = 0.0f;
    for (int64_t i = 0; i < num_tokens; ++i) {
        const float noise = gumbel_of(stream.half(tokens[i])) * temperature;
        ranked[i] = {noise + logits[i], tokens[i]};
        greatest = std::max(greatest, std::abs(noise) + std::abs(logits[i]));
    }
    std::stable_sort(ranked.begin(), ranked.end(), [](const Ranked& a, const Ranked& b) { return a.key > b.key; });
    const int64_t num_best = std::min(count, num_tokens);
    std::vector<int64_t> best(num_best);
    for (int64_t i = 0; i < num_best; ++i) {
        if (i + 1 < num_tokens && !(ranked[i].key - ranked[i + 1].key > kKeyError * greatest)) return {};
        best[i] = ranked[i].token;
    }
    return best;
}

}  // namespace outrider
