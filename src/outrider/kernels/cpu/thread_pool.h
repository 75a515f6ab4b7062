// A few threads that run one function together and meet at barriers.
#pragma once

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace outrider {

// A number that threads wait to see changed. They spin first, since the others are mostly there within microseconds;
// then they sleep, so that a thread that lost its core to another process gets one again.
class Signal {
public:
    uint32_t get() const { return value_.load(std::memory_order_acquire); }
    void set(uint32_t value);
    void wait_until_not(uint32_t value);

private:
    alignas(64) std::atomic<uint32_t> value_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

// Where the threads of a team wait for each other.
class Barrier {
public:
    void wait(int num_threads);

private:
    alignas(64) std::atomic<int> arrived_{0};
    Signal round_;
};

class ThreadPool {
public:
    static ThreadPool& instance();

    // A caller's turn: until it ends no other caller runs, the number of threads stays, and no process is forked. So
    // memory that calls reuse is the caller's too.
    class Turn {
    public:
        Turn() : pool_(instance()), lock_(pool_.turn_) {}

        int num_threads() const { return pool_.num_threads_.load(std::memory_order_relaxed); }
        Barrier& barrier() { return pool_.barrier_; }

        // Runs f(thread, num_threads) on all threads, the caller being thread 0. It must not throw.
        template <class F>
        void run(F& f) {
            pool_.run([](void* argument, int thread, int count) { (*static_cast<F*>(argument))(thread, count); }, &f);
        }

    private:
        ThreadPool& pool_;
        std::lock_guard<std::mutex> lock_;
    };

    int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }
    void set_num_threads(int num_threads);

private:
    using Job = void (*)(void* argument, int thread, int num_threads);

    static void before_fork();
    static void after_fork_in_parent();
    static void after_fork_in_child();
    void run(Job job, void* argument);
    void start_workers();
    void work(int thread, uint32_t seen);

    std::mutex turn_;
    std::atomic<int> num_threads_{1};
    int num_workers_ = 0;
    Barrier barrier_;
    Job job_ = nullptr;
    void* argument_ = nullptr;
    std::fenv_t environment_;  // the caller's rounding and flushing: a row's bits may not depend on who computes it
    int team_ = 1;
    Signal started_, finished_;  // counts of jobs
    alignas(64) std::atomic<int> unfinished_{0};
};

}  // namespace outrider
