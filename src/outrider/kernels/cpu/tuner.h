// Which way of reading weights is the fastest depends on the processor, on where its cores lie and on the number of rows:
// prefetches that win a third on one machine lose half on another. So they are tried in turns and measured while the model
// runs. None changes a bit of the results.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <tuple>

#include "kernel_table.h"

namespace outrider {

// One kind of layer with one number of rows. Used by one thread at a time.
class Tuner {
public:
    explicit Tuner(bool has_lone_blocks) : num_ways_(has_lone_blocks ? kNumWays : kNumWays / 2) {}

    // The way to take now: one that is not known yet, the best, or now and then another to see whether it still is.
    Way next() {
        ++num_uses_;
        int least = 0;
        for (int i = 1; i < num_ways_; ++i)
            if (num_samples_[i] < num_samples_[least]) least = i;
        if (num_samples_[least] < kSamples) return ways_[asked_ = least];
        if (num_uses_ % kLookAround == 0) return ways_[asked_ = static_cast<int>(num_uses_ / kLookAround % num_ways_)];
        return ways_[asked_ = best()];
    }

    // How long the last answer took.
    void record(double seconds) {
        seconds_[asked_][num_samples_[asked_] % kSamples] = seconds;
        ++num_samples_[asked_];
    }

private:
    static constexpr int kSamples = 5;
    static constexpr int64_t kLookAround = 128;  // uses
    static constexpr int kNumWays = 6;
    static constexpr Way ways_[kNumWays] = {{Fetch::kFar, false},  {Fetch::kNear, false}, {Fetch::kProcessor, false},
                                            {Fetch::kFar, true},   {Fetch::kNear, true},  {Fetch::kProcessor, true}};

    int best() const {
        int best = 0;
        double fewest = 0.0;
        for (int i = 0; i < num_ways_; ++i) {
            double times[kSamples];
            std::copy(seconds_[i], seconds_[i] + kSamples, times);
            std::nth_element(times, times + kSamples / 2, times + kSamples);
            if (i == 0 || times[kSamples / 2] < fewest) {
                best = i;
                fewest = times[kSamples / 2];
            }
        }
        return best;
    }

    int num_ways_, asked_ = 0;
    int64_t num_uses_ = 0;
    int64_t num_samples_[kNumWays] = {};
    double seconds_[kNumWays][kSamples] = {};
};

// The tuners of layers by their shape. Layers that are too small to be measured have none.
class Tuners {
public:
    Tuner* find(const KernelTable& kernels, const PackedLinear& weight, int num_rows, int num_threads) {
        if (weight.num_panels() * weight.panel_bytes() < kFewestBytes * num_threads) return nullptr;
        const int most = kernels.lone_rows[weight.format];
        const bool has_lone_blocks = num_rows > kernels.block_rows[weight.format] && num_rows <= most;
        const int rows = std::min(num_rows, 2 * most);  // more rows than that are alike
        const auto key = std::make_tuple(&kernels, static_cast<int>(weight.format), weight.num_inputs, weight.num_outputs, rows);
        return &tuners_.try_emplace(key, has_lone_blocks).first->second;
    }

private:
    static constexpr int64_t kFewestBytes = 256 << 10;  // of a thread

    std::map<std::tuple<const KernelTable*, int, int64_t, int64_t, int>, Tuner> tuners_;
};

// A layer's way for once, and its time if it is measured.
class Trial {
public:
    Trial() = default;
    explicit Trial(Tuner* tuner) : tuner_(tuner), way_(forced().value_or(tuner == nullptr ? kUsualWay : tuner->next())) {}

    Way way() const { return way_; }
    void start() { start_ = std::chrono::steady_clock::now(); }
    void stop() {
        if (tuner_ == nullptr || forced()) return;
        tuner_->record(std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count());
    }

    // One way for everything, for tests.
    static std::optional<Way>& forced() {
        static std::optional<Way> way;
        return way;
    }

private:
    Tuner* tuner_ = nullptr;
    Way way_ = kUsualWay;
    std::chrono::steady_clock::time_point start_;
};

}  // namespace outrider
