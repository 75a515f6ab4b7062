#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace outrider {
namespace {

constexpr int kSpins = 4000;  // some tens of microseconds: the time between the layers of a model in Python

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

template <class Condition>
void spin_until(Condition condition) {
    for (int i = 0; !condition(); ++i) {
        if (i < kSpins) {
            relax();
        } else {
            sched_yield();
        }
    }
}

ThreadPool* pool = nullptr;

// Only the forking thread lives on in the child: forget the workers (and whatever lock one of them held).
void forget_workers() {
    if (pool == nullptr) return;
    const int num_threads = pool->num_threads();
    pool = new ThreadPool();
    pool->set_num_threads(num_threads);
}

}  // namespace

void Barrier::wait(int num_threads) {
    if (num_threads == 1) return;
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
}

ThreadPool& ThreadPool::instance() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new ThreadPool();  // never destroyed: workers may outlive static destructors
        pthread_atfork(nullptr, nullptr, forget_workers);
    });
    return *pool;
}

void ThreadPool::set_num_threads(int num_threads) {
    const std::lock_guard<std::mutex> turn(turn_);
    num_threads_ = num_threads;
}

void ThreadPool::start_workers() {
    while (num_workers_ < num_threads_ - 1) {
        const uint32_t epoch = epoch_.load();
        const int thread = ++num_workers_;
        std::thread([this, thread, epoch] { work(thread, epoch); }).detach();
    }
}

void ThreadPool::work(int thread, uint32_t epoch) {
    for (;;) {
        for (int i = 0; i < kSpins && epoch_.load(std::memory_order_acquire) == epoch; ++i) relax();
        if (epoch_.load(std::memory_order_acquire) == epoch) {
            std::unique_lock<std::mutex> lock(sleep_);
            wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != epoch; });
        }
        epoch = epoch_.load(std::memory_order_acquire);
        if (thread < team_) job_(argument_, thread, team_);
        unfinished_.fetch_sub(1, std::memory_order_acq_rel);
    }
}

void ThreadPool::run(Job job, void* argument) {
    const std::lock_guard<std::mutex> turn(turn_);
    if (num_threads_ == 1) return job(argument, 0, 1);
    start_workers();
    job_ = job;
    argument_ = argument;
    team_ = num_threads_;
    unfinished_.store(num_workers_, std::memory_order_relaxed);
    {
        const std::lock_guard<std::mutex> lock(sleep_);
        epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job(argument, 0, num_threads_);
    spin_until([&] { return unfinished_.load(std::memory_order_acquire) == 0; });
}

}  // namespace outrider
