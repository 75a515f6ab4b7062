// What a row of logits is chosen by: its greatest logit, or a sample of it with the Gumbel noise of sampling/noise.py.
//
// A row is seen stretch by stretch. The noise of a token lies between bounds that a table has for the leading bits of
// its random number, so logarithms are taken only of the few tokens that can still be the greatest.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "drafting/noise.h"

namespace outrider {

// How a row's token is drawn; temperature 0 takes the greatest logit.
struct Draw {
    float temperature = 0.0f;
    uint64_t seed = 0, position = 0;
};

// Bounds of -log(-log(u)), u = (half + 0.5) / 2^32, for all numbers whose complement has the same exponent and first
// seven bits: steps of at most 1/128 where the noise is large, which is where tokens win.
class NoiseBounds {
public:
    static const NoiseBounds& instance() {
        static const NoiseBounds bounds;
        return bounds;
    }

    static uint32_t bin(uint32_t half) {
        const uint32_t complement = ~half | 1u;
        const int exponent = 31 - __builtin_clz(complement);
        const uint32_t fraction = static_cast<uint32_t>((uint64_t{complement} << kBits) >> exponent) & ((1u << kBits) - 1);
        return static_cast<uint32_t>(exponent) << kBits | fraction;
    }
    float least(uint32_t bin) const { return least_[bin]; }
    float most(uint32_t bin) const { return most_[bin]; }

private:
    static constexpr int kBits = 7;
    static constexpr int kBins = 32 << kBits;

    NoiseBounds() {
        for (int bin = 0; bin < kBins; ++bin) {
            // The last bit of a complement counts as set, so a bin may hold one number less than its first.
            most_[bin] = std::nextafter(noise(edge(bin) - 1.0), INFINITY);
            least_[bin] = std::nextafter(noise(edge(bin + 1)), -INFINITY);
        }
    }
    static double edge(int bin) {
        return std::ldexp(1.0 + (bin & ((1 << kBits) - 1)) / static_cast<double>(1 << kBits), bin >> kBits);
    }
    static float noise(double complement) {
        const double rest = (std::clamp(std::floor(complement), 0.0, 4294967295.0) + 0.5) * 0x1p-32;
        return static_cast<float>(-std::log(-std::log1p(-rest)));
    }

    std::array<float, kBins> least_, most_;
};

constexpr int64_t kUndecided = -1;

class RowChoice {
public:
    // Before a stretch of a row that begins with token `first`.
    void begin(const Draw& draw, int64_t first) {
        draw_ = draw;
        best_ = -INFINITY;
        token_ = first;
        floor_ = -INFINITY;
        candidates_.clear();
    }

    // The next logits, of tokens [first, first + count); `first` is a multiple of 8.
    void see(const float* logits, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; ++i) take(logits[i], first + i);
        if (draw_.temperature == 0.0f) return;
        const NoiseBounds& bounds = NoiseBounds::instance();
        const PhiloxStream stream = {draw_.seed, draw_.position, kTargetPurpose, 0};
        for (int64_t i = 0; i < count; i += 8) {
            uint64_t words[4];
            stream.block(static_cast<uint64_t>(first + i) / 8, words);
            for (int64_t j = 0; j < std::min<int64_t>(8, count - i); ++j) {
                const uint32_t half = static_cast<uint32_t>(words[j / 2] >> (j % 2 ? 32 : 0));
                const uint32_t bin = NoiseBounds::bin(half);
                const float log_weight = logits[i + j] / draw_.temperature;
                const float most = log_weight + bounds.most(bin);
                if (!(most >= floor_) || log_weight == -INFINITY) continue;
                candidates_.push_back({first + i + j, log_weight, most, half});
                floor_ = std::max(floor_, log_weight + bounds.least(bin));
            }
        }
    }

    // Takes in what was seen of later tokens.
    void merge(const RowChoice& later) {
        take(later.best_, later.token_);
        floor_ = std::max(floor_, later.floor_);
        candidates_.insert(candidates_.end(), later.candidates_.begin(), later.candidates_.end());
    }

    // The greatest log-weight of the row; NaN if there was one.
    float best() const { return draw_.temperature == 0.0f ? best_ : best_ / draw_.temperature; }

    // The token; kUndecided where the rounding of a logarithm could decide.
    int64_t token() const {
        if (draw_.temperature == 0.0f) return token_;
        float first = -INFINITY, second = -INFINITY, greatest = 0.0f;
        int64_t chosen = kUndecided;
        for (const Candidate& candidate : candidates_) {
            if (candidate.most < floor_) continue;
            const float noise = gumbel_of(candidate.half), key = candidate.log_weight + noise;
            greatest = std::max(greatest, std::abs(candidate.log_weight) + std::abs(noise));
            if (key > first) {
                second = first;
                first = key;
                chosen = candidate.token;
            } else {
                second = std::max(second, key);
            }
        }
        return first - second > kKeyError * greatest ? chosen : kUndecided;
    }

private:
    struct Candidate {
        int64_t token;
        float log_weight, most;
        uint32_t half;
    };

    void take(float logit, int64_t token) {
        if (!(logit <= best_) && best_ == best_) {  // NaN, once met, stays; of equals the first
            best_ = logit;
            token_ = token;
        }
    }

    Draw draw_;
    float best_ = -INFINITY, floor_ = -INFINITY;
    int64_t token_ = 0;
    std::vector<Candidate> candidates_;
};

}  // namespace outrider
