#include "llama.h"

#include <algorithm>
#include <cmath>

#include "calls.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace outrider {
namespace {

constexpr int64_t kStrip = 8;  // panels of the output layer whose logits are looked at before the next

// Whether rows packed for one layer serve another.
bool same_inputs(const PackedLinear& a, const PackedLinear& b) {
    return a.format == b.format && a.group_size == b.group_size && a.has_zeros == b.has_zeros &&
           a.num_inputs == b.num_inputs &&
           (a.input_order == b.input_order ||
            (a.input_order != nullptr && b.input_order != nullptr &&
             std::equal(a.input_order, a.input_order + a.num_inputs, b.input_order)));
}

int64_t num_bytes_of(const PackedLinear& weight, const Share& panels) { return (panels.end - panels.begin) * weight.panel_bytes(); }

Stretch part_of(const PackedLinear& weight, const Share& panels) {
    return {weight.data + panels.begin * weight.panel_bytes(), std::max(panels.end - panels.begin, int64_t{0}) * weight.panel_bytes()};
}

// Panels of query, key and value in one row, of which each thread takes a stretch.
int64_t num_qkv_panels(const LlamaLayer& layer) {
    return layer.query.num_panels() + layer.key.num_panels() + layer.value.num_panels();
}

Stretch first_of_qkv(const LlamaLayer& layer, Share panels) {
    for (const PackedLinear* weight : {&layer.query, &layer.key, &layer.value}) {
        const int64_t count = weight->num_panels();
        if (panels.begin < count) return part_of(*weight, {panels.begin, std::min(panels.end, count)});
        panels = {panels.begin - count, panels.end - count};
    }
    return {nullptr, 0};
}

}  // namespace

// One forward: the batch, and where its intermediate values stand.
struct Llama::Step {
    const LlamaBatch& batch;
    const LlamaOutput& output;
    const KernelTable& kernels;
    Barrier& barrier;
    float *hidden, *qkv, *attended, *inner, *largest, *cos, *sin, *rows, *scratch, *strip;  // hidden, inner: [panel][row][kPanel]
    RowChoice* choices;
    int64_t row_width;
    AttentionPlan plan;
    uint32_t* words = nullptr;  // [threads][num_words]
    int64_t num_words = 0;
    // What is written while threads run, on lines of their own.
    alignas(64) std::atomic<size_t> next_task{0};
    alignas(64) Trial qkv_trial{}, output_trial{}, gate_trial{}, down_trial{}, lm_head_trial{};  // thread 0 sets them, a layer ahead

    void wait(int num_threads) { barrier.wait(num_threads); }
    FloatRow residual(int64_t row) const { return {hidden + row * kPanel, batch.num_rows * int64_t{kPanel}}; }
};

Llama::Llama(LlamaSpec spec) : spec_(std::move(spec)) {}

void Llama::forward(const LlamaBatch& batch, const LlamaOutput& output) {
    ThreadPool::Turn turn;  // of this model's memory too
    const Lap lap;
    const KernelTable& kernels = active_level();
    const int64_t rows = batch.num_rows, threads = turn.num_threads();
    const int64_t query_width = static_cast<int64_t>(spec_.num_heads) * spec_.head_dim;
    const int64_t kv_width = static_cast<int64_t>(spec_.num_kv_heads) * spec_.head_dim;
    const int64_t row_width = (std::max({spec_.hidden, spec_.intermediate, query_width}) + 15) / 16 * 16;
    AttentionArgs attention{};
    attention.num_heads = spec_.num_heads;
    attention.keys = attention.values = {nullptr, batch.kv_type, spec_.num_kv_heads, spec_.head_dim};
    AttentionPlan plan = plan_attention(kernels, attention, batch.sequences, turn.num_threads());
    if (choices_.size() < static_cast<size_t>(threads * batch.num_logits)) choices_.resize(threads * batch.num_logits);
    Step step{batch,
              output,
              kernels,
              turn.barrier(),
              hidden_.at_least(rows * spec_.layers[0].down.num_panels() * kPanel),
              qkv_.at_least(rows * (query_width + 2 * kv_width)),
              attended_.at_least(rows * query_width),
              inner_.at_least(rows * spec_.layers[0].gate.num_panels() * kPanel),
              largest_.at_least(threads * rows),
              cos_.at_least(rows * spec_.head_dim / 2),
              sin_.at_least(rows * spec_.head_dim / 2),
              rows_.at_least(row_width * threads),
              scratch_.at_least(plan.scratch_size * threads),
              strip_.at_least(output.logits == nullptr ? threads * batch.num_logits * kStrip * kPanel : 0),
              choices_.data(),
              row_width,
              std::move(plan)};
    const auto make_room = [&](const PackedLinear& weight, int num_rows) {
        for (RowsBuffer& buffer : packed_)
            step.num_words = std::max(
                step.num_words, num_words(buffer.rows_for(kernels, weight, num_rows, turn.num_threads(), Fetch::kNear)));
    };
    for (const LlamaLayer& layer : spec_.layers)  // for every layer before the threads start
        for (const PackedLinear* weight : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down})
            make_room(*weight, batch.num_rows);
    make_room(spec_.lm_head, std::max(1, batch.num_logits));
    step.words = words_.at_least(step.num_words * threads);
    balance_.set_num_threads(turn.num_threads());
    choose_fetches(step, 0, turn.num_threads());
    step.lm_head_trial = Trial(tuners_.find(kernels, spec_.lm_head, std::max(1, batch.num_logits), turn.num_threads()));
    auto job = [&](int thread, int num_threads) { run_layers(step, thread, num_threads); };
    turn.run(job);
    last_seconds_ = lap.seconds();
}

