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
#include "convert.h"
#include "datastore.h"
#include "hash_index.h"
#include "ngram_counts.h"
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
    bind_datastore(m);
}

}  // namespace outrider
