// What drafting and its noise compute natively: bound to Python, where drafting/ and sampling/ hold the same in Python.
#include "bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "calibration.h"
#include "convert.h"
#include "largest.h"
#include "noise.h"
#include "paths.h"
#include "trigrams.h"

namespace outrider {

void bind_drafting(nb::module_& m) {
    m.def("largest", [](Address rows, Address maxima, int64_t num_rows, int64_t size, int64_t count, Address tokens, Address values) {
        find_largest({at<const float>(rows), at<const float>(maxima), num_rows, size}, count, at<int64_t>(tokens), at<float>(values));
    }, nb::call_guard<nb::gil_scoped_release>());
    m.def("rank_with_noise", [](uint64_t seed, uint64_t position, uint64_t purpose, Row<int64_t> tokens, Row<float> logits,
                                float temperature, int64_t count) {
        if (tokens.size() != logits.size()) throw std::invalid_argument("logits: expected one for each token");
        return rank_with_noise({seed, position, purpose, 0}, tokens.data(), logits.data(),
                               static_cast<int64_t>(tokens.size()), temperature, count);
    });

    nb::class_<Trigrams>(m, "Trigrams")
        .def(nb::init<int64_t, int64_t, double>())
        .def("__len__", &Trigrams::size)
        .def("learn", [](Trigrams& self, std::optional<int64_t> before, int64_t last, int64_t token) {
            self.learn(before.value_or(kNothing), last, token);
        }, nb::arg("before").none(), nb::arg("last"), nb::arg("token"))
        .def("learn_text", [](Trigrams& self, nb::sequence text, int64_t start) {
            const int64_t end = static_cast<int64_t>(nb::len(text));
            const auto token_at = [&](int64_t i) { return i < 0 ? kNothing : nb::cast<int64_t>(text[i]); };
            if (start >= end) return;
            int64_t before = token_at(start - 2), last = token_at(start - 1);
            for (int64_t position = start; position < end; ++position) {
                const int64_t token = token_at(position);
                self.learn(before, last, token);
                before = last;
                last = token;
            }
        });
    m.def("search_trigrams", [](const std::vector<const Trigrams*>& matrices, std::optional<int64_t> before, int64_t last,
                                int64_t num_candidates, double exploration, int64_t max_nodes, int64_t max_depth,
                                double min_path_prob) {
        if (!(min_path_prob > 0.0)) throw std::invalid_argument("min_path_prob: expected more than 0");
        TrigramSearch search(matrices, {num_candidates, exploration, max_nodes, max_depth, min_path_prob});
        std::vector<WeightedPath> found;
        for (const TrigramSearch::Path& path : search.paths(before.value_or(kNothing), last)) {
            WeightedPath& made = found.emplace_back();
            for (const Candidate& node : path) {
                made.tokens.push_back(node.token);
                made.confidences.push_back(node.probability);
            }
        }
        return as_pairs(found);
    }, nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());

    nb::class_<Calibration>(m, "Calibration")
        .def(nb::init<>())
        .def("corrected", [](Calibration& self, const std::string& request_id, nb::sequence paths) {
            return as_pairs(self.corrected(request_id, read_paths(paths, INT64_MAX)));
        })
        .def("observe", [](Calibration& self, const std::string& request_id, nb::sequence new_tokens) {
            self.observe(request_id, numbers<int64_t>(new_tokens, INT64_MAX));
        })
        .def("release", &Calibration::release);
    m.def("weighted_paths", [](nb::sequence candidates, int64_t max_paths) {
        PathWeights weights;
        for (nb::handle candidate : candidates) {
            const int64_t length = nb::cast<int64_t>(candidate[1]);
            if (length < 0 || length > kMaxLength) throw std::invalid_argument("length of a match: expected 0 to 16");
            weights.add(numbers<int64_t>(candidate[0], INT64_MAX), length);
        }
        return as_pairs(weights.weigh(max_paths));
    });
    m.def("merge_paths", [](int64_t root, nb::sequence paths, int64_t max_nodes, int64_t max_depth, double min_path_prob) {
        const MergedTree tree = merge_paths(root, read_paths(paths, std::min(max_nodes, max_depth)), max_nodes, min_path_prob);
        return nb::make_tuple(as_tuple(tree.tokens), as_tuple(tree.parents), as_tuple(tree.confidences));
    });
}

}  // namespace outrider
