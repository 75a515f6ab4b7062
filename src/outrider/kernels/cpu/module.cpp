// The Python module: addresses in, results written to memory of the caller's, the interpreter's lock released.
//
// kernels/native.py is the only caller. It checks types, shapes and contiguity, and keeps the memory alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <string>
#include <vector>

#include "balance.h"
#include "calls.h"
#include "dispatch.h"
#include "drafting/bindings.h"
#include "llama.h"
#include "step_rows.h"
#include "thread_pool.h"
#include "tuner.h"

namespace nb = nanobind;
using namespace outrider;

namespace {

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
    m.def("force_parts", [](std::vector<double> bounds) {  // empty: measured again
        ThreadPool::Turn turn;
        Balance::forced() = std::move(bounds);
    }, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<Balance>(m, "Balance")  // for tests
        .def("__init__", [](Balance* self, int num_threads) { (new (self) Balance())->set_num_threads(num_threads); })
        .def("share_of", [](const Balance& self, int64_t count, int thread) {
            const Share share = self.share_of(count, thread);
            return nb::make_tuple(share.begin, share.end);
        })
        .def("record", &Balance::record)
        .def("update", &Balance::update);
    nb::class_<Tuner>(m, "Tuner")  // for tests
        .def(nb::init<>())
        .def("next", [](Tuner& self) { return static_cast<int>(self.next()); })
        .def("record", &Tuner::record);
    m.def("noise_ceiling", [](uint32_t half) {  // for tests
        const float logit = 0.0f;
        float ceilings[16];
        uint16_t places[16];
        active_level().noise_hits(&logit, &half, 1, 1.0f, 0.0f, ceilings, places);
        return ceilings[0];
    });
    m.def("time_reading", [](Address data, int64_t num_bytes, int fetch) {
        return time_reading(at<void>(data), num_bytes, static_cast<Fetch>(fetch));
    }, nb::call_guard<nb::gil_scoped_release>());

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
    m.def("move_slots", [](Address storage, int64_t num_layers, int64_t num_slots, int64_t slot_bytes,
                           const std::vector<int64_t>& sources, const std::vector<int64_t>& targets) {
        std::vector<char> read(sources.size() * slot_bytes);
        for (int64_t layer = 0; layer < num_layers; ++layer) {
            char* slots = at<char>(storage) + layer * num_slots * slot_bytes;
            for (size_t i = 0; i < sources.size(); ++i)
                std::memcpy(read.data() + i * slot_bytes, slots + sources[i] * slot_bytes, slot_bytes);
            for (size_t i = 0; i < targets.size(); ++i)
                std::memcpy(slots + targets[i] * slot_bytes, read.data() + i * slot_bytes, slot_bytes);
        }
    });
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
                            std::vector<float> inverse_frequencies, int64_t num_tokens, Address embedding,
                            int embedding_type,
                            Address final_norm, const PackedLinear& lm_head, std::vector<LlamaLayer> layers) {
            new (self) Llama({hidden, intermediate, vocab, num_heads, num_kv_heads, head_dim, norm_eps, rope_scaling,
                              std::move(inverse_frequencies), num_tokens, at<const void>(embedding),
                              static_cast<KvType>(embedding_type), at<const float>(final_norm), lm_head, std::move(layers)});
        })
        .def_prop_ro("last_seconds", &Llama::last_seconds)
        .def("forward", [](Llama& self, nb::handle sequences, const LlamaCaches& caches, Address logits, Address maxima,
                           bool chooses) {
            if (caches.keys.size() != self.num_layers()) throw nb::value_error("caches: expected one for each layer");
            const StepRows rows(sequences, self.num_tokens(), caches.num_slots);
            const size_t num_logits = rows.logits_rows.size();
            std::vector<int64_t> tokens(num_logits);
            std::vector<float> log_weights(num_logits);
            const LlamaBatch batch = {static_cast<int>(rows.size()), rows.token_ids.data(), rows.positions.data(),
                                      rows.write_slots.data(), rows.sequences, rows.logits_rows.data(), rows.draws.data(),
                                      static_cast<int>(num_logits), caches.type, caches.keys.data(), caches.values.data()};
            {
                const nb::gil_scoped_release released;
                self.forward(batch, {at<float>(logits), chooses ? tokens.data() : nullptr, log_weights.data(), at<float>(maxima)});
            }
            return nb::make_tuple(as_list(tokens), as_list(log_weights));
        });
    nb::class_<LlamaCaches>(m, "LlamaCaches")
        .def("__init__", [](LlamaCaches* self, std::vector<Address> keys, std::vector<Address> values, int type,
                            int64_t num_slots) {
            new (self) LlamaCaches{std::move(keys), std::move(values), static_cast<KvType>(type), num_slots};
        });

    bind_drafting(m);
    bind_draft_sources(m);
    bind_recycling(m);
}
