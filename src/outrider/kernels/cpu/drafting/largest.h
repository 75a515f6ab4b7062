// The few largest of a row of logits, in one pass over it.
//
// Maxima of blocks bound what can be among the best: the `count`-th largest maximum is at most the `count`-th largest
// logit. So the few blocks whose maximum reaches it hold all that is wanted, and these alone are read again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "../dispatch.h"

namespace outrider {

constexpr int64_t kChunk = 16;          // logits that are compared side by side
constexpr int64_t kBlocksPerBest = 16;  // so many blocks a wanted logit: a sixteenth of the row is read again
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// The `count` largest of `size` logits, falling, of equals the first; NaN counts as the lowest.
class Largest {
public:
    Largest(int64_t size, int64_t count)
        : kernels_(active_level()),
          size_(size),
          count_(count),
          block_(std::max<int64_t>(1, size / (kBlocksPerBest * count * kChunk)) * kChunk),
          maxima_(size / block_),
          chunks_(block_ / kChunk) {}

    void find(const float* row, int64_t* tokens, float* values) {
        const int64_t num_blocks = size_ / block_;
        float bound = kLowest;
        kernels_.block_maxima(row, num_blocks, block_, maxima_.data());
        if (num_blocks >= count_) {
            sorted_ = maxima_;
            std::nth_element(sorted_.begin(), sorted_.begin() + (count_ - 1), sorted_.end(), std::greater<float>());
            bound = sorted_[count_ - 1];
        }
        found_.clear();
        for (int64_t b = 0; b < num_blocks; ++b) {
            if (maxima_[b] < bound) continue;
            const float* block = row + b * block_;
            kernels_.block_maxima(block, block_ / kChunk, kChunk, chunks_.data());
            for (int64_t c = 0; c < block_ / kChunk; ++c) {
                if (chunks_[c] >= bound) take(row, b * block_ + c * kChunk, b * block_ + (c + 1) * kChunk, bound);
            }
        }
        take(row, num_blocks * block_, size_, bound);
        std::partial_sort(found_.begin(), found_.begin() + count_, found_.end(), [](const Logit& a, const Logit& b) {
            return a.order > b.order || (a.order == b.order && a.token < b.token);
        });
        for (int64_t i = 0; i < count_; ++i) {
            tokens[i] = found_[i].token;
            values[i] = row[found_[i].token];
        }
    }

private:
    struct Logit {
        float order;
        int64_t token;
    };

    void take(const float* row, int64_t first, int64_t end, float bound) {
        for (int64_t token = first; token < end; ++token) {
            const float order = row[token] == row[token] ? row[token] : kLowest;
            if (order >= bound) found_.push_back({order, token});
        }
    }

    const KernelTable& kernels_;
    int64_t size_, count_, block_;
    std::vector<float> maxima_, chunks_, sorted_;
    std::vector<Logit> found_;
};

}  // namespace outrider
