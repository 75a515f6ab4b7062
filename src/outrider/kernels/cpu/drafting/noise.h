// Candidates ranked with the Gumbel noise of sampling/noise.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../kernel_table.h"

namespace outrider {

constexpr uint64_t kTargetPurpose = 0;  // Purpose.TARGET

// The half of a word that is a token's: eight tokens have a block, the low 32 bits of a word come first.
inline uint32_t half_of(const PhiloxStream& stream, int64_t token) {
    uint64_t words[4];
    stream.block(static_cast<uint64_t>(token) / 8, words);
    return static_cast<uint32_t>(words[token % 8 / 2] >> (token % 2 ? 32 : 0));
}

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
        const float noise = gumbel_of(half_of(stream, tokens[i])) * temperature;
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