void Llama::choose_fetches(Step& step, size_t index, int num_threads) {
    const LlamaLayer& layer = spec_.layers[index];
    const auto trial_of = [&](const PackedLinear& weight) {
        return Trial(tuners_.find(step.kernels, weight, step.batch.num_rows, num_threads));
    };
    step.qkv_trial = trial_of(layer.query);
    step.output_trial = trial_of(layer.output);
    step.gate_trial = trial_of(layer.gate);
    step.down_trial = trial_of(layer.down);
}

void Llama::run_layers(Step& step, int thread, int num_threads) {
    embed(step, thread, num_threads);
    for (size_t layer = 0; layer < spec_.layers.size(); ++layer) {
        attend(step, layer, thread, num_threads);
        feed_forward(step, layer, thread, num_threads);
    }
    if (step.batch.num_logits > 0) choose(step, thread, num_threads);
}

void Llama::embed(Step& step, int thread, int num_threads) {
    const Share mine = share_of(step.batch.num_rows, thread, num_threads);
    const int64_t half = spec_.head_dim / 2;
    float* embedded = step.rows + thread * step.row_width;
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        step.kernels.read_row(spec_.embedding, spec_.embedding_type, step.batch.token_ids[row], spec_.hidden, embedded);
        for (int64_t i = 0; i < spec_.hidden; i += kPanel)
            std::copy_n(embedded + i, std::min<int64_t>(kPanel, spec_.hidden - i), step.hidden + (i * step.batch.num_rows + row * kPanel));
        const float position = static_cast<float>(step.batch.positions[row]);
        for (int64_t i = 0; i < half; ++i) {
            const float angle = position * spec_.inverse_frequencies[i];
            step.cos[row * half + i] = std::cos(angle) * spec_.rope_scaling;
            step.sin[row * half + i] = std::sin(angle) * spec_.rope_scaling;
        }
    }
    step.wait(num_threads);
}

namespace {

// Packs a thread's share of rows for up to three layers; rows that serve several are packed once.
template <class RowOf, class LargestOf>
void pack_for(const KernelTable& kernels, RowsBuffer (&buffers)[3], PackedRows (&rows)[3],
              std::initializer_list<const PackedLinear*> weights, int num_rows, int thread, int num_threads,
              uint32_t* words, Fetch fetch, RowOf row_of, LargestOf largest_of) {
    const PackedLinear* const* weight = weights.begin();
    int own[3];
    for (int i = 0; i < static_cast<int>(weights.size()); ++i) {
        own[i] = i;
        for (int j = 0; j < i && own[i] == i; ++j)
            if (same_inputs(*weight[j], *weight[i])) own[i] = j;
        rows[i] = buffers[own[i]].rows_for(kernels, *weight[i], num_rows, num_threads, fetch);
    }
    for (int i = 0; i < static_cast<int>(weights.size()); ++i)
        if (own[i] == i) pack_share(kernels, *weight[i], rows[i], thread, num_threads, words, row_of, largest_of);
}

// Of what each thread has seen of a row; a NaN stays.
float largest_of_threads(const float* largest, int64_t stride, int num_threads) {
    float most = largest[0];
    for (int thread = 1; thread < num_threads; ++thread) {
        const float other = largest[thread * stride];
        if (!(other <= most) && most == most) most = other;
    }
    return most;
}

}  // namespace

