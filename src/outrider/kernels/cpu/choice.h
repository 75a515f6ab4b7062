// What a row of logits is chosen by: its greatest logit, or a sample of it with the Gumbel noise of sampling/noise.py.
//
// A row is seen stretch by stretch. Logarithms are taken only of the few tokens whose random number is such that they
// could be the greatest so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "drafting/noise.h"
#include "kernel_table.h"

namespace outrider {

// How a row's token is drawn; temperature 0 takes the greatest logit.
struct Draw {
    float temperature = 0.0f;
    uint64_t seed = 0, position = 0;
};

constexpr int64_t kUndecided = -1;

class RowChoice {
public:
    // Before a stretch of a row that begins with token `first`.
    void begin(const Draw& draw, int64_t first) {
        *this = RowChoice();
        draw_ = draw;
        token_ = first;
    }

    // The next logits, of tokens [first, first + count); `first` is a multiple of 8. Returns the greatest; NaN if there is one.
    float see(const KernelTable& kernels, const float* logits, int64_t first, int64_t count) {
        const float most = kernels.greatest(logits, count);
        if (!(most <= best_)) take(most, first + (std::find(logits, logits + count, most) - logits));
        for (int64_t i = 0; i < count && draw_.temperature > 0.0f; i += kPiece)
            sample(kernels, logits + i, first + i, std::min(count - i, kPiece));
        return most;
    }

    // Takes in what was seen of later tokens.
    void merge(const RowChoice& later) {
        take(later.best_, later.token_);
        rank(later.first_);
        rank(later.second_);
    }

    // The greatest log-weight of the row; NaN if there was one.
    float best() const { return draw_.temperature == 0.0f ? best_ : best_ / draw_.temperature; }

    // The token; kUndecided where the rounding of a logarithm could decide.
    int64_t token() const {
        if (draw_.temperature == 0.0f) return token_;
        const float error = kKeyError * std::max(first_.magnitude, second_.magnitude);
        return first_.key - second_.key > error ? first_.token : kUndecided;
    }

private:
    static constexpr int64_t kPiece = 256;

    void take(float logit, int64_t token) {
        if (!(logit <= best_) && best_ == best_) {  // NaN, once met, stays; of equals the first
            best_ = logit;
            token_ = token;
        }
    }

    // A token's log-weight and noise, and how large the two are.
    struct Key {
        float key = -INFINITY, magnitude = 0.0f;
        int64_t token = kUndecided;
    };

    void rank(const Key& key) {
        if (key.key > first_.key) {
            second_ = first_;
            first_ = key;
        } else if (key.key > second_.key) {
            second_ = key;
        }
    }

    // What a token must reach to matter.
    float floor() const { return first_.key - kKeyError * first_.magnitude; }

    void sample(const KernelTable& kernels, const float* logits, int64_t first, int64_t count) {
        const PhiloxStream stream = {draw_.seed, draw_.position, kTargetPurpose, 0};
        uint64_t words[kPiece / 2];
        uint32_t halves[kPiece];
        float ceilings[kPiece];
        uint16_t places[kPiece];
        kernels.philox(stream, static_cast<uint64_t>(first) / 8, (count + 7) / 8, words);
        for (int64_t i = 0; i < (count + 1) / 2; ++i) {  // the low half of a word comes first
            halves[2 * i] = static_cast<uint32_t>(words[i]);
            halves[2 * i + 1] = static_cast<uint32_t>(words[i] >> 32);
        }
        const int64_t num_hits = kernels.noise_hits(logits, halves, count, draw_.temperature, floor(), ceilings, places);
        for (int64_t hit = 0; hit < num_hits; ++hit) {
            const int64_t i = places[hit];
            if (!(ceilings[i] >= floor()) || logits[i] == -INFINITY) continue;
            const float log_weight = logits[i] / draw_.temperature, noise = gumbel_of(halves[i]);
            rank({log_weight + noise, std::abs(log_weight) + std::abs(noise), first + i});
        }
    }

    Draw draw_;
    float best_ = -INFINITY;
    int64_t token_ = 0;
    Key first_, second_;
};

}  // namespace outrider
