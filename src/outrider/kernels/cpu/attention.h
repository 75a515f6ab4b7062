// Tree attention over the paged cache.
//
// A row's key sequence is the context and then its ancestors and itself; key j stands at position j. It is read in
// splits of kKeySplit keys at fixed offsets, one after the other, with the running maximum of an online softmax
// (Milakov and Gimelshein, arXiv 1805.02867). Every score and every sum takes its operands in an order that only
// the row's own key sequence gives, so the bits of a row depend neither on other rows nor on pages or trees.
//
// A task goes through the splits of a sequence, and in each through its heads. While it computes one split it fetches
// the next as memory has it: position by position, with all heads.
#pragma once

#include "kernel_table.h"

namespace OUTRIDER_LEVEL {

using outrider::AttentionArgs;
using outrider::AttentionTask;
using outrider::kKeySplit;
using outrider::kTaskRows;
using outrider::SequenceView;

template <int N>
struct Constant {
    static constexpr int value = N;
};

constexpr int kQueries = 6;  // most rows' heads that share the loads of keys and values

// Calls f with the constant n of [1, kQueries].
template <class F>
inline void with_constant(int n, F f) {
    switch (n) {
        case 1: return f(Constant<1>{});
        case 2: return f(Constant<2>{});
        case 3: return f(Constant<3>{});
        case 4: return f(Constant<4>{});
        case 5: return f(Constant<5>{});
        default: return f(Constant<kQueries>{});
    }
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Keys and values of up to `capacity` positions as float32: keys [key width][capacity], values [capacity][width].
// Values that only one block of queries needs may stay in the cache, where `heads` says.
struct KeyBlock {
    float* keys;
    float* values;
    int64_t capacity;
    const char* const* heads;  // [kKeySplit], or null
};

// What has been summed for one query so far; `sums` has the value width.
struct Query {
    const float* query;
    float* sums;
    float* stats;  // maximum, denominator
};

constexpr int kFetchEvery = 4;  // dimensions of scores, or positions of values, between two fetches

// The keys and values of a split that comes next, to be asked for line by line while others are computed: processors
// drop what is asked for in bursts. Positions side by side with all heads of a task, for memory likes long stretches.
class KeysAhead {
public:
    // From now on the split at `first` of a task; only its context, since the step's rows were written just now.
    void aim(const AttentionArgs& args, const SequenceView* sequences, const AttentionTask& task, int64_t first) {
        const SequenceView& sequence = sequences[task.sequence];
        const int64_t left = sequence.num_context - first, count = left < 0 ? 0 : left < kKeySplit ? left : kKeySplit;
        const int64_t key_bytes = args.keys.head_bytes(), value_bytes = args.values.head_bytes();
        key_data_ = args.keys.head(0, task.head_begin);
        value_data_ = args.values.head(0, task.head_begin);
        key_stride_ = args.keys.num_heads * key_bytes;
        value_stride_ = args.values.num_heads * value_bytes;
        bytes_ = (task.head_end - task.head_begin) * (key_bytes > value_bytes ? key_bytes : value_bytes);
        slots_ = sequence.slots + first;
        num_lines_ = unasked_ = count * ((bytes_ + 63) / 64);
        at_ = bytes_;
    }

    // The next `num_calls` calls shall ask for one of `num_parts` parts.
    void allow(int num_parts, int64_t num_calls) {
        const int64_t part = (num_lines_ + num_parts - 1) / num_parts;
        allowed_ = part < unasked_ ? part : unasked_;
        unasked_ -= allowed_;
        per_call_ = (allowed_ + num_calls - 1) / num_calls;
    }

    OUTRIDER_INLINE void fetch() {  // a call between sums would spill them
        int64_t some = per_call_ < allowed_ ? per_call_ : allowed_;
        allowed_ -= some;
        for (; some > 0; --some, at_ += 64) {
            if (at_ >= bytes_) begin_position();
            prefetch_far(key_ + at_);
            prefetch_far(value_ + at_);
        }
    }

private:
    OUTRIDER_INLINE void begin_position() {
        key_ = key_data_ + *slots_ * key_stride_;
        value_ = value_data_ + *slots_ * value_stride_;
        ++slots_;
        at_ = 0;
    }

    const int64_t* slots_ = nullptr;
    const char *key_data_ = nullptr, *value_data_ = nullptr, *key_ = nullptr, *value_ = nullptr;
    int64_t key_stride_ = 0, value_stride_ = 0, bytes_ = 0, at_ = 0;
    int64_t num_lines_ = 0, unasked_ = 0, allowed_ = 0, per_call_ = 0;
};

// Keys of W positions as columns from `out` on, `stride` apart.
inline void read_columns(const KvCache& cache, const char* const* heads, float* out, int64_t stride, KeysAhead& ahead) {
    const int width = cache.width;
    if (cache.type == KvType::kBf16 && width % (2 * W) == 0) {  // pairs are moved as one, then taken apart
        for (int d = 0; d < width; d += 2 * W) {
            ahead.fetch();
            ahead.fetch();
            transpose_block(heads, 2 * d, [&](int column, vf pairs) {
                store(out + (d + 2 * column) * stride, first_of_bf16(pairs));
                store(out + (d + 2 * column + 1) * stride, second_of_bf16(pairs));
            });
        }
        return;
    }
    if (cache.type == KvType::kFp32 && width % W == 0) {
        for (int d = 0; d < width; d += W) {
            ahead.fetch();
            transpose_block(heads, 4 * d, [&](int column, vf keys) { store(out + (d + column) * stride, keys); });
        }
        return;
    }
    alignas(64) float rows[W][W];
    const char* converted[W];
    for (int i = 0; i < W; ++i) converted[i] = reinterpret_cast<const char*>(rows[i]);
    for (int d = 0; d < width; d += W) {
        ahead.fetch();
        const int end = width - d < W ? width : d + W;
        read_heads(cache, heads, W, d, end, rows[0], W);
        transpose_block(converted, 0, [&](int column, vf keys) {
            if (d + column < width) store(out + (d + column) * stride, keys);
        });
    }
}

// Of a multiple of W positions: past the end the last one comes again, and no row sees what comes of it.
inline void find_heads(const KvCache& cache, const int64_t* slots, int64_t count, int head, const char** heads) {
    const char* const data = cache.head(0, head);
    const int64_t slot_bytes = cache.num_heads * cache.head_bytes();
    for (int64_t j = 0; j < count; ++j) heads[j] = data + slots[j] * slot_bytes;
    for (int64_t j = count; j < round_up(count, W); ++j) heads[j] = heads[count - 1];
}

inline void read_block(const AttentionArgs& args, const int64_t* slots, int64_t count, int head, const KeyBlock& block,
                       KeysAhead& ahead) {
    const int64_t width = round_up(args.values.width, W);
    const char* heads[kKeySplit];
    for (int64_t first = 0; first < count; first += kKeySplit) {
        const int64_t some = count - first < kKeySplit ? count - first : kKeySplit;
        find_heads(args.keys, slots + first, some, head, heads);
        for (int64_t j = 0; j < some; j += W)
            read_columns(args.keys, heads + j, block.keys + first + j, block.capacity, ahead);
        if (block.heads != nullptr) continue;
        find_heads(args.values, slots + first, some, head, heads);
        read_heads(args.values, heads, some, 0, args.values.width, block.values + first * width, width);
    }
}

constexpr int kVectors = W == 16 ? 4 : 2;  // of keys or values that a loop holds in registers for each query

// Scores of N queries with V vectors of keys from `first` on.
template <int N, int V>
inline void scores_of_vectors(const AttentionArgs& args, const Query* queries, const float* keys, int64_t capacity,
                              int at, float (*scores)[kKeySplit], KeysAhead& ahead) {
    vf sum[N][V];
    for (int q = 0; q < N; ++q)
        for (int v = 0; v < V; ++v) sum[q][v] = splat(0.0f);
    KeysAhead mine = ahead;  // in registers
    for (int d = 0; d < args.keys.width; ++d, keys += capacity) {
        if (d % kFetchEvery == 0) mine.fetch();
        vf key[V];
        for (int v = 0; v < V; ++v) key[v] = load(keys + v * W);
        for (int q = 0; q < N; ++q) {
            const vf x = splat(queries[q].query[d]);
            for (int v = 0; v < V; ++v) sum[q][v] = fma(x, key[v], sum[q][v]);
        }
    }
    ahead = mine;
    for (int q = 0; q < N; ++q) {
        for (int v = 0; v < V; ++v) {
            vf score = mul(sum[q][v], splat(args.scaling));
            if (args.softcap > 0.0f) score = mul(splat(args.softcap), tanh(div(score, splat(args.softcap))));
            store(scores[q] + at + v * W, score);
        }
    }
}

// Scores of N queries with keys [first, first + count) of the block; `count` is rounded up to whole vectors.
template <int N>
inline void scores_of(const AttentionArgs& args, const Query* queries, const KeyBlock& block, int64_t first, int count,
                      float (*scores)[kKeySplit], KeysAhead& ahead) {
    int at = 0;
    const auto some = [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        scores_of_vectors<N, V>(args, queries, block.keys + first + at, block.capacity, at, scores, ahead);
        at += V * W;
    };
    while (at + (kVectors - 1) * W < count) some(Constant<kVectors>{});
    if constexpr (kVectors > 2) {
        if (at + 2 * W < count) some(Constant<3>{});
        if (at + W < count) some(Constant<2>{});
    }
    if (at < count) some(Constant<1>{});
}

// Turns the scores of one split into weights (zero outside [low, high)) and brings the query's sums up to date.
inline void weigh(const AttentionArgs& args, float* scores, int low, int high, const Query& query) {
    const int end = static_cast<int>(round_up(high, W));  // whole vectors of zeros would change no bit of the sums
    const auto seen = [&](vf x, int j, float other) {
        return low <= j && j + W <= high ? x : keep_lanes(x, low - j, high - j, splat(other));
    };
    vf largest = seen(load(scores), 0, -INFINITY);
    for (int j = W; j < end; j += W) largest = max(largest, seen(load(scores + j), j, -INFINITY));
    const float before = query.stats[0], here = fold(largest, max);
    const float now = here > before ? here : before;  // a NaN is not lost: its weight will be one
    vf total = splat(0.0f);
    for (int j = 0; j < end; j += W) {
        const vf weights = seen(exp(sub(load(scores + j), splat(now))), j, 0.0f);
        store(scores + j, weights);
        total = j == 0 ? weights : add(total, weights);
    }
    // Where the maximum stays the factor is exactly one; a branch would be guessed wrong too often.
    float lane[W];
    store(lane, exp(splat(before - now)));
    const vf factor = splat(lane[0]);
    query.stats[1] = query.stats[1] * lane[0] + sum_of(total);
    query.stats[0] = now;
    const int64_t width = round_up(args.values.width, W);
    for (int64_t e = 0; e < width; e += W) store(query.sums + e, mul(load(query.sums + e), factor));
}

// Adds weights[j] * values[j] for j in [low, high), in order, to V vectors of the sums of N queries; value(j, e) gives
// dimensions from e on.
template <int N, int V, class Value>
inline void add_vectors(const Query* queries, float (*weights)[kKeySplit], Value value, int64_t e, int low, int high,
                        KeysAhead& ahead) {
    vf sum[N][V];
    for (int q = 0; q < N; ++q)
        for (int v = 0; v < V; ++v) sum[q][v] = load(queries[q].sums + e + v * W);
    KeysAhead mine = ahead;  // in registers
    for (int j = low; j < high; ++j) {
        if (j % kFetchEvery == 0) mine.fetch();
        vf x[V];
        for (int v = 0; v < V; ++v) x[v] = value(j, e + v * W);
        for (int q = 0; q < N; ++q) {
            const vf weight = splat(weights[q][j]);
            for (int v = 0; v < V; ++v) sum[q][v] = fma(weight, x[v], sum[q][v]);
        }
    }
    ahead = mine;
    for (int q = 0; q < N; ++q)
        for (int v = 0; v < V; ++v) store(queries[q].sums + e + v * W, sum[q][v]);
}

template <int N, class Value>
inline void add_values_from(const AttentionArgs& args, const Query* queries, float (*weights)[kKeySplit], Value value,
                            int low, int high, KeysAhead& ahead) {
    const int64_t width = round_up(args.values.width, W);
    int64_t e = 0;
    const auto some = [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        add_vectors<N, V>(queries, weights, value, e, low, high, ahead);
        e += V * W;
    };
    while (e + kVectors * W <= width) some(Constant<kVectors>{});
    if constexpr (kVectors > 2) {
        if (e + 3 * W <= width) some(Constant<3>{});
        if (e + 2 * W <= width) some(Constant<2>{});
    }
    if (e < width) some(Constant<1>{});
}

// Of a block's values those of `index`, or all in their order.
template <int N>
inline void add_values(const AttentionArgs& args, const Query* queries, float (*weights)[kKeySplit], const KeyBlock& block,
                       const int32_t* index, int low, int high, KeysAhead& ahead) {
    if (low >= high) return;
    const int64_t width = round_up(args.values.width, W);
    const float* const values = block.values;
    if (index != nullptr) {
        const auto value = [=](int j, int64_t e) { return load(values + index[j] * width + e); };
        return add_values_from<N>(args, queries, weights, value, low, high, ahead);
    }
    if (block.heads != nullptr) {
        const char* const* const heads = block.heads;
        const auto value = [=](int j, int64_t e) { return load_bf16(reinterpret_cast<const uint16_t*>(heads[j]) + e); };
        return add_values_from<N>(args, queries, weights, value, low, high, ahead);
    }
    const auto value = [=](int j, int64_t e) { return load(values + j * width + e); };
    add_values_from<N>(args, queries, weights, value, low, high, ahead);
}

struct Span {
    int low, high;  // keys of a split that a row sees; none if low >= high
};

inline Span span_of(const AttentionArgs& args, int64_t num_keys, int64_t first) {
    const int64_t oldest = args.window > 0 && num_keys > args.window ? num_keys - args.window : 0;
    const int64_t low = oldest > first ? oldest - first : 0, high = num_keys - first;
    return {static_cast<int>(low < kKeySplit ? low : kKeySplit), static_cast<int>(high < kKeySplit ? high : kKeySplit)};
}

// One split for N queries, of which each sees its own span.
template <int N>
inline void attend_split(const AttentionArgs& args, const Query* queries, const Span* spans, const KeyBlock& block,
                         KeysAhead& ahead) {
    alignas(64) float scores[N][kKeySplit];
    int count = 0;
    for (int q = 0; q < N; ++q) count = spans[q].high > count ? spans[q].high : count;
    if (count <= 0) return;
    scores_of<N>(args, queries, block, 0, count, scores, ahead);
    bool alike = true;
    for (int q = 0; q < N; ++q) alike = alike && spans[q].low == spans[0].low && spans[q].low < spans[q].high;
    int common = kKeySplit;
    for (int q = 0; q < N; ++q) {
        if (spans[q].low < spans[q].high) weigh(args, scores[q], spans[q].low, spans[q].high, queries[q]);
        common = spans[q].high < common ? spans[q].high : common;
    }
    if (alike) add_values<N>(args, queries, scores, block, nullptr, spans[0].low, common, ahead);
    for (int q = 0; q < N; ++q) {
        const int low = alike ? common : spans[q].low;
        add_values<1>(args, queries + q, scores + q, block, nullptr, low, spans[q].high, ahead);
    }
}

// The part of a row's keys that only trees have: gathered from the tail [start, ...) of the sequence's slots.
inline void attend_tree_tail(const AttentionArgs& args, const SequenceView& sequence, int row, int64_t start,
                             const Query* queries, int num_queries, const KeyBlock& block, int32_t* path, float* gathered,
                             KeysAhead& ahead) {
    const int64_t in_context = sequence.num_context - start;
    int64_t depth = 0;
    for (int at = row; at >= 0; at = sequence.parents[at]) ++depth;
    int64_t count = in_context + depth;
    for (int64_t j = 0; j < in_context; ++j) path[j] = static_cast<int32_t>(j);
    for (int at = row; at >= 0; at = sequence.parents[at]) path[--count] = static_cast<int32_t>(in_context + at);
    count = in_context + depth;
    const int64_t num_slots = in_context + (sequence.row_end - sequence.row_begin);
    const int64_t stride = round_up(num_slots, kKeySplit);
    with_constant(num_queries, [&](auto number) {
        constexpr int N = decltype(number)::value;
        alignas(64) float scores[N][kKeySplit];
        for (int64_t first = 0; first < num_slots; first += kKeySplit) {
            const int seen = static_cast<int>(num_slots - first < kKeySplit ? num_slots - first : kKeySplit);
            scores_of<N>(args, queries, block, first, seen, scores, ahead);
            for (int q = 0; q < N; ++q) std::memcpy(gathered + q * stride + first, scores[q], sizeof(float) * seen);
        }
        for (int64_t first = 0; first < count; first += kKeySplit) {
            const Span span = span_of(args, start + count, start + first);
            if (span.low >= span.high) continue;
            for (int q = 0; q < N; ++q) {
                for (int j = span.low; j < span.high; ++j) scores[q][j] = gathered[q * stride + path[first + j]];
                weigh(args, scores[q], span.low, span.high, queries[q]);
            }
            add_values<N>(args, queries, scores, block, path + first, span.low, span.high, ahead);
        }
    });
}

inline void write_out(const AttentionArgs& args, int row, int head, const Query& query) {
    float factor = 1.0f / query.stats[1];
    if (args.sinks != nullptr) {  // a sink joins the denominator only
        const float sink = args.sinks[head], largest = sink > query.stats[0] ? sink : query.stats[0];
        float own[W], other[W];
        store(own, exp(splat(query.stats[0] - largest)));
        store(other, exp(splat(sink - largest)));
        factor = own[0] / (query.stats[1] * own[0] + other[0]);
    }
    const int width = args.values.width;
    float* out = args.out + row * args.out_stride + static_cast<int64_t>(head) * width;
    for (int e = 0; e < width; e += W) store_part(out + e, mul(load(query.sums + e), splat(factor)), width - e);
}

// Another core may have read what stood there before.
inline void prefetch_out(const AttentionArgs& args, int row, int head) {
    const float* out = args.out + row * args.out_stride + static_cast<int64_t>(head) * args.values.width;
    for (int e = 0; e < args.values.width; e += 16) outrider::prefetch_for_write(out + e);
}

// Positions of a tree's tail at most: what its context has after the last whole split, and its rows.
inline int64_t tail_capacity(int64_t num_step_rows) { return round_up(kKeySplit - 1 + num_step_rows, kKeySplit); }

inline size_t attention_scratch(const AttentionArgs& args, int64_t num_step_rows, int64_t num_row_heads) {
    const int64_t group = args.num_heads / args.keys.num_heads, width = round_up(args.values.width, W);
    const int64_t tail = tail_capacity(num_step_rows), per_query = (sizeof(Query) + sizeof(Span)) / sizeof(float);
    // keys and values, a path, scores of a few queries over the tail; queries, their spans, sums and statistics
    return tail * (args.keys.width + width + 1 + kQueries) + num_row_heads * group * (width + 2 + per_query);
}

inline void attention(const AttentionArgs& args, const SequenceView* sequences, const AttentionTask& task,
                      const AttentionTask* next, float* scratch) {
    const SequenceView& sequence = sequences[task.sequence];
    const int group = args.num_heads / args.keys.num_heads, num_rows = task.row_end - task.row_begin;
    const int num_queries = num_rows * group, num_heads = task.head_end - task.head_begin;
    const int64_t width = round_up(args.values.width, W), capacity = tail_capacity(sequence.row_end - sequence.row_begin);
    float* const values = scratch + capacity * args.keys.width;
    float* const sums = values + capacity * width;
    float* const stats = sums + num_heads * num_queries * width;
    Query* const queries = reinterpret_cast<Query*>(stats + 2 * num_heads * num_queries);  // [heads][rows][group]
    Span* const spans = reinterpret_cast<Span*>(queries + num_heads * num_queries);        // [rows][group]
    float* const gathered = reinterpret_cast<float*>(spans + num_queries);
    int32_t* const path = reinterpret_cast<int32_t*>(gathered + kQueries * capacity);
    std::memset(sums, 0, sizeof(float) * num_heads * num_queries * width);
    const auto each_query = [&](auto f) {
        for (int h = 0, at = 0; h < num_heads; ++h)
            for (int r = 0; r < num_rows; ++r)
                for (int g = 0; g < group; ++g, ++at) f(at, task.row_begin + r, (task.head_begin + h) * group + g);
    };
    each_query([&](int at, int row, int head) {
        const float* query = args.query + row * args.query_stride + static_cast<int64_t>(head) * args.keys.width;
        queries[at] = {query, sums + at * width, stats + 2 * at};
        stats[2 * at] = -INFINITY;
        stats[2 * at + 1] = 0.0f;
    });
    // Of some queries of a head whose last keys are read now.
    const auto prefetch_outs = [&](int h, int begin, int count) {
        for (int i = begin; i < begin + count; ++i) prefetch_out(args, task.row_begin + i / group, (task.head_begin + h) * group + i % group);
    };
    const bool is_chain = sequence.parents == nullptr;
    const int local = task.row_begin - sequence.row_begin;
    int64_t num_keys[kTaskRows];
    for (int r = 0; r < num_rows; ++r) {
        num_keys[r] = sequence.num_context + (is_chain ? local + r + 1 : 0);
        for (int at = is_chain ? -1 : local + r; at >= 0; at = sequence.parents[at]) ++num_keys[r];
    }
    KeysAhead ahead;
    bool is_aimed_at_next = false;
    const auto aim_at_next = [&] {
        if (is_aimed_at_next) return;
        is_aimed_at_next = true;
        ahead = {};
        if (next != nullptr) ahead.aim(args, sequences, *next, outrider::first_split(args, sequences, *next));
    };
    // Times that reading a split of so many keys and one block of queries ask for more.
    const auto num_calls = [&](int64_t count) {
        const int64_t loops = args.keys.width * round_up(count, kVectors * W) + round_up(width, kVectors * W) * count;
        return loops / (kVectors * W * kFetchEvery) + round_up(args.keys.width, W) * round_up(count, W) / (W * W);
    };
    // A chain's rows see prefixes of the slots, so all their splits are shared; a tree's only in the context.
    const int64_t most = is_chain ? num_keys[num_rows - 1] : sequence.num_context / kKeySplit * kKeySplit;
    const int num_blocks = (num_queries + kQueries - 1) / kQueries;
    const char* heads[kKeySplit];
    const bool in_place = num_blocks == 1 && args.values.type == KvType::kBf16 && args.values.width % W == 0;
    const KeyBlock block = {scratch, values, kKeySplit, in_place ? heads : nullptr};
    for (int64_t first = outrider::first_split(args, sequences, task); first < most; first += kKeySplit) {
        const int64_t after = first + kKeySplit, count = most < after ? most - first : kKeySplit;
        if (after < sequence.num_context) {
            ahead.aim(args, sequences, task, after);
        } else {
            aim_at_next();
        }
        for (int r = 0; r < num_rows; ++r)
            for (int g = 0; g < group; ++g) spans[r * group + g] = span_of(args, num_keys[r], first);
        for (int h = 0; h < num_heads; ++h) {
            ahead.allow(num_heads, num_calls(count));
            read_block(args, sequence.slots + first, count, task.head_begin + h, block, ahead);
            if (in_place) find_heads(args.values, sequence.slots + first, count, task.head_begin + h, heads);
            for (int b = 0, begin = 0; b < num_blocks; ++b) {  // of nearly equal size
                const int some = num_queries / num_blocks + (b < num_queries % num_blocks);
                const Query* own = queries + h * num_queries + begin;
                if (is_chain && after >= most) prefetch_outs(h, begin, some);
                with_constant(some, [&](auto number) {
                    attend_split<decltype(number)::value>(args, own, spans + begin, block, ahead);
                });
                begin += some;
            }
        }
    }
    const KeyBlock tail = {scratch, values, capacity, nullptr};
    aim_at_next();
    for (int h = 0; h < num_heads && !is_chain; ++h) {
        const int64_t num_slots = sequence.num_context - most + sequence.row_end - sequence.row_begin;
        ahead.allow(num_heads, num_calls(num_slots));
        read_block(args, sequence.slots + most, num_slots, task.head_begin + h, tail, ahead);
        for (int r = 0; r < num_rows; ++r) {
            const Query* own = queries + h * num_queries + r * group;
            prefetch_outs(h, r * group, group);
            for (int g = 0; g < group; g += kQueries) {
                const int some = group - g < kQueries ? group - g : kQueries;
                attend_tree_tail(args, sequence, local + r, most, own + g, some, tail, path, gathered, ahead);
            }
        }
    }
    each_query([&](int at, int row, int head) { write_out(args, row, head, queries[at]); });
}

}  // namespace OUTRIDER_LEVEL
