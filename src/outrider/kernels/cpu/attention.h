// Tree attention over the paged cache.
//
// A row's key sequence is the context and then its ancestors and itself; key j stands at position j. It is read in
// splits of kKeySplit keys at fixed offsets, one after the other, with the running maximum of an online softmax
// (Milakov and Gimelshein, arXiv 1805.02867). Every score and every sum takes its operands in an order that only
// the row's own key sequence gives, so the bits of a row depend neither on other rows nor on pages or trees.
#pragma once

#include "kernel_table.h"

namespace OUTRIDER_LEVEL {

using outrider::AttentionArgs;
using outrider::kKeySplit;
using outrider::SequenceView;

template <int N>
struct Constant {
    static constexpr int value = N;
};

constexpr int kQueries = 4;  // rows' heads that share the loads of keys and values

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Keys and values of up to `capacity` positions as float32: keys [key width][capacity], values [capacity][width].
struct KeyBlock {
    float* keys;
    float* values;
    int64_t capacity;
};

// What has been summed for one query so far; `sums` has the value width.
struct Query {
    const float* query;
    float* sums;
    float* stats;  // maximum, denominator
};

inline void read_block(const AttentionArgs& args, const int64_t* slots, int64_t count, int head, const KeyBlock& block) {
    const int width = args.keys.width;
    const int64_t value_width = round_up(args.values.width, W);
    alignas(64) float rows[W * 256];
    for (int64_t j = 0; j < count; j += W) {
        const int64_t some = count - j < W ? count - j : W;
        for (int d0 = 0; d0 < width; d0 += 256) {  // wide heads by parts of the stack buffer
            const int part = width - d0 < 256 ? width - d0 : 256, padded = static_cast<int>(round_up(part, W));
            for (int64_t i = 0; i < some; ++i) {
                float whole[2048];
                if (width <= 256) {
                    read_head(args.keys, slots[j + i], head, rows + i * padded);
                } else {
                    read_head(args.keys, slots[j + i], head, whole);
                    std::memcpy(rows + i * padded, whole + d0, sizeof(float) * part);
                }
            }
            for (int64_t i = some; i < W; ++i) std::memset(rows + i * padded, 0, sizeof(float) * padded);
            alignas(64) float columns[W * W];
            for (int d = 0; d < part; d += W) {
                transpose_block(rows + d, padded, columns, W);
                for (int i = 0; i < W && d + i < part; ++i)
                    std::memcpy(block.keys + (d0 + d + i) * block.capacity + j, columns + i * W, sizeof(float) * W);
            }
        }
    }
    for (int64_t j = 0; j < count; ++j) read_head(args.values, slots[j], head, block.values + j * value_width);
}

constexpr int kVectors = W == 16 ? 4 : 2;  // of keys or values that a loop holds in registers for each query

// Scores of N queries with V vectors of keys from `first` on.
template <int N, int V>
inline void scores_of_vectors(const AttentionArgs& args, const Query* queries, const float* keys, int64_t capacity,
                              int at, float (*scores)[kKeySplit]) {
    vf sum[N][V];
    for (int q = 0; q < N; ++q)
        for (int v = 0; v < V; ++v) sum[q][v] = splat(0.0f);
    for (int d = 0; d < args.keys.width; ++d, keys += capacity) {
        vf key[V];
        for (int v = 0; v < V; ++v) key[v] = load(keys + v * W);
        for (int q = 0; q < N; ++q) {
            const vf x = splat(queries[q].query[d]);
            for (int v = 0; v < V; ++v) sum[q][v] = fma(x, key[v], sum[q][v]);
        }
    }
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
                      float (*scores)[kKeySplit]) {
    int at = 0;
    const auto some = [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        scores_of_vectors<N, V>(args, queries, block.keys + first + at, block.capacity, at, scores);
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
    for (int j = 0; j < low; ++j) scores[j] = -INFINITY;
    for (int j = high; j < end; ++j) scores[j] = -INFINITY;
    vf largest = load(scores);
    for (int j = W; j < end; j += W) largest = max(largest, load(scores + j));
    const float before = query.stats[0], here = fold(largest, max);
    const float now = here > before ? here : before;  // a NaN is not lost: its weight will be one
    for (int j = 0; j < end; j += W) store(scores + j, exp(sub(load(scores + j), splat(now))));
    for (int j = 0; j < low; ++j) scores[j] = 0.0f;
    for (int j = high; j < end; ++j) scores[j] = 0.0f;
    vf total = load(scores);
    for (int j = W; j < end; j += W) total = add(total, load(scores + j));
    if (now == before) {
        query.stats[1] += sum_of(total);
        return;
    }
    float lane[W];
    store(lane, exp(splat(before - now)));
    const vf factor = splat(lane[0]);
    query.stats[1] = query.stats[1] * lane[0] + sum_of(total);
    query.stats[0] = now;
    const int64_t width = round_up(args.values.width, W);
    for (int64_t e = 0; e < width; e += W) store(query.sums + e, mul(load(query.sums + e), factor));
}

// Adds weights[j] * values[index of j] for j in [low, high), in order, for N queries.
template <int N>
inline void add_values(const AttentionArgs& args, const Query* queries, float (*weights)[kKeySplit], const float* values, const int32_t* index, int low, int high) {
    const int64_t width = round_up(args.values.width, W);
    for (int64_t e = 0; e < width; e += kVectors * W) {
        const int some = width - e < kVectors * W ? static_cast<int>((width - e) / W) : kVectors;
        vf sum[N][kVectors];
        for (int q = 0; q < N; ++q)
            for (int v = 0; v < kVectors; ++v) sum[q][v] = v < some ? load(queries[q].sums + e + v * W) : splat(0.0f);
        for (int j = low; j < high; ++j) {
            const float* row = values + (index != nullptr ? index[j] : j) * width + e;
            vf value[kVectors];
            for (int v = 0; v < kVectors; ++v) value[v] = v < some ? load(row + v * W) : splat(0.0f);
            for (int q = 0; q < N; ++q) {
                const vf weight = splat(weights[q][j]);
                for (int v = 0; v < kVectors; ++v) sum[q][v] = fma(weight, value[v], sum[q][v]);
            }
        }
        for (int q = 0; q < N; ++q)
            for (int v = 0; v < some; ++v) store(queries[q].sums + e + v * W, sum[q][v]);
    }
}

struct Span {
    int low, high;  // keys of a split that a row sees; none if low >= high
};

// One split for up to kQueries queries, of which each sees its own span.
template <int N>
inline void attend_split(const AttentionArgs& args, const Query* queries, const Span* spans, const KeyBlock& block, int64_t first) {
    alignas(64) float scores[N][kKeySplit];
    int count = 0;
    for (int q = 0; q < N; ++q) count = spans[q].high > count ? spans[q].high : count;
    scores_of<N>(args, queries, block, first, count, scores);
    const int64_t width = round_up(args.values.width, W);
    bool alike = true;
    for (int q = 0; q < N; ++q) alike = alike && spans[q].low == spans[0].low && spans[q].low < spans[q].high;
    int common = kKeySplit;
    for (int q = 0; q < N; ++q) {
        if (spans[q].low < spans[q].high) weigh(args, scores[q], spans[q].low, spans[q].high, queries[q]);
        common = spans[q].high < common ? spans[q].high : common;
    }
    const float* values = block.values + first * width;
    if (alike) add_values<N>(args, queries, scores, values, nullptr, spans[0].low, common);
    for (int q = 0; q < N; ++q)
        add_values<1>(args, queries + q, scores + q, values, nullptr, alike ? common : spans[q].low, spans[q].high);
}

inline void attend_split_of(int num_queries, const AttentionArgs& args, const Query* queries, const Span* spans, const KeyBlock& block, int64_t first) {
    switch (num_queries) {
        case 1: return attend_split<1>(args, queries, spans, block, first);
        case 2: return attend_split<2>(args, queries, spans, block, first);
        case 3: return attend_split<3>(args, queries, spans, block, first);
        default: return attend_split<kQueries>(args, queries, spans, block, first);
    }
}

inline Span span_of(const AttentionArgs& args, int64_t num_keys, int64_t first) {
    const int64_t oldest = args.window > 0 && num_keys > args.window ? num_keys - args.window : 0;
    const int64_t low = oldest > first ? oldest - first : 0, high = num_keys - first;
    return {static_cast<int>(low < kKeySplit ? low : kKeySplit), static_cast<int>(high < kKeySplit ? high : kKeySplit)};
}

inline size_t attention_scratch(const AttentionArgs& args, int64_t num_step_rows) {
    const int64_t group = args.num_heads / args.keys.num_heads, width = round_up(args.values.width, W);
    const int64_t tail = round_up(kKeySplit + num_step_rows, kKeySplit) + kKeySplit;
    const int64_t block = tail * (args.keys.width + width);
    // tails' indices (twice), a row's scores over the tail, queries' sums and statistics
    return block + 2 * tail + kQueries * tail + num_step_rows * group * (width + 2) + 64;
}

// The part of a row's keys that only trees have: gathered from the tail [start, ...) of the sequence's slots.
inline void attend_tree_tail(const AttentionArgs& args, const SequenceView& sequence, int row, int64_t start, const Query* queries, int group, const KeyBlock& block, int32_t* path, float* gathered) {
    const int64_t in_context = sequence.num_context - start;
    int64_t depth = 0;
    for (int at = row; at >= 0; at = sequence.parents[at]) ++depth;
    int64_t count = in_context + depth;
    for (int64_t j = 0; j < in_context; ++j) path[j] = static_cast<int32_t>(j);
    for (int at = row; at >= 0; at = sequence.parents[at]) path[--count] = static_cast<int32_t>(in_context + at);
    count = in_context + depth;
    const int64_t num_slots = in_context + (sequence.row_end - sequence.row_begin);
    const int64_t stride = round_up(num_slots, kKeySplit);
    for (int q0 = 0; q0 < group; q0 += kQueries) {
        const int some = group - q0 < kQueries ? group - q0 : kQueries;
        for (int64_t first = 0; first < num_slots; first += kKeySplit) {
            alignas(64) float scores[kQueries][kKeySplit];
            const int seen = static_cast<int>(num_slots - first < kKeySplit ? num_slots - first : kKeySplit);
            switch (some) {
                case 1: scores_of<1>(args, queries + q0, block, first, seen, scores); break;
                case 2: scores_of<2>(args, queries + q0, block, first, seen, scores); break;
                case 3: scores_of<3>(args, queries + q0, block, first, seen, scores); break;
                default: scores_of<kQueries>(args, queries + q0, block, first, seen, scores);
            }
            for (int q = 0; q < some; ++q) std::memcpy(gathered + q * stride + first, scores[q], sizeof scores[q]);
        }
        for (int64_t first = 0; first < count; first += kKeySplit) {
            const Span span = span_of(args, start + count, start + first);
            if (span.low >= span.high) continue;
            alignas(64) float own[kQueries][kKeySplit] = {};
            for (int q = 0; q < some; ++q) {
                for (int j = span.low; j < span.high; ++j) own[q][j] = gathered[q * stride + path[first + j]];
                weigh(args, own[q], span.low, span.high, queries[q0 + q]);
            }
            const int32_t* index = path + first;
            switch (some) {
                case 1: add_values<1>(args, queries + q0, own, block.values, index, span.low, span.high); break;
                case 2: add_values<2>(args, queries + q0, own, block.values, index, span.low, span.high); break;
                case 3: add_values<3>(args, queries + q0, own, block.values, index, span.low, span.high); break;
                default: add_values<kQueries>(args, queries + q0, own, block.values, index, span.low, span.high);
            }
        }
    }
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

inline void attention(const AttentionArgs& args, const SequenceView& sequence, int kv_head, int row_begin, int row_end, float* scratch) {
    const int group = args.num_heads / args.keys.num_heads;
    const int64_t width = round_up(args.values.width, W), num_rows = row_end - row_begin;
    const int64_t step_rows = sequence.row_end - sequence.row_begin;
    const int64_t capacity = round_up(kKeySplit + step_rows, kKeySplit) + kKeySplit;
    const KeyBlock block = {scratch, scratch + capacity * args.keys.width, capacity};
    float* at = block.values + capacity * width;
    int32_t* path = reinterpret_cast<int32_t*>(at);
    float* gathered = at + 2 * capacity;
    float* sums = gathered + kQueries * capacity;
    float* stats = sums + num_rows * group * width;
    const auto query_of = [&](int64_t q) -> Query {
        const int64_t row = row_begin + q / group, head = static_cast<int64_t>(kv_head) * group + q % group;
        return {args.query + row * args.query_stride + head * args.keys.width, sums + q * width, stats + 2 * q};
    };
    const int64_t num_queries = num_rows * group;
    std::memset(sums, 0, sizeof(float) * num_queries * width);
    for (int64_t q = 0; q < num_queries; ++q) {
        stats[2 * q] = -INFINITY;
        stats[2 * q + 1] = 0.0f;
    }
    const bool is_chain = sequence.parents == nullptr;
    const int64_t local = row_begin - sequence.row_begin;
    // A chain's rows see prefixes of the slots, so all their splits are shared; a tree's only in the context.
    const int64_t most = is_chain ? sequence.num_context + local + num_rows : sequence.num_context / kKeySplit * kKeySplit;
    for (int64_t first = 0; first < most; first += kKeySplit) {
        const int64_t count = most - first < kKeySplit ? most - first : kKeySplit;
        bool seen = false;
        for (int64_t q = 0; q < num_queries; q += kQueries) {
            const int some = num_queries - q < kQueries ? static_cast<int>(num_queries - q) : kQueries;
            Query queries[kQueries];
            Span spans[kQueries];
            bool any = false;
            for (int i = 0; i < some; ++i) {
                queries[i] = query_of(q + i);
                int64_t num_keys = sequence.num_context + local + (q + i) / group + 1;
                if (!is_chain) {
                    num_keys = sequence.num_context;
                    for (int r = static_cast<int>(local + (q + i) / group); r >= 0; r = sequence.parents[r]) ++num_keys;
                }
                spans[i] = span_of(args, num_keys, first);
                any = any || spans[i].low < spans[i].high;
            }
            if (!any) continue;
            if (!seen) {
                const int64_t next = first + kKeySplit, later = most - next < kKeySplit ? most - next : kKeySplit;
                outrider::fetch_heads(args.keys, sequence.slots + next, later, kv_head);
                outrider::fetch_heads(args.values, sequence.slots + next, later, kv_head);
                read_block(args, sequence.slots + first, count, kv_head, block);
            }
            seen = true;
            attend_split_of(some, args, queries, spans, block, 0);
        }
    }
    if (!is_chain) {
        const int64_t tail = sequence.num_context - most + step_rows;
        read_block(args, sequence.slots + most, tail, kv_head, block);
        for (int64_t r = 0; r < num_rows; ++r) {
            Query queries[64];
            for (int g0 = 0; g0 < group; g0 += 64) {
                const int some = group - g0 < 64 ? group - g0 : 64;
                for (int g = 0; g < some; ++g) queries[g] = query_of(r * group + g0 + g);
                attend_tree_tail(args, sequence, static_cast<int>(local + r), most, queries, some, block, path, gathered);
            }
        }
    }
    for (int64_t q = 0; q < num_queries; ++q)
        write_out(args, static_cast<int>(row_begin + q / group), kv_head * group + static_cast<int>(q % group), query_of(q));
}

}  // namespace OUTRIDER_LEVEL
