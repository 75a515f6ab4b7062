#include "calls.h"

#include <algorithm>
#include <atomic>

#include "balance.h"
#include "dispatch.h"
#include "thread_pool.h"
#include "tuner.h"
#include "workspace.h"

namespace outrider {
namespace {

constexpr int64_t kReadAtOnce = 1 << 20;  // bytes
constexpr int64_t kTasksPerThread = 4;  // so that a thread that was held up does not hold up all
constexpr int64_t kReading = 8;         // what reading and converting a key and its value costs, in queries
constexpr int64_t kSplitBytes = 128 << 10, kSumsBytes = 64 << 10;  // of an attention task

}  // namespace

void run_linear(const PackedLinear& weight, const float* x, int num_rows, float* out) {
    if (num_rows == 0) return;
    static RowsBuffer& buffer = *new RowsBuffer();  // never destroyed: a thread may still compute while the process ends
    ThreadPool::Turn turn;
    const KernelTable& kernels = active_level();
    static Buffer<uint32_t>& words_buffer = *new Buffer<uint32_t>();
    static Tuners& tuners = *new Tuners();
    Trial trial(tuners.find(kernels, weight, num_rows, turn.num_threads()));
    const PackedRows rows = buffer.rows_for(kernels, weight, num_rows, turn.num_threads(), trial.fetch());
    uint32_t* const words = words_buffer.at_least(num_words(rows) * turn.num_threads());
    auto job = [&](int thread, int num_threads) {
        pack_share(
            kernels, weight, rows, thread, num_threads, words + thread * num_words(rows),
            [&](int row) { return FloatRow{x + row * weight.num_inputs, kPanel}; },
            [&](int, const FloatRow& in) { return kernels.largest_magnitude(in, weight.num_inputs); });
        turn.barrier().wait(num_threads);
        const Lap lap;
        const Share panels = share_of(weight.num_panels(), thread, num_threads);
        kernels.linear(weight, rows, out + panels.begin * kPanel, weight.num_outputs, kPanel, Epilogue::kStore, panels.begin,
                       panels.end, nullptr);
        if (thread == 0) trial.record(lap.seconds());
    };
    turn.run(job);
}

AttentionPlan plan_attention(const KernelTable& kernels, const AttentionArgs& args,
                             const std::vector<SequenceView>& sequences, int num_threads) {
    // Blocks of rows share the reading of keys and values; smaller ones where threads would idle.
    int64_t num_rows = 0, most_rows = 0;
    for (const SequenceView& sequence : sequences) {
        const int64_t rows = sequence.row_end - sequence.row_begin;
        num_rows += rows;
        most_rows = std::max(most_rows, rows);
    }
    const int num_heads = args.keys.num_heads, group = args.num_heads / num_heads;
    const int64_t per_thread = num_rows * num_heads / (kTasksPerThread * num_threads);
    const int rows_per_task = static_cast<int>(std::clamp<int64_t>(per_thread, 8, kTaskRows));
    struct Block {
        int sequence, row_begin, row_end;
        int64_t cost;  // of one head
    };
    std::vector<Block> blocks;
    int64_t total = 0;
    for (int s = 0; s < static_cast<int>(sequences.size()); ++s) {
        const SequenceView& sequence = sequences[s];
        for (int row = sequence.row_begin; row < sequence.row_end; row += rows_per_task) {
            const int end = std::min(row + rows_per_task, sequence.row_end);
            const int64_t keys = sequence.num_context + end - sequence.row_begin;
            blocks.push_back({s, row, end, keys * (kReading + (end - row) * group)});
            total += num_heads * blocks.back().cost;
        }
    }
    std::stable_sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) { return a.cost > b.cost; });

    // As many heads as can be, so that memory is read in long stretches; fewer where threads would idle, or where a
    // split and the next one, or the queries' sums, would not stay in a core's own cache.
    AttentionPlan plan{};
    const int64_t split_bytes = kKeySplit * (args.keys.head_bytes() + args.values.head_bytes());
    for (const Block& block : blocks) {
        const int64_t rows = block.row_end - block.row_begin, sums_bytes = rows * group * args.values.width * 4;
        const int64_t share = total / (kTasksPerThread * num_threads) / block.cost;
        const int64_t most = std::min({share, kSplitBytes / split_bytes, kSumsBytes / sums_bytes});
        const int64_t heads = std::clamp<int64_t>(most, 1, num_heads), parts = (num_heads + heads - 1) / heads;
        for (int part = 0; part < parts; ++part) {
            const Share own = share_of(num_heads, part, static_cast<int>(parts));
            plan.tasks.push_back({block.sequence, static_cast<int>(own.begin), static_cast<int>(own.end), block.row_begin,
                                  block.row_end});
        }
        const size_t scratch = kernels.attention_scratch(args, most_rows, rows * heads);  // parts have no more heads
        plan.scratch_size = std::max(plan.scratch_size, static_cast<int64_t>(scratch));
    }
    plan.scratch_size = (plan.scratch_size + 15) / 16 * 16;
    return plan;
}

void run_attention(const AttentionArgs& args, const std::vector<SequenceView>& sequences) {
    static Buffer<float>& buffer = *new Buffer<float>();
    ThreadPool::Turn turn;
    const KernelTable& kernels = active_level();
    const AttentionPlan plan = plan_attention(kernels, args, sequences, turn.num_threads());
    float* memory = buffer.at_least(plan.scratch_size * turn.num_threads());
    std::atomic<size_t> next{static_cast<size_t>(turn.num_threads())};
    auto job = [&](int thread, int) {
        run_tasks(plan, next, thread, [&](const AttentionTask& task, const AttentionTask* after) {
            kernels.attention(args, sequences.data(), task, after, memory + thread * plan.scratch_size);
        });
    };
    turn.run(job);
}

void run_write_kv(const float* heads, const KvCache& cache, const int64_t* slots, int num_rows) {
    const KernelTable& kernels = active_level();
    for (int row = 0; row < num_rows; ++row)
        kernels.write_kv(heads + static_cast<int64_t>(row) * cache.num_heads * cache.width, cache, slots[row]);
}

double time_reading(const void* data, int64_t num_bytes, Fetch fetch) {
    ThreadPool::Turn turn;
    const KernelTable& kernels = active_level();
    std::atomic<uint64_t> seen{0};
    std::atomic<int64_t> next{0};  // a core that reads faster reads more
    auto job = [&](int, int) {
        for (int64_t at = next.fetch_add(kReadAtOnce); at < num_bytes; at = next.fetch_add(kReadAtOnce))
            seen += kernels.read_memory(static_cast<const char*>(data) + at, std::min(kReadAtOnce, num_bytes - at), fetch);
    };
    const Lap lap;
    turn.run(job);
    return lap.seconds();
}

}  // namespace outrider
