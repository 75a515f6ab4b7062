// The few largest of rows of logits, in one pass over each.
//
// Maxima of blocks bound what can be among the best: what `count` maxima reach is at most the `count`-th largest logit.
// So the few blocks whose maximum reaches it hold all that is wanted, and these alone are read again; or at all, where whoever
// made the logits has left the maxima beside them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "../dispatch.h"
#include "../thread_pool.h"

namespace outrider {

constexpr int64_t kChunk = 16;          // logits that are compared side by side
constexpr int64_t kBlocksPerBest = 16;  // so many blocks a wanted logit: a sixteenth of the row is read again
constexpr int64_t kMostRanked = 256;    // found logits that are all compared with each other
constexpr int64_t kSharedLogits = 1 << 19;  // fewer are read by one thread before another one has woken up
constexpr int64_t kGivenPerBest = 8;    // fewer given maxima a wanted logit bound too little
constexpr int64_t kAhead = 16;          // blocks
constexpr float kLowest = -std::numeric_limits<float>::infinity(), kGreatest = -kLowest;

struct LogitRows {
    const float* logits;  // [num_rows][size]
    const float* maxima;  // [num_rows][num_maxima(size)] or null: the greatest of each block; where there is NaN, it is too
    int64_t num_rows, size;
};

// The `count` largest of `size` logits, falling, of equals the first; NaN counts as the lowest.
class Largest {
public:
    // `has_maxima`: those of blocks of kMaximaBlock are given.
    Largest(int64_t size, int64_t count, bool has_maxima)
        : kernels_(active_level()),
          size_(size),
          count_(count),
          block_(has_maxima ? kMaximaBlock : std::max<int64_t>(1, size / (kBlocksPerBest * count * kChunk)) * kChunk),
          num_blocks_(size / block_),
          maxima_(num_blocks_),
          ordered_(num_blocks_),
          blocks_(new uint32_t[num_blocks_]),
          places_(new uint32_t[size]) {}

    void find(const float* row, const float* given, int64_t* tokens, float* values) {
        const bool is_given = given != nullptr && kernels_.greatest(given, num_blocks_) <= kGreatest;  // no NaN
        if (!is_given) kernels_.block_maxima(row, num_blocks_, block_, maxima_.data());
        const float* maxima = is_given ? given : maxima_.data();
        const float bound = is_given ? bound_of(given) : num_blocks_ >= count_ ? common_bound(maxima, num_blocks_) : kLowest;
        num_found_ = 0;
        if (bound == kLowest) {
            take(0, size_);
            return sort(row, tokens, values);
        }
        const int64_t num_whole = num_blocks_ / kChunk * kChunk;
        int64_t num_reaching = kernels_.places_reaching(maxima, num_whole, bound, 0, blocks_.get());
        for (int64_t b = num_whole; b < num_blocks_; ++b)
            if (maxima[b] >= bound) blocks_[num_reaching++] = static_cast<uint32_t>(b);
        for (int64_t i = 0; i < num_reaching; ++i) {
            const int64_t begin = blocks_[i] * block_;
            if (i + kAhead < num_reaching)  // they stand too far apart for the processor to foresee
                for (int64_t j = 0; j < block_; j += 16) prefetch(row + blocks_[i + kAhead] * block_ + j);
            uint32_t* places = places_.get() + num_found_;
            num_found_ += kernels_.places_reaching(row + begin, block_, bound, static_cast<uint32_t>(begin), places);
        }
        for (int64_t token = num_blocks_ * block_; token < size_; ++token) {
            if (row[token] >= bound) take(token, token + 1);
        }
        num_found_ <= kMostRanked ? rank(row, tokens, values) : sort(row, tokens, values);
    }

private:
    float common_bound(const float* maxima, int64_t number) {
        return kernels_.common_bound(maxima, number, count_, ordered_.data());
    }

    // Of maxima that are given, and many, the maxima of groups bound nearly as well.
    float bound_of(const float* given) {
        const int64_t num_groups = num_blocks_ / kChunk;
        if (num_groups < 4 * count_) return common_bound(given, num_blocks_);
        kernels_.block_maxima(given, num_groups, kChunk, maxima_.data());
        return common_bound(maxima_.data(), num_groups);
    }

    void take(int64_t first, int64_t end) {
        for (int64_t token = first; token < end; ++token) places_[num_found_++] = static_cast<uint32_t>(token);
    }

    // Without a branch that depends on the logits.
    void rank(const float* row, int64_t* tokens, float* values) {
        int32_t keys[kMostRanked], ranks[kMostRanked];
        for (int64_t i = 0; i < num_found_; ++i) keys[i] = in_order(row[places_[i]]);
        kernels_.rank_keys(keys, num_found_, ranks);
        for (int64_t i = 0; i < num_found_; ++i) {
            if (ranks[i] >= count_) continue;
            tokens[ranks[i]] = places_[i];
            values[ranks[i]] = row[places_[i]];
        }
    }

    void sort(const float* row, int64_t* tokens, float* values) {
        const auto key = [&](uint32_t token) { return in_order(row[token] == row[token] ? row[token] : kLowest); };
        uint32_t* first = places_.get();
        std::partial_sort(first, first + count_, first + num_found_, [&](uint32_t a, uint32_t b) {
            const int32_t key_a = key(a), key_b = key(b);
            return key_a > key_b || (key_a == key_b && a < b);
        });
        for (int64_t i = 0; i < count_; ++i) {
            tokens[i] = first[i];
            values[i] = row[first[i]];
        }
    }

    const KernelTable& kernels_;
    int64_t size_, count_, block_, num_blocks_, num_found_ = 0;
    std::vector<float> maxima_;
    std::vector<int32_t> ordered_;
    std::unique_ptr<uint32_t[]> blocks_, places_;
};

// The same of each row, by the kernels' threads if there is enough to read.
inline void find_largest(const LogitRows& rows, int64_t count, int64_t* tokens, float* values) {
    const bool has_maxima = rows.maxima != nullptr && rows.size / kMaximaBlock >= kGivenPerBest * count;
    std::vector<std::unique_ptr<Largest>> of_thread;
    std::atomic<int64_t> next{0};
    auto work = [&](int thread, int) {
        for (int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < rows.num_rows;) {
            const float* maxima = has_maxima ? rows.maxima + row * num_maxima(rows.size) : nullptr;
            of_thread[thread]->find(rows.logits + row * rows.size, maxima, tokens + row * count, values + row * count);
        }
    };
    const auto prepare = [&](int64_t num_threads) {  // a job of the pool must not throw
        while (static_cast<int64_t>(of_thread.size()) < num_threads)
            of_thread.push_back(std::make_unique<Largest>(rows.size, count, has_maxima));
    };
    if (has_maxima || rows.num_rows < 2 || rows.num_rows * rows.size < kSharedLogits) {
        prepare(1);
        return work(0, 1);
    }
    ThreadPool::Turn turn;
    prepare(turn.num_threads());
    turn.run(work);
}

}  // namespace outrider