void Llama::attend(Step& step, size_t index, int thread, int num_threads) {
    const LlamaLayer& layer = spec_.layers[index];
    const LlamaBatch& batch = step.batch;
    const KernelTable& kernels = step.kernels;
    const int64_t query_width = layer.query.num_outputs, kv_width = layer.key.num_outputs;
    const int64_t width = query_width + 2 * kv_width;
    float* normed = step.rows + thread * step.row_width;
    uint32_t* words = step.words + thread * step.num_words;
    PackedRows packed[3];
    pack_for(kernels, packed_, packed, {&layer.query, &layer.key, &layer.value}, batch.num_rows, thread, num_threads, words,
             step.qkv_trial.fetch(),
             [&](int64_t row) {
                 kernels.rms_norm(step.residual(row), layer.input_norm, spec_.norm_eps, normed, spec_.hidden);
                 return FloatRow{normed, kPanel};
             },
             [&](int, const FloatRow& x) { return kernels.largest_magnitude(x, spec_.hidden); });
    if (thread == 0) step.next_task.store(num_threads, std::memory_order_relaxed);

    const PackedLinear* weights[] = {&layer.query, &layer.key, &layer.value};
    const Share panels = balance_.share_of(num_qkv_panels(layer), thread);
    const Stretch output = stretch_of(layer.output, thread);
    step.wait(num_threads);
    const Lap qkv_lap;
    int64_t qkv_bytes = 0, first = 0, column = 0;
    for (int i = 0; i < 3; ++i) {
        const int64_t begin = std::max(panels.begin - first, int64_t{0});
        const int64_t end = std::min(panels.end - first, weights[i]->num_panels());
        first += weights[i]->num_panels();
        const uint8_t* then = panels.end > first ? weights[i + 1]->data : output.data;
        if (begin < end) {
            kernels.linear(*weights[i], packed[i], step.qkv + column + begin * kPanel, width, kPanel, Epilogue::kStore, begin, end, then);
            qkv_bytes += num_bytes_of(*weights[i], {begin, end});
        }
        column += weights[i]->num_outputs;
    }
    measured(step.qkv_trial, thread, qkv_bytes, qkv_lap);
    const KvCache keys = {reinterpret_cast<void*>(batch.keys[index]), batch.kv_type, spec_.num_kv_heads, spec_.head_dim};
    const KvCache values = {reinterpret_cast<void*>(batch.values[index]), batch.kv_type, spec_.num_kv_heads, spec_.head_dim};
    const AttentionArgs args = {step.qkv, step.attended, width, query_width, spec_.num_heads, keys, values,
                                1.0f / std::sqrt(static_cast<float>(spec_.head_dim)), 0.0f, layer.window, nullptr};
    if (static_cast<size_t>(thread) < step.plan.tasks.size())
        read_first_split(args, batch.sequences.data(), step.plan.tasks[thread]);
    step.wait(num_threads);

    const int64_t half = spec_.head_dim / 2;
    const auto norm_and_rotate = [&](int row, float* heads, int count, const float* norm) {
        for (int h = 0; h < count && norm != nullptr; ++h)
            kernels.rms_norm({heads + h * spec_.head_dim, kPanel}, norm, spec_.norm_eps, heads + h * spec_.head_dim, spec_.head_dim);
        kernels.rotate(heads, count, spec_.head_dim, step.cos + row * half, step.sin + row * half);
    };
    const Share mine = share_of(2 * static_cast<int64_t>(batch.num_rows), thread, num_threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) {  // keys and values of rows
        const int row = static_cast<int>(i / 2);
        float* key = step.qkv + row * width + query_width;
        if (i % 2 == 0) norm_and_rotate(row, key, spec_.num_kv_heads, layer.key_norm);
        kernels.write_kv(i % 2 == 0 ? key : key + kv_width, i % 2 == 0 ? keys : values, batch.write_slots[row]);
    }
    step.wait(num_threads);

    const int group = spec_.num_heads / spec_.num_kv_heads;
    run_tasks(step.plan, step.next_task, thread, [&](const AttentionTask& task, const AttentionTask* next) {
        for (int row = task.row_begin; row < task.row_end; ++row)  // queries by whoever reads them next
            norm_and_rotate(row, step.qkv + row * width + task.head_begin * group * spec_.head_dim,
                            (task.head_end - task.head_begin) * group, layer.query_norm);
        kernels.attention(args, batch.sequences.data(), task, next, step.scratch + thread * step.plan.scratch_size);
    });
    step.wait(num_threads);

    pack_for(kernels, packed_, packed, {&layer.output}, batch.num_rows, thread, num_threads, words, step.output_trial.fetch(),
             [&](int64_t row) { return FloatRow{step.attended + row * query_width, kPanel}; },
             [&](int, const FloatRow& x) { return kernels.largest_magnitude(x, query_width); });
    step.wait(num_threads);
    const Lap lap;
    const Share outputs = balance_.share_of(layer.output.num_panels(), thread);
    kernels.linear(layer.output, packed[0], step.hidden + outputs.begin * batch.num_rows * kPanel, kPanel,
                   batch.num_rows * kPanel, Epilogue::kAdd, outputs.begin, outputs.end, stretch_of(layer.gate, thread).data);
    measured(step.output_trial, thread, output.num_bytes, lap);
    step.wait(num_threads);
}

