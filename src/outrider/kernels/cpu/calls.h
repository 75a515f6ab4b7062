// Single kernels over the whole thread pool: what a model that runs in Python calls.
#pragma once

#include <atomic>
#include <vector>

#include "kernel_table.h"

namespace outrider {

// out [num_rows, N] = x [num_rows, K] W^T + bias
void run_linear(const PackedLinear& weight, const float* x, int num_rows, float* out);

void run_attention(const AttentionArgs& args, const std::vector<SequenceView>& sequences);

// Keys or values [num_rows][heads * width] to their slots.
void run_write_kv(const float* heads, const KvCache& cache, const int64_t* slots, int num_rows);

// Seconds that all threads together take to read the memory once, in one of the ways in which weights are read.
double time_reading(const void* data, int64_t num_bytes, Fetch fetch);

// What an attention call consists of, the most expensive first, and the floats that each thread needs for it.
struct AttentionPlan {
    std::vector<AttentionTask> tasks;
    int64_t scratch_size;
};

AttentionPlan plan_attention(const KernelTable& kernels, const AttentionArgs& args,
                             const std::vector<SequenceView>& sequences, int num_threads);

// A thread's part of a call: run(task, next task or null). Each takes the task of its number, then from `next`, which begins
// at the number of threads.
template <class Run>
void run_tasks(const AttentionPlan& plan, std::atomic<size_t>& next, int thread, Run run) {
    for (size_t i = thread; i < plan.tasks.size();) {
        const size_t after = next.fetch_add(1, std::memory_order_relaxed);
        run(plan.tasks[i], after < plan.tasks.size() ? &plan.tasks[after] : nullptr);
        i = after;
    }
}

}  // namespace outrider
