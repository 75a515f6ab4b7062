// The Python module: addresses in, results written to memory of the caller's, the interpreter's lock released.
//
// kernels/native.py is the only caller. It checks types, shapes and contiguity, and keeps the memory alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "calls.h"
#include "dispatch.h"
#include "drafting/bindings.h"
#include "llama.h"
#include "thread_pool.h"
#include "tuner.h"

namespace nb = nanobind;
using namespace outrider;
using Address = uint64_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Sequences of a batch from flat arrays; a chain is a sequence whose flag says so.
std::vector<SequenceView> views_of(int num_sequences, Address cu_rows, Address num_context, Address slots, Address cu_slots,
                                   Address parents, Address is_chain) {
    std::vector<SequenceView> views;
    views.reserve(num_sequences);
    for (int s = 0; s < num_sequences; ++s) {
        const int64_t begin = at<int64_t>(cu_rows)[s], end = at<int64_t>(cu_rows)[s + 1];
        views.push_back({static_cast<int>(begin), static_cast<int>(end), at<int64_t>(num_context)[s],
                         at<int64_t>(slots) + at<int64_t>(cu_slots)[s],
                         at<uint8_t>(is_chain)[s] ? nullptr : at<int32_t>(parents) + begin});
    }
    return views;
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("levels", [] {
        std::vector<std::string> names;
        for (const KernelTable* const* level = available_levels(); *level != nullptr; ++level) names.push_back((*level)->name);
        return names;
    });
    m.def("active_level", [] { return std::string(active_level().name); });
    m.def("select_level", [](const std::string& name) { return select_level(name.c_str()); });
    m.def("num_threads", [] { return ThreadPool::instance().num_threads(); });
    m.def("set_num_threads", [](int n) { ThreadPool::instance().set_num_threads(n); },
          nb::call_guard<nb::gil_scoped_release>());
    m.def("force_fetch", [](int fetch) {  // negative: measured again
        ThreadPool::Turn turn;
        Trial::forced() = fetch < 0 ? std::optional<Fetch>() : static_cast<Fetch>(fetch);
    }, nb::call_guard<nb::gil_scoped_release>());
    m.def("time_reading", [](Address data, int64_t num_bytes) { return time_reading(at<void>(data), num_bytes); },
          nb::call_guard<nb::gil_scoped_release>());

    nb::class_<PackedLinear>(m, "PackedLinear")
        .def("__init__", [](PackedLinear* self, int format, int64_t num_outputs, int64_t num_inputs, int group_size,
                            bool has_zeros, Address data, Address input_order, Address bias) {
            new (self) PackedLinear{static_cast<Format>(format), num_outputs, num_inputs, group_size, has_zeros,
                                    at<const uint8_t>(data), at<const int32_t>(input_order), at<const float>(bias)};
        });
    m.def("linear", [](const PackedLinear& weight, Address x, int num_rows, Address out) {
        run_linear(weight, at<const float>(x), num_rows, at<float>(out));
    }, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<KvCache>(m, "KvCache")
        .def("__init__", [](KvCache* self, Address data, int type, int num_heads, int width) {
            new (self) KvCache{at<void>(data), static_cast<KvType>(type), num_heads, width};
        });
    m.def("write_kv", [](Address heads, const KvCache& cache, Address slots, int num_rows) {
        run_write_kv(at<const float>(heads), cache, at<const int64_t>(slots), num_rows);
    }, nb::call_guard<nb::gil_scoped_release>());
    m.def("attention", [](Address query, Address out, int num_heads, const KvCache& keys, const KvCache& values,
                          float scaling, float softcap, int64_t window, Address sinks, int num_sequences, Address cu_rows,
                          Address num_context, Address slots, Address cu_slots, Address parents, Address is_chain) {
        const AttentionArgs args = {at<const float>(query), at<float>(out),
                                    static_cast<int64_t>(num_heads) * keys.width,
                                    static_cast<int64_t>(num_heads) * values.width,
                                    num_heads, keys, values, scaling, softcap, window, at<const float>(sinks)};
        run_attention(args, views_of(num_sequences, cu_rows, num_context, slots, cu_slots, parents, is_chain));
    }, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<LlamaLayer>(m, "LlamaLayer")
        .def("__init__", [](LlamaLayer* self, const PackedLinear& query, const PackedLinear& key, const PackedLinear& value,
                            const PackedLinear& output, const PackedLinear& gate, const PackedLinear& up,
                            const PackedLinear& down, Address input_norm, Address post_norm, Address query_norm,
                            Address key_norm, int64_t window) {
            new (self) LlamaLayer{query, key, value, output, gate, up, down, at<const float>(input_norm),
                                  at<const float>(post_norm), at<const float>(query_norm), at<const float>(key_norm), window};
        });
    nb::class_<Llama>(m, "Llama")
        .def("__init__", [](Llama* self, int64_t hidden, int64_t intermediate, int64_t vocab, int num_heads,
                            int num_kv_heads, int head_dim, float norm_eps, float rope_scaling,
                            std::vector<float> inverse_frequencies, Address embedding, int embedding_type,
                            Address final_norm, const PackedLinear& lm_head, std::vector<LlamaLayer> layers) {
            new (self) Llama({hidden, intermediate, vocab, num_heads, num_kv_heads, head_dim, norm_eps, rope_scaling,
                              std::move(inverse_frequencies), at<const void>(embedding),
                              static_cast<KvType>(embedding_type), at<const float>(final_norm), lm_head, std::move(layers)});
        })
        .def_prop_ro("last_seconds", &Llama::last_seconds)
        .def("forward", [](Llama& self, int num_rows, Address token_ids, Address positions, Address write_slots,
                           int num_sequences, Address cu_rows, Address num_context, Address slots, Address cu_slots,
                           Address parents, Address is_chain, Address logits_rows, int num_logits, int kv_type,
                           Address keys, Address values, Address logits, Address best_tokens, Address best_logits) {
            const LlamaBatch batch = {num_rows, at<const int64_t>(token_ids), at<const int64_t>(positions),
                                      at<const int64_t>(write_slots),
                                      views_of(num_sequences, cu_rows, num_context, slots, cu_slots, parents, is_chain),
                                      at<const int64_t>(logits_rows), num_logits, static_cast<KvType>(kv_type),
                                      at<const uint64_t>(keys), at<const uint64_t>(values)};
            self.forward(batch, {at<float>(logits), at<int64_t>(best_tokens), at<float>(best_logits)});
        }, nb::call_guard<nb::gil_scoped_release>());

    bind_drafting(m);
    bind_draft_sources(m);
}