Stretch Llama::stretch_of(const PackedLinear& weight, int thread) const {
    return part_of(weight, balance_.share_of(weight.num_panels(), thread));
}

// Where a thread reads on after a layer, nearly: its part may be another by then.
const uint8_t* Llama::after_layer(size_t index, int thread) const {
    if (index + 1 == spec_.layers.size()) return stretch_of(spec_.lm_head, thread).data;
    const LlamaLayer& layer = spec_.layers[index + 1];
    return first_of_qkv(layer, balance_.share_of(num_qkv_panels(layer), thread)).data;
}

// How long a thread took for its part of a layer.
void Llama::measured(Trial& trial, int thread, int64_t num_bytes, const Lap& lap) {
    const double seconds = lap.seconds();
    balance_.record(thread, num_bytes, seconds);
    if (thread == 0) trial.record(seconds);
}

void Llama::feed_forward(Step& step, size_t index, int thread, int num_threads) {
    const LlamaLayer& layer = spec_.layers[index];
    const KernelTable& kernels = step.kernels;
    const int64_t rows = step.batch.num_rows;
    float* normed = step.rows + thread * step.row_width;
    uint32_t* words = step.words + thread * step.num_words;
    PackedRows packed[3];
    pack_for(kernels, packed_, packed, {&layer.gate, &layer.up}, step.batch.num_rows, thread, num_threads, words,
             step.gate_trial.fetch(),
             [&](int64_t row) {
                 kernels.rms_norm(step.residual(row), layer.post_norm, spec_.norm_eps, normed, spec_.hidden);
                 return FloatRow{normed, kPanel};
             },
             [&](int, const FloatRow& x) { return kernels.largest_magnitude(x, spec_.hidden); });
    const Share inner = balance_.share_of(layer.gate.num_panels(), thread);
    const Share outputs = balance_.share_of(layer.down.num_panels(), thread);
    const Stretch gate = part_of(layer.gate, inner), down = part_of(layer.down, outputs);
    step.wait(num_threads);
    const Lap gate_lap;
    kernels.gated_silu(layer.gate, layer.up, packed[0], packed[1], step.inner + inner.begin * rows * kPanel, inner.begin,
                       inner.end, down.data);
    measured(step.gate_trial, thread, 2 * gate.num_bytes, gate_lap);
    // What rounding needs of a row: each thread looks at the columns that it has just made.
    const int64_t first = std::min(inner.begin * kPanel, spec_.intermediate);
    const int64_t width = std::min(inner.end * kPanel, spec_.intermediate) - first;
    float* largest = step.largest + thread * rows;
    const auto row_from = [&](int64_t panel, int64_t row) { return FloatRow{step.inner + (panel * rows + row) * kPanel, rows * kPanel}; };
    for (int64_t row = 0; row < rows; ++row) largest[row] = kernels.largest_magnitude(row_from(inner.begin, row), width);
    step.wait(num_threads);
    pack_for(kernels, packed_, packed, {&layer.down}, step.batch.num_rows, thread, num_threads, words, step.down_trial.fetch(),
             [&](int64_t row) { return row_from(0, row); },
             [&](int row, const FloatRow&) { return largest_of_threads(step.largest + row, rows, num_threads); });
    const uint8_t* then = after_layer(index, thread);
    step.wait(num_threads);
    const Lap down_lap;
    kernels.linear(layer.down, packed[0], step.hidden + outputs.begin * rows * kPanel, kPanel, rows * kPanel,
                   Epilogue::kAdd, outputs.begin, outputs.end, then);
    if (thread == 0) {
        step.down_trial.record(down_lap.seconds());
        balance_.update();  // all know their parts of this layer, and measure nothing before the next
        if (index + 1 < spec_.layers.size()) choose_fetches(step, index + 1, num_threads);
    }
    step.wait(num_threads);
}

