// Who fetches weights ahead, so that they come the fastest, depends on the processor, on where its cores lie and on the
// number of rows: prefetches that win a third on one machine lose half on another. So the ways are tried in turns and
// measured while the model runs. None changes a bit of the results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <tuple>

#include "kernel_table.h"

namespace outrider {

// One kind of layer with one number of rows. Used by one thread at a time.
//
// Memory changes its speed by a factor of two within moments, so ways are compared only within rounds, in which each has
// one use right after the other. The first rounds follow each other for some milliseconds, then there are some uses between
// them: an output layer would else be read in worse ways for dozens of forwards. One every now and then afterwards: it costs
// the little by which the worse ways are worse, and what the first rounds saw of pages that were new is soon forgotten.
class Tuner {
public:
    // What to do now.
    Fetch next() {
        if (turn_ == kNumWays && --num_until_round_ <= 0) turn_ = 0;
        return static_cast<Fetch>(turn_ < kNumWays ? turn_ : best_);
    }

    // How long the last answer took.
    void record(double seconds) {
        if (turn_ == kNumWays) return;
        round_[turn_] = seconds;
        if (++turn_ < kNumWays) return;
        double total = 0.0;
        for (double way : round_) total += way;
        for (int i = 0; i < kNumWays; ++i) parts_[i][num_rounds_ % kRounds] = round_[i] / total;
        ++num_rounds_;
        total_s_ += total;
        best_ = fastest();
        num_until_round_ = num_rounds_ >= kRounds ? kUsesBetween : total_s_ < kAtOnce ? 0 : kUsesBetweenFirst;
    }

private:
    static constexpr int kNumWays = 3;
    static constexpr int kRounds = 15;        // the median of the last ones counts
    static constexpr double kAtOnce = 5e-3;   // seconds of the first ones
    static constexpr int kUsesBetween = 96, kUsesBetweenFirst = 12;  // kRounds

    int fastest() const {
        const int count = static_cast<int>(std::min<int64_t>(num_rounds_, kRounds));
        double medians[kNumWays];
        for (int i = 0; i < kNumWays; ++i) {
            double parts[kRounds];
            std::copy(parts_[i], parts_[i] + count, parts);
            std::nth_element(parts, parts + count / 2, parts + count);
            medians[i] = parts[count / 2];
        }
        return static_cast<int>(std::min_element(medians, medians + kNumWays) - medians);
    }

    int turn_ = 0;  // of a round; kNumWays between two
    int best_ = 0, num_until_round_ = 0;
    int64_t num_rounds_ = 0;
    double total_s_ = 0.0;
    double round_[kNumWays] = {};             // seconds
    double parts_[kNumWays][kRounds] = {};    // of a round's
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

// What a layer does for once.
class Trial {
public:
    Trial() = default;
    explicit Trial(Tuner* tuner) : tuner_(tuner) {
        if (forced()) fetch_ = *forced();
        else if (tuner != nullptr) fetch_ = tuner->next();
    }

    Fetch fetch() const { return fetch_; }
    // Its time, if it is measured.
    void record(double seconds) {
        if (tuner_ != nullptr && !forced()) tuner_->record(seconds);
    }

    // The same for everything, for tests.
    static std::optional<Fetch>& forced() {
        static std::optional<Fetch> fetch;
        return fetch;
    }

private:
    Tuner* tuner_ = nullptr;
    Fetch fetch_ = Fetch::kNear;
};

}  // namespace outrider
