#include "thread_pool.h"

#include <pthread.h>

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

ThreadPool* pool = nullptr;

}  // namespace

void Signal::set(uint32_t value) {
    value_.store(value);
    if (sleepers_.load() > 0) {  // a sleeper counts itself before it looks at the value for the last time
        const std::lock_guard<std::mutex> lock(mutex_);
        changed_.notify_all();
    }
}

void Signal::wait_until_not(uint32_t value) {
    for (int i = 0; i < kSpins; ++i) {
        if (get() != value) return;
        relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(lock, [&] { return value_.load() != value; });
    sleepers_.fetch_sub(1);
}

void Barrier::wait(int num_threads) {
    if (num_threads == 1) return;
    const uint32_t round = round_.get();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < num_threads) return round_.wait_until_not(round);
    arrived_.store(0, std::memory_order_relaxed);
    round_.set(round + 1);
}

ThreadPool& ThreadPool::instance() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new ThreadPool();  // never destroyed: workers may outlive static destructors
        pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    });
    return *pool;
}

// A fork waits for the turn, so that in the child no call is half done and nobody who is gone holds a lock.
void ThreadPool::before_fork() { pool->turn_.lock(); }

void ThreadPool::after_fork_in_parent() { pool->turn_.unlock(); }

// Only the forking thread lives on: the workers are forgotten, and the pool with them.
void ThreadPool::after_fork_in_child() {
    const int num_threads = pool->num_threads();
    pool = new ThreadPool();
    pool->set_num_threads(num_threads);
}

void ThreadPool::set_num_threads(int num_threads) {
    const std::lock_guard<std::mutex> turn(turn_);
    num_threads_ = num_threads;
}

void ThreadPool::start_workers() {
    while (num_workers_ < num_threads_ - 1) {
        const uint32_t seen = started_.get();
        const int thread = num_workers_ + 1;
        std::thread([this, thread, seen] { work(thread, seen); }).detach();  // throws where the system allows no more
        ++num_workers_;
    }
}

void ThreadPool::work(int thread, uint32_t seen) {
    for (;;) {
        started_.wait_until_not(seen);
        seen = started_.get();
        if (thread < team_) {
            std::fesetenv(&environment_);
            job_(argument_, thread, team_);
        }
        if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) finished_.set(seen);
    }
}

void ThreadPool::run(Job job, void* argument) {
    const int num_threads = num_threads_;
    if (num_threads == 1) return job(argument, 0, 1);
    start_workers();
    job_ = job;
    argument_ = argument;
    team_ = num_threads;
    std::fegetenv(&environment_);
    unfinished_.store(num_workers_, std::memory_order_relaxed);
    const uint32_t before = finished_.get();
    started_.set(started_.get() + 1);
    job(argument, 0, num_threads);
    finished_.wait_until_not(before);
}

}  // namespace outrider
