// A few threads that run one function together and meet at barriers.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace outrider {

// Where the threads of a team wait for each other. They spin, since they arrive within microseconds; a thread whose
// partner lost its core gives up its own after a while.
class Barrier {
public:
    void wait(int num_threads);

private:
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

class ThreadPool {
public:
    static ThreadPool& instance();

    using Job = void (*)(void* argument, int thread, int num_threads);
    // Runs job on all threads, the caller being thread 0. Callers from several threads take turns.
    void run(Job job, void* argument);

    template <class F>
    void run(F& f) {
        run([](void* argument, int thread, int num_threads) { (*static_cast<F*>(argument))(thread, num_threads); }, &f);
    }

    int num_threads() const { return num_threads_; }
    void set_num_threads(int num_threads);
    Barrier& barrier() { return barrier_; }

private:
    void start_workers();
    void work(int thread, uint32_t epoch);

    std::mutex turn_;
    int num_threads_ = 1, num_workers_ = 0;
    Barrier barrier_;
    Job job_ = nullptr;
    void* argument_ = nullptr;
    int team_ = 1;
    std::mutex sleep_;
    std::condition_variable wake_;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<int> unfinished_{0};
};

}  // namespace outrider
