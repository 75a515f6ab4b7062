// The few largest of a row of logits, in one pass over it.
//
// Maxima of blocks bound what can be among the best: what `count` maxima reach is at most the `count`-th largest logit.
// So the few blocks whose maximum reaches it hold all that is wanted, and these alone are read again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
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
        if (num_blocks >= count_) bound = common_bound();
        found_.clear();
        for (int64_t b = 0; b < num_blocks; ++b) {
            if (maxima_[b] < bound) continue;
            const int64_t begin = b * block_, num_chunks = block_ / kChunk;
            if (num_chunks == 1) {
                take(row, begin, begin + kChunk, bound);
                continue;
            }
            kernels_.block_maxima(row + begin, num_chunks, kChunk, chunks_.data());
            for (int64_t c = 0; c < num_chunks; ++c) {
                if (chunks_[c] >= bound) take(row, begin + c * kChunk, begin + (c + 1) * kChunk, bound);
            }
        }
        take(row, num_blocks * block_, size_, bound);
        std::partial_sort(found_.begin(), found_.begin() + count_, found_.end());
        for (int64_t i = 0; i < count_; ++i) {
            tokens[i] = static_cast<uint32_t>(found_[i]);
            values[i] = row[tokens[i]];
        }
    }

private:
    // Numbers in the order of logits; of both zeros there is one.
    static int32_t in_order(float logit) {
        const float one_zero = logit + 0.0f;
        int32_t bits;
        std::memcpy(&bits, &one_zero, sizeof bits);
        return bits ^ ((bits >> 31) & 0x7FFFFFFF);
    }

    // A logit that at least `count` of the maxima reach, and few more: by bisection, which does not branch by them.
    float common_bound() {
        ordered_.resize(maxima_.size());
        std::transform(maxima_.begin(), maxima_.end(), ordered_.begin(), in_order);
        const auto [least, greatest] = std::minmax_element(ordered_.begin(), ordered_.end());
        int64_t reached = *least, missed = int64_t{*greatest} + 1;
        while (missed - reached > 1) {
            const int64_t middle = reached + (missed - reached) / 2;
            const int32_t bound = static_cast<int32_t>(middle);
            int32_t num_reaching = 0;
            for (const int32_t maximum : ordered_) num_reaching += maximum >= bound;
            (num_reaching >= count_ ? reached : missed) = middle;
            if (num_reaching >= count_ && num_reaching <= count_ + count_ / 4) break;
        }
        const int32_t bits = static_cast<int32_t>(reached) ^ ((static_cast<int32_t>(reached) >> 31) & 0x7FFFFFFF);
        float bound;
        std::memcpy(&bound, &bits, sizeof bound);
        return bound;
    }

    // Keys of the logits that reach the bound: ascending, the logits fall and equals are in the order of their tokens.
    void take(const float* row, int64_t first, int64_t end, float bound) {
        for (int64_t token = first; token < end; ++token) {
            const float order = row[token] == row[token] ? row[token] : kLowest;
            if (order < bound) continue;
            const uint32_t falling = ~(static_cast<uint32_t>(in_order(order)) ^ 0x80000000u);
            found_.push_back(static_cast<uint64_t>(falling) << 32 | static_cast<uint32_t>(token));
        }
    }

    const KernelTable& kernels_;
    int64_t size_, count_, block_;
    std::vector<float> maxima_, chunks_;
    std::vector<int32_t> ordered_;
    std::vector<uint64_t> found_;
};

}  // namespace outrider
