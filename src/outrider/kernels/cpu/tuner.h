// Who fetches weights ahead, so that they come the fastest, depends on the processor, on where its cores lie and on the
// number of rows: prefetches that win a third on one machine lose half on another. So the ways are tried in turns and
// measured while the model runs. None changes a bit of the results.
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
    // What to do now: what is not known yet, the best, or now and then another to see whether it still is.
    Fetch next() {
        ++num_uses_;
        for (int i = 0; i < kNumWays && num_uses_ <= kMostTrials; ++i) {
            const int way = static_cast<int>((num_uses_ + i) % kNumWays);
            if (!is_known(way)) return static_cast<Fetch>(asked_ = way);
        }
        if (num_uses_ % kLookAround == 0) return static_cast<Fetch>(asked_ = static_cast<int>(num_uses_ / kLookAround % kNumWays));
        return static_cast<Fetch>(asked_ = best());
    }

    // How long the last answer took.
    void record(double seconds) {
        seconds_[asked_][num_samples_[asked_] % kSamples] = seconds;
        ++num_samples_[asked_];
        total_s_[asked_] += seconds;
    }

private:
    static constexpr int kNumWays = 3;
    static constexpr int kSamples = 5;         // the median of the last ones counts
    static constexpr double kEnough = 2e-3;    // seconds of samples that are as good as kSamples short ones
    static constexpr int64_t kMostTrials = 64, kLookAround = 128;  // uses

    bool is_known(int way) const { return num_samples_[way] >= kSamples || total_s_[way] >= kEnough; }

    int best() const {
        int best = 0;
        double fewest = 0.0;
        for (int i = 0; i < kNumWays; ++i) {
            const int count = static_cast<int>(std::min<int64_t>(num_samples_[i], kSamples));
            if (count == 0) continue;
            double times[kSamples];
            std::copy(seconds_[i], seconds_[i] + count, times);
            std::nth_element(times, times + count / 2, times + count);
            if (fewest == 0.0 || times[count / 2] < fewest) {
                best = i;
                fewest = times[count / 2];
            }
        }
        return best;
    }

    int asked_ = 0;
    int64_t num_uses_ = 0;
    int64_t num_samples_[kNumWays] = {};
    double total_s_[kNumWays] = {};
    double seconds_[kNumWays][kSamples] = {};
};

// The tuners of layers by their shape. Layers that are too small to be measured have none.
class Tuners {
public:
    Tuner* find(const KernelTable& kernels, const PackedLinear& weight, int num_rows, int num_threads) {
        if (weight.num_panels() * weight.panel_bytes() < kFewestBytes * num_threads) return nullptr;
        const int rows = std::min(num_rows, kMostRows);
        return &tuners_[std::make_tuple(&kernels, static_cast<int>(weight.format), weight.num_inputs, weight.num_outputs, rows)];
    }

private:
    static constexpr int64_t kFewestBytes = 256 << 10;  // of a thread
    static constexpr int kMostRows = 48;                // more are alike

    std::map<std::tuple<const KernelTable*, int, int64_t, int64_t, int>, Tuner> tuners_;
};

// What a layer does for once, and its time if it is measured.
class Trial {
public:
    Trial() = default;
    explicit Trial(Tuner* tuner) : tuner_(tuner) {
        if (forced()) fetch_ = *forced();
        else if (tuner != nullptr) fetch_ = tuner->next();
    }

    Fetch fetch() const { return fetch_; }
    void start() { start_ = std::chrono::steady_clock::now(); }
    void stop() {
        if (tuner_ == nullptr || forced()) return;
        tuner_->record(std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count());
    }

    // The same for everything, for tests.
    static std::optional<Fetch>& forced() {
        static std::optional<Fetch> fetch;
        return fetch;
    }

private:
    Tuner* tuner_ = nullptr;
    Fetch fetch_ = Fetch::kNear;
    std::chrono::steady_clock::time_point start_;
};

}  // namespace outrider
