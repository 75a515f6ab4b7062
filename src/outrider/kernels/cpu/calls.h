// Single kernels over the whole thread pool: what a model that runs in Python calls.
#pragma once

#include <vector>

#include "kernel_table.h"

namespace outrider {

// out [num_rows, N] = x [num_rows, K] W^T + bias
void run_linear(const PackedLinear& weight, const float* x, int num_rows, float* out);

void run_attention(const AttentionArgs& args, const std::vector<SequenceView>& sequences);

// Keys or values [num_rows][heads * width] to their slots.
void run_write_kv(const float* heads, const KvCache& cache, const int64_t* slots, int num_rows);

// Seconds that all threads together take to read the memory once.
double time_reading(const void* data, int64_t num_bytes);

// Some rows of a sequence and one of its key/value heads.
struct AttentionTask {
    int sequence, kv_head, row_begin, row_end;
};

std::vector<AttentionTask> attention_tasks(const AttentionArgs& args, const std::vector<SequenceView>& sequences,
                                           int num_threads);

}  // namespace outrider
