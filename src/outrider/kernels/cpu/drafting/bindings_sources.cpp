// The indexes that texts are looked up in, bound to Python.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings.h"
#include "context_table.h"
#include "convert.h"
#include "datastore.h"
#include "hash_index.h"
#include "ngram_counts.h"
#include "noise.h"
#include "suffix_tree.h"

namespace outrider {
namespace {

std::vector<int32_t> tokens_from(nb::sequence text, int64_t first) { return numbers_between<int32_t>(text, first, INT64_MAX); }

void bind_hash_index(nb::module_& m) {
    nb::class_<HashIndex>(m, "HashIndex")
        .def(nb::init<const std::vector<int64_t>&>())
        .def("__len__", &HashIndex::size)
        .def("append", [](HashIndex& self, nb::sequence tokens) {
            for (const int32_t token : tokens_from(tokens, 0)) self.append(token);
        })
        .def("copies", [](const HashIndex& self, nb::sequence tokens, int64_t depth, int64_t per_length, int64_t most, bool periodic) {
            nb::list found;
            const std::vector<int32_t> last = last_numbers<int32_t>(tokens, self.num_read());
            for (const Copy& copy : self.copies(last, {std::max<int64_t>(depth, 0), per_length, most, periodic})) {
                found.append(nb::make_tuple(as_list(copy.tokens), copy.length));
            }
            return found;
        }, nb::arg("tokens"), nb::arg("depth"), nb::kw_only(), nb::arg("per_length"), nb::arg("most"), nb::arg("periodic"));
}

void bind_ngram_counts(nb::module_& m) {
    nb::class_<NgramCounts>(m, "NgramCounts")
        .def("__init__", [](NgramCounts* self, const std::vector<int64_t>& levels) {
            if (levels.empty() || levels.back() < 1) throw std::invalid_argument("levels: expected at least 1 each");
            if (!std::is_sorted(levels.rbegin(), levels.rend())) throw std::invalid_argument("levels: expected the longest first");
            new (self) NgramCounts(levels);
        })
        .def("extend", [](NgramCounts& self, nb::sequence text) {
            for (const int32_t token : tokens_from(text, self.size())) self.append(token);
        })
        .def("paths", [](NgramCounts& self, int64_t num_candidates, int64_t max_nodes, int64_t max_depth, double min_path_prob) {
            return as_pairs(self.paths(std::max<int64_t>(num_candidates, 1), {max_nodes, max_depth, min_path_prob}));
        });
}

template <class Suffixes>
nb::list guesses(const Suffixes& suffixes, int64_t num_pending, double escape, std::pair<int64_t, int64_t> matches,
                 double max_spec_factor, int64_t max_nodes, int64_t max_depth, double min_path_prob) {
    const auto [deepest, num_matches] = matches;
    return as_pairs(suffixes.best({num_pending, escape, deepest, num_matches, max_spec_factor, {max_nodes, max_depth, min_path_prob}}).paths());
}

void bind_suffix_tree(nb::module_& m) {
    nb::class_<SuffixTree>(m, "SuffixTree")
        .def("__init__", [](SuffixTree* self, int64_t max_depth) {
            if (max_depth < 2) throw std::invalid_argument("max_depth: expected at least 2");
            new (self) SuffixTree(max_depth);
        })
        .def("__len__", &SuffixTree::size)
        .def_prop_ro("version", &SuffixTree::version)
        .def("sequences", &SuffixTree::sequences)
        .def("extend", [](SuffixTree& self, nb::sequence tokens) {
            for (const int32_t token : tokens_from(tokens, 0)) self.append(token);
        })
        .def("end_sequence", &SuffixTree::end_sequence)
        .def("forget_oldest", &SuffixTree::forget_oldest)
        .def("guesses", &guesses<SuffixTree>);
    nb::class_<SuffixCursor>(m, "SuffixCursor")
        .def(nb::init<const SuffixTree&>(), nb::keep_alive<1, 2>())
        .def("follow", [](SuffixCursor& self, nb::sequence tokens, int64_t num_new) {
            const int64_t num_read = self.num_read(static_cast<int64_t>(nb::len(tokens)), num_new);
            self.follow(last_numbers<int32_t>(tokens, num_read));
        })
        .def("guesses", &guesses<SuffixCursor>);
}

// Tokens of candidates in the order of their logits plus the noise that a place's token is chosen with.
std::vector<int64_t> ranked(const Candidates& candidates, nb::handle noise, const PhiloxStream& stream, float temperature, int64_t count) {
    const int64_t size = static_cast<int64_t>(candidates.tokens.size());
    std::vector<int64_t> best = rank_with_noise(stream, candidates.tokens.data(), candidates.logits.data(), size, temperature, count);
    if (!best.empty()) return best;
    return numbers<int64_t>(noise.attr("ranked")(as_list(candidates.tokens), as_list(candidates.logits), count), INT64_MAX);
}

// The places of a tree's nodes: what stands before the root, the root included, and the tokens on the way.
std::vector<ContextPlace> places_of(ContextPlace root, const std::vector<int32_t>& tokens, const std::vector<int64_t>& parents,
                                    int64_t longest) {
    if (root.empty() || tokens.empty() || parents.size() != tokens.size()) throw std::invalid_argument("a tree without a root");
    std::vector<ContextPlace> places = {std::move(root)};
    for (size_t node = 1; node < tokens.size(); ++node) {
        if (parents[node] < 0 || parents[node] >= static_cast<int64_t>(node)) throw std::invalid_argument("parents: not before children");
        const ContextPlace& above = places[parents[node]];
        const bool is_full = static_cast<int64_t>(above.size()) >= longest;
        ContextPlace place(above.begin() + is_full, above.end());
        place.push_back(tokens[node]);
        places.push_back(std::move(place));
    }
    return places;
}

void bind_context_table(nb::module_& m) {
    nb::class_<ContextTable>(m, "ContextTable")
        .def("__init__", [](ContextTable* self, int64_t max_context, int64_t num_candidates, int64_t capacity) {
            if (max_context < 1 || num_candidates < 1) throw std::invalid_argument("max_context, num_candidates: expected at least 1");
            new (self) ContextTable(max_context, num_candidates, capacity);
        })
        .def("__len__", &ContextTable::size)
        .def_prop_ro("lengths", &ContextTable::lengths)
        .def("learn_seen", [](ContextTable& self, nb::sequence tokens, int64_t start) {
            const int64_t begin = std::max<int64_t>(std::max<int64_t>(start, 1) - self.longest(), 0);
            self.learn_seen(tokens_from(tokens, begin), std::max<int64_t>(start, 1) - begin);
        })
        .def("predict", [](const ContextTable& self, const ContextTable& shared, nb::sequence place, int64_t num_lengths,
                           int64_t count, nb::object noise) {
            PhiloxStream stream = {0, 0, kTargetPurpose, 0};
            float temperature = 0.0f;
            if (!noise.is_none()) {
                stream.seed = nb::cast<uint64_t>(noise.attr("seed"));
                stream.position = nb::cast<uint64_t>(noise.attr("position"));
                temperature = nb::cast<float>(noise.attr("temperature"));
            }
            const auto in_order = [&](const Candidates& candidates) {
                return noise.is_none() ? candidates.tokens : ranked(candidates, noise, stream, temperature, count);
            };
            const ContextPlace last = last_numbers<int32_t>(place, self.longest());
            const auto [found, num_known] = ContextTable::predict(self, shared, last, num_lengths, count, in_order);
            nb::list prediction;
            for (const Predicted& of : found) {
                prediction.append(nb::make_tuple(static_cast<int>(of.origin), of.length_index, as_list(of.tokens)));
            }
            return nb::make_tuple(prediction, num_known);
        }, nb::arg("shared"), nb::arg("place"), nb::arg("num_lengths"), nb::arg("count"), nb::arg("noise").none());
    m.def("learn_chosen", [](const std::vector<ContextTable*>& tables, nb::sequence tail, nb::sequence tokens, nb::sequence parents,
                             Rows<int64_t> token_rows, Rows<float> logits) {
        if (tables.empty()) return;
        const std::vector<ContextPlace> places =
            places_of(last_numbers<int32_t>(tail, tables[0]->longest()), numbers<int32_t>(tokens, INT64_MAX),
                      numbers<int64_t>(parents, INT64_MAX), tables[0]->longest());
        const size_t num_rows = places.size(), count = token_rows.shape(1);
        const bool fits = token_rows.shape(0) == num_rows && logits.shape(0) == num_rows && logits.shape(1) == count && count > 0;
        if (!fits) throw std::invalid_argument("candidates: expected a row of tokens and one of logits for each node");
        std::vector<SharedCandidates> candidates;
        for (size_t row = 0; row < num_rows; ++row) {
            const int64_t* row_tokens = token_rows.data() + row * count;
            const float* row_logits = logits.data() + row * count;
            candidates.push_back(std::make_shared<Candidates>(Candidates{{row_tokens, row_tokens + count}, {row_logits, row_logits + count}}));
        }
        ContextTable::learn_chosen(tables, places, candidates);
    });
}

void bind_datastore(nb::module_& m) {
    nb::class_<Datastore>(m, "Datastore")
        .def("__init__", [](Datastore* self, const std::vector<std::pair<Address, int64_t>>& chunks, int64_t token_bytes,
                            int64_t separator, int64_t num_proposed) {
            std::vector<Chunk> parts;
            for (const auto& [tokens, length] : chunks) {
                const uint8_t* start = at<const uint8_t>(tokens);
                parts.push_back({start, start + (length * token_bytes + 7) / 8 * 8, length});
            }
            new (self) Datastore(std::move(parts), token_bytes, separator, num_proposed);
        })
        .def("search", [](const Datastore& self, nb::sequence query, int64_t num_lengths, int64_t num_samples, int64_t max_nodes,
                          int64_t max_depth, double min_path_prob) {
            auto [length, paths] = self.search(numbers<int64_t>(query, INT64_MAX),
                                               {num_lengths, num_samples, {max_nodes, max_depth, min_path_prob}});
            return nb::make_tuple(length, as_pairs(paths));
        });
}

}  // namespace

void bind_draft_sources(nb::module_& m) {
    bind_hash_index(m);
    bind_ngram_counts(m);
    bind_suffix_tree(m);
    bind_context_table(m);
    bind_datastore(m);
}

}  // namespace outrider
