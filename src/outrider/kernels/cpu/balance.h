// How the panels of layers are divided among threads. Cores of one machine read memory at different speeds (fast and slow
// cores, two dies, a busy neighbour), and an equal division lets all wait for the slowest. So each thread's speed is
// measured while the model runs. No division changes a bit of the results.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "workspace.h"

namespace outrider {

// Time since it was made.
class Lap {
public:
    double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

private:
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

class Balance {
public:
    // Before the threads start.
    void set_num_threads(int num_threads) {
        if (speeds_.size() == static_cast<size_t>(num_threads)) return;
        work_.assign(num_threads, {});
        speeds_.assign(num_threads, 0.0);
        divide(std::vector<double>(num_threads, 1.0));
    }

    // A thread's part of `count` panels.
    Share share_of(int64_t count, int thread) const {
        const std::vector<double>& bounds = forced().empty() ? bounds_ : forced();
        return {std::llround(count * bounds[thread]), std::llround(count * bounds[thread + 1])};
    }

    // What a thread has read, by that thread. Too little to be measured does not count.
    void record(int thread, int64_t num_bytes, double seconds) {
        if (num_bytes < kFewestBytes) return;
        work_[thread].num_bytes += num_bytes;
        work_[thread].seconds += seconds;
    }

    // By one thread, while no other records or asks for its part.
    void update() {
        for (const Work& work : work_)
            if (work.num_bytes == 0) return;
        for (size_t i = 0; i < speeds_.size(); ++i) {
            const double speed = work_[i].num_bytes / std::max(work_[i].seconds, 1e-9);
            speeds_[i] += (speed - speeds_[i]) * (speeds_[i] == 0.0 ? 1.0 : kWeight);
            work_[i] = {};
        }
        const double most = *std::max_element(speeds_.begin(), speeds_.end());
        const bool alike = *std::min_element(speeds_.begin(), speeds_.end()) > most * kAlike;
        std::vector<double> parts(speeds_);
        for (double& part : parts) part = alike ? 1.0 : std::max(part, most * kLeast);
        divide(parts);
    }

    // Where each thread's part begins, of 1, and the end, instead of what was measured; for tests.
    static std::vector<double>& forced() {
        static std::vector<double> bounds;
        return bounds;
    }

private:
    static constexpr int64_t kFewestBytes = 256 << 10;
    static constexpr double kWeight = 1.0 / 32;  // of the newest speed
    static constexpr double kAlike = 15.0 / 16;  // of the fastest: to follow noise costs a panel now and then
    static constexpr double kLeast = 1.0 / 4;   // of the fastest thread's part; a thread without any would not be measured

    struct alignas(64) Work {
        int64_t num_bytes = 0;
        double seconds = 0.0;
    };

    void divide(const std::vector<double>& parts) {
        bounds_.assign(1, 0.0);
        const double total = std::accumulate(parts.begin(), parts.end(), 0.0);
        for (double part : parts) bounds_.push_back(bounds_.back() + part / total);
        bounds_.back() = 1.0;
    }

    std::vector<Work> work_;
    std::vector<double> speeds_;  // bytes per second
    std::vector<double> bounds_;
};

}  // namespace outrider
