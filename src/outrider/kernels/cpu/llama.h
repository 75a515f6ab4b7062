// A whole forward of the Llama family (Llama, Mistral, Qwen2, Qwen3) in one call.
#pragma once

#include <atomic>
#include <vector>

#include "balance.h"
#include "choice.h"
#include "kernel_table.h"
#include "tuner.h"
#include "workspace.h"

namespace outrider {

struct LlamaLayer {
    PackedLinear query, key, value, output, gate, up, down;
    const float* input_norm;      // [hidden]
    const float* post_norm;       // [hidden]
    const float* query_norm;      // [head_dim] or null
    const float* key_norm;        // likewise
    int64_t window;               // sliding window, 0 for none
};

struct LlamaSpec {
    int64_t hidden, intermediate, vocab;
    int num_heads, num_kv_heads, head_dim;
    float norm_eps, rope_scaling;
    std::vector<float> inverse_frequencies;  // [head_dim / 2]
    int64_t num_tokens;
    const void* embedding;                   // [num_tokens, hidden]
    KvType embedding_type;
    const float* final_norm;
    PackedLinear lm_head;
    std::vector<LlamaLayer> layers;
};

struct LlamaBatch {
    int num_rows;
    const int64_t* token_ids;
    const int64_t* positions;
    const int64_t* write_slots;
    const std::vector<SequenceView>& sequences;
    const int64_t* logits_rows;  // [num_logits]
    const Draw* draws;           // [num_logits]
    int num_logits;
    KvType kv_type;
    const uint64_t* keys;    // [layers] addresses
    const uint64_t* values;  // likewise
};

// What a forward leaves: logits, or what each row's token is, or both.
struct LlamaOutput {
    float* logits;       // [num_logits, vocab] or null
    int64_t* tokens;     // [num_logits] or null; the lowest of equals, or kUndecided
    float* log_weights;  // [num_logits] with `tokens`: each row's greatest; NaN if any of the row's is
    float* maxima;       // [num_logits][maxima of a row] or null, with both: the greatest of each kMaximaBlock logits, NaN if one is near
};

// Bytes that a thread will read in a row.
struct Stretch {
    const uint8_t* data;
    int64_t num_bytes;
};

class Llama {
public:
    explicit Llama(LlamaSpec spec);

    void forward(const LlamaBatch& batch, const LlamaOutput& output);
    size_t num_layers() const { return spec_.layers.size(); }
    int64_t num_tokens() const { return spec_.num_tokens; }
    double last_seconds() const { return last_seconds_; }

private:
    struct Step;

    void run_layers(Step& step, int thread, int num_threads);
    void choose_fetches(Step& step, size_t layer, int num_threads);
    void embed(Step& step, int thread, int num_threads);
    void attend(Step& step, size_t layer, int thread, int num_threads);
    void feed_forward(Step& step, size_t layer, int thread, int num_threads);
    Stretch stretch_of(const PackedLinear& weight, int thread) const;
    void measured(Trial& trial, int thread, int64_t num_bytes, const Lap& lap);
    const uint8_t* after_layer(size_t layer, int thread) const;
    void choose(Step& step, int thread, int num_threads);

    LlamaSpec spec_;
    double last_seconds_ = 0.0;
    Buffer<float> hidden_, qkv_, attended_, inner_, largest_, cos_, sin_, rows_, scratch_, strip_;
    std::vector<RowChoice> choices_;  // [threads][num_logits]
    Buffer<uint32_t> words_;
    RowsBuffer packed_[3];
    Tuners tuners_;
    Balance balance_;
};

}  // namespace outrider
