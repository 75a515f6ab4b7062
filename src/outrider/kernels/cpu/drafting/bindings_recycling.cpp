// Token Recycling's tables and texts, bound to Python.
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
#include "noise.h"
#include "recycled_text.h"

namespace outrider {
namespace {

// Ranks candidates by their logits, or with the noise that the text's next tokens are chosen with: a `PlaceNoise`.
class Ranking {
public:
    Ranking(nb::handle noise, int64_t count) : noise_(noise), count_(count) {
        if (noise.is_none()) return;
        stream_.seed = nb::cast<uint64_t>(noise.attr("seed"));
        stream_.position = nb::cast<uint64_t>(noise.attr("position"));
        temperature_ = nb::cast<float>(noise.attr("temperature"));
    }

    std::vector<int64_t> operator()(const Candidates& candidates, int64_t depth) const {
        if (noise_.is_none()) return candidates.tokens;
        PhiloxStream stream = stream_;
        stream.position += static_cast<uint64_t>(depth);
        const int64_t size = static_cast<int64_t>(candidates.tokens.size());
        std::vector<int64_t> best =
            rank_with_noise(stream, candidates.tokens.data(), candidates.logits.data(), size, temperature_, count_);
        if (!best.empty()) return best;
        const nb::object exact = noise_.attr("behind")(depth);
        return numbers<int64_t>(exact.attr("ranked")(as_list(candidates.tokens), as_list(candidates.logits), count_), INT64_MAX);
    }

private:
    nb::handle noise_;
    int64_t count_;
    PhiloxStream stream_ = {0, 0, kTargetPurpose, 0};
    float temperature_ = 0.0f;
};

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

std::vector<SharedCandidates> candidates_from(const Rows<int64_t>& token_rows, const Rows<float>& logits, size_t num_rows) {
    const size_t count = token_rows.shape(1);
    const bool fits = token_rows.shape(0) == num_rows && logits.shape(0) == num_rows && logits.shape(1) == count && count > 0;
    if (!fits) throw std::invalid_argument("candidates: expected a row of tokens and one of logits for each node");
    std::vector<SharedCandidates> candidates;
    for (size_t row = 0; row < num_rows; ++row) {
        const int64_t* row_tokens = token_rows.data() + row * count;
        const float* row_logits = logits.data() + row * count;
        candidates.push_back(std::make_shared<Candidates>(Candidates{{row_tokens, row_tokens + count}, {row_logits, row_logits + count}}));
    }
    return candidates;
}

void require_table(int64_t max_context, int64_t num_candidates) {
    if (max_context < 1 || num_candidates < 1) throw std::invalid_argument("max_context, num_candidates: expected at least 1");
}

// What a `TokenTree` is made of: the text's last token above the guesses.
nb::tuple as_token_tree(int64_t root, const GuessTree& made) {
    std::vector<int64_t> tokens = {root}, parents = {-1};
    std::vector<double> confidences = {1.0};
    tokens.insert(tokens.end(), made.tokens.begin(), made.tokens.end());
    for (const int64_t parent : made.parents) parents.push_back(parent + 1);
    confidences.insert(confidences.end(), made.probs.begin(), made.probs.end());
    return nb::make_tuple(as_tuple(tokens), as_tuple(parents), as_tuple(confidences));
}

void bind_recycled_text(nb::module_& m) {
    nb::class_<RecyclingRates>(m, "RecyclingRates").def(nb::init<const RecyclingRates::Priors&, double, double>());
    nb::class_<RecycledText>(m, "RecycledText")
        .def("__init__", [](RecycledText* self, ContextTable& shared, RecyclingRates& rates, int64_t max_context,
                            int64_t num_candidates, int64_t capacity) {
            require_table(max_context, num_candidates);
            new (self) RecycledText(shared, rates, max_context, num_candidates, capacity);
        }, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("grow", [](RecycledText& self, nb::sequence tokens, int64_t max_nodes, int64_t max_depth, double min_path_prob,
                        nb::object noise) {
            if (!(min_path_prob > 0.0)) throw std::invalid_argument("min_path_prob: expected more than 0");
            const int64_t size = static_cast<int64_t>(nb::len(tokens));
            if (size == 0) throw std::invalid_argument("tokens: expected at least one");
            const int64_t first = std::max<int64_t>(std::min(self.num_known(), size) - self.longest(), 0);
            const std::vector<int32_t> read = numbers_between<int32_t>(tokens, first, size);
            const Ranking ranking(noise, self.num_candidates());
            return as_token_tree(read.back(), self.grow(read, first, {max_nodes, max_depth, min_path_prob}, ranking));
        }, nb::arg("tokens"), nb::arg("max_nodes"), nb::arg("max_depth"), nb::arg("min_path_prob"), nb::arg("noise").none())
        .def("observe", [](RecycledText& self, nb::object tree, Rows<int64_t> token_rows, Rows<float> logits, nb::sequence new_tokens) {
            const std::vector<int32_t> tokens = numbers<int32_t>(tree.attr("tokens"), INT64_MAX);
            if (tokens.empty()) throw std::invalid_argument("a tree without a root");
            const std::vector<ContextPlace> places =
                places_of(self.up_to(tokens[0]), tokens, numbers<int64_t>(tree.attr("parents"), INT64_MAX), self.longest());
            self.learn_chosen(places, candidates_from(token_rows, logits, places.size()));
            if (self.ends_with(tokens[0])) self.take_in(numbers<int32_t>(new_tokens, INT64_MAX));
        });
}

}  // namespace

void bind_recycling(nb::module_& m) {
    nb::class_<ContextTable>(m, "ContextTable")
        .def("__init__", [](ContextTable* self, int64_t max_context, int64_t num_candidates, int64_t capacity) {
            require_table(max_context, num_candidates);
            new (self) ContextTable(max_context, num_candidates, capacity);
        })
        .def("__len__", &ContextTable::size)
        .def_prop_ro("lengths", &ContextTable::lengths);
    m.def("learn_chosen", [](const std::vector<ContextTable*>& tables, nb::sequence tail, nb::sequence tree_tokens,
                             nb::sequence tree_parents, Rows<int64_t> token_rows, Rows<float> logits) {
        if (tables.empty()) return;
        const std::vector<ContextPlace> places =
            places_of(last_numbers<int32_t>(tail, tables[0]->longest()), numbers<int32_t>(tree_tokens, INT64_MAX),
                      numbers<int64_t>(tree_parents, INT64_MAX), tables[0]->longest());
        ContextTable::learn_chosen(tables, places, candidates_from(token_rows, logits, places.size()));
    });
    bind_recycled_text(m);
}

}  // namespace outrider