void Llama::choose(Step& step, int thread, int num_threads) {
    const KernelTable& kernels = step.kernels;
    const LlamaBatch& batch = step.batch;
    const LlamaOutput& output = step.output;
    const int64_t num_logits = batch.num_logits, vocab = spec_.vocab;
    float* normed = step.rows + thread * step.row_width;
    uint32_t* words = step.words + thread * step.num_words;
    PackedRows packed[3];
    pack_for(kernels, packed_, packed, {&spec_.lm_head}, batch.num_logits, thread, num_threads, words, step.lm_head_trial.fetch(),
             [&](int64_t i) {
                 kernels.rms_norm(step.residual(batch.logits_rows[i]), spec_.final_norm, spec_.norm_eps, normed, spec_.hidden);
                 return FloatRow{normed, kPanel};
             },
             [&](int, const FloatRow& x) { return kernels.largest_magnitude(x, spec_.hidden); });
    step.wait(num_threads);
    Share panels = balance_.share_of(spec_.lm_head.num_panels(), thread);
    const Lap lap;
    if (output.tokens == nullptr) {
        kernels.linear(spec_.lm_head, packed[0], output.logits + panels.begin * kPanel, vocab, kPanel, Epilogue::kStream,
                       panels.begin, panels.end, nullptr);
        if (thread == 0) step.lm_head_trial.record(lap.seconds());
        return;
    }
    RowChoice* choices = step.choices + thread * num_logits;
    const int64_t num_panels = spec_.lm_head.num_panels(), num_strips = (num_panels + kStrip - 1) / kStrip;
    if (output.maxima != nullptr) {  // of whole strips
        const Share strips = balance_.share_of(num_strips, thread);
        panels = {strips.begin * kStrip, std::min(strips.end * kStrip, num_panels)};
    }
    const int64_t first = std::min(panels.begin * kPanel, vocab - 1);
    for (int64_t i = 0; i < num_logits; ++i) choices[i].begin(batch.draws[i], first);
    const bool writes = output.logits != nullptr;
    const int64_t width = writes ? vocab : kStrip * kPanel;
    for (int64_t p = panels.begin; p < panels.end; p += kStrip) {
        const int64_t end = std::min(p + kStrip, panels.end), count = std::min(end * kPanel, vocab) - p * kPanel;
        float* strip = writes ? output.logits + p * kPanel : step.strip + thread * num_logits * width;
        const uint8_t* then = end < panels.end ? part_of(spec_.lm_head, {end, panels.end}).data : nullptr;
        kernels.linear(spec_.lm_head, packed[0], strip, width, kPanel, Epilogue::kStore, p, end, then);
        for (int64_t i = 0; i < num_logits; ++i) {
            const float most = choices[i].see(kernels, strip + i * width, p * kPanel, count);
            if (output.maxima == nullptr) continue;
            float* maxima = output.maxima + i * num_maxima(vocab) + p * kPanel / kMaximaBlock;
            const int64_t num_whole = count / kMaximaBlock, rest = count % kMaximaBlock;
            kernels.block_maxima(strip + i * width, num_whole, kMaximaBlock, maxima);
            if (rest > 0) maxima[num_whole] = kernels.greatest(strip + i * width + num_whole * kMaximaBlock, rest);
            if (most != most) std::fill(maxima, maxima + num_maxima(count), most);  // which blocks take for the lowest
        }
    }
    if (thread == 0) step.lm_head_trial.record(lap.seconds());
    step.wait(num_threads);
    const Share mine = share_of(num_logits, thread, num_threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
        RowChoice& choice = step.choices[i];
        for (int other = 1; other < num_threads; ++other) choice.merge(step.choices[other * num_logits + i]);
        output.tokens[i] = choice.token();
        output.log_weights[i] = choice.best();
    }
}

}  // namespace outrider
