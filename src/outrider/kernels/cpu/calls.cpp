#include "calls.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "dispatch.h"
#include "thread_pool.h"
#include "workspace.h"

namespace outrider {

void run_linear(const PackedLinear& weight, const float* x, int num_rows, float* out) {
    if (num_rows == 0) return;
    static RowsBuffer& buffer = *new RowsBuffer();  // never destroyed: a thread may still compute while the process ends
    ThreadPool::Turn turn;
    const KernelTable& kernels = active_level();
    const PackedRows rows = buffer.rows_for(kernels, weight, num_rows);
    auto job = [&](int thread, int num_threads) {
        const RowShare mine = share_of_rows(rows, thread, num_threads);
        for (int64_t row = mine.rows.begin; row < mine.rows.end; ++row)
            kernels.pack_row(weight, x + row * weight.num_inputs, rows, static_cast<int>(row), mine.part, mine.num_parts);
        turn.barrier().wait(num_threads);
        const Share panels = share_of(weight.num_panels(), thread, num_threads);
        kernels.linear(weight, rows, out + panels.begin * kPanel, weight.num_outputs, Epilogue::kStore, panels.begin,
                       panels.end);
    };
    turn.run(job);
}

std::vector<AttentionTask> attention_tasks(const AttentionArgs& args, const std::vector<SequenceView>& sequences,
                                           int num_threads) {
    // Blocks of rows share the reading of keys and values; smaller ones where threads would idle.
    int64_t num_rows = 0;
    for (const SequenceView& sequence : sequences) num_rows += sequence.row_end - sequence.row_begin;
    const int64_t per_thread = num_rows * args.keys.num_heads / (4 * num_threads);
    const int rows_per_task = static_cast<int>(std::clamp<int64_t>(per_thread, 8, 64));
    std::vector<AttentionTask> tasks;
    for (int s = 0; s < static_cast<int>(sequences.size()); ++s) {
        for (int row = sequences[s].row_begin; row < sequences[s].row_end; row += rows_per_task) {
            const int end = std::min(row + rows_per_task, sequences[s].row_end);
            for (int head = 0; head < args.keys.num_heads; ++head) tasks.push_back({s, head, row, end});
        }
    }
    return tasks;
}

void run_attention(const AttentionArgs& args, const std::vector<SequenceView>& sequences) {
    static Buffer<float>& buffer = *new Buffer<float>();
    ThreadPool::Turn turn;
    const KernelTable& kernels = active_level();
    const std::vector<AttentionTask> tasks = attention_tasks(args, sequences, turn.num_threads());
    int64_t most_rows = 0;
    for (const SequenceView& s : sequences) most_rows = std::max<int64_t>(most_rows, s.row_end - s.row_begin);
    const size_t scratch = (kernels.attention_scratch(args, most_rows) + 15) / 16 * 16;
    float* memory = buffer.at_least(static_cast<int64_t>(scratch) * turn.num_threads());
    std::atomic<size_t> next{0};
    auto job = [&](int thread, int) {
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks.size();) {
            const AttentionTask& task = tasks[i];
            kernels.attention(args, sequences[task.sequence], task.kv_head, task.row_begin, task.row_end,
                              memory + thread * scratch);
        }
    };
    turn.run(job);
}

void run_write_kv(const float* heads, const KvCache& cache, const int64_t* slots, int num_rows) {
    const KernelTable& kernels = active_level();
    for (int row = 0; row < num_rows; ++row)
        kernels.write_kv(heads + static_cast<int64_t>(row) * cache.num_heads * cache.width, cache, slots[row]);
}

double time_reading(const void* data, int64_t num_bytes) {
    ThreadPool::Turn turn;
    const KernelTable& kernels = active_level();
    std::atomic<uint64_t> seen{0};
    auto job = [&](int thread, int num_threads) {
        const Share mine = share_of(num_bytes / 4096, thread, num_threads);
        seen += kernels.read_memory(static_cast<const char*>(data) + mine.begin * 4096,
                                    static_cast<size_t>(mine.end - mine.begin) * 4096);
    };
    const auto start = std::chrono::steady_clock::now();
    turn.run(job);
    const auto stop = std::chrono::steady_clock::now();
    return std::chrono::duration<double>(stop - start).count();
}

}  // namespace outrider
