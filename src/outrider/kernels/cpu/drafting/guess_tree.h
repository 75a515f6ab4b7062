// Trees of guesses grown from counts: drafting/sources/guess_tree.py in C++, addition for addition.
#pragma once

#include <algorithm>
#include <cstdint>
#include <queue>
#include <utility>
#include <vector>

#include "paths.h"

namespace outrider {

// Guesses below a match; parent -1 is the root, a prob that of the node once its parent is right.
struct GuessTree {
    std::vector<int64_t> tokens, parents;
    std::vector<double> probs;
    double score = 0.0;  // the sum over the nodes of the product of probs on the way to each

    int64_t size() const { return static_cast<int64_t>(tokens.size()); }

    void add(int64_t token, int64_t parent, double prob, double product) {
        tokens.push_back(token);
        parents.push_back(parent);
        probs.push_back(prob);
        score += product;
    }

    // The token at a depth, from 0 on, of the path to a node.
    int64_t token_on_path(int64_t node, int64_t depth) const {
        const std::vector<int64_t> nodes = path(node);
        return tokens[nodes[depth]];
    }

    // In the order in which they were taken.
    std::vector<int64_t> leaves() const {
        std::vector<bool> is_inner(tokens.size());
        for (const int64_t parent : parents) {
            if (parent >= 0) is_inner[parent] = true;
        }
        std::vector<int64_t> found;
        for (int64_t node = 0; node < size(); ++node) {
            if (!is_inner[node]) found.push_back(node);
        }
        return found;
    }

    WeightedPath path_to(int64_t node) const {
        WeightedPath made;
        for (const int64_t on_path : path(node)) {
            made.tokens.push_back(tokens[on_path]);
            made.confidences.push_back(probs[on_path]);
        }
        return made;
    }

    // From the root to each leaf, the one with the most expected tokens first.
    std::vector<WeightedPath> paths() const {
        std::vector<double> products(tokens.size()), expected(tokens.size());
        for (int64_t node = 0; node < size(); ++node) {
            const int64_t parent = parents[node];
            products[node] = parent < 0 ? probs[node] : products[parent] * probs[node];
            expected[node] = parent < 0 ? products[node] : expected[parent] + products[node];
        }
        std::vector<int64_t> ends = leaves();
        std::stable_sort(ends.begin(), ends.end(), [&](int64_t a, int64_t b) { return expected[a] > expected[b]; });
        std::vector<WeightedPath> found;
        for (const int64_t leaf : ends) found.push_back(path_to(leaf));
        return found;
    }

private:
    std::vector<int64_t> path(int64_t node) const {
        std::vector<int64_t> nodes;
        for (; node >= 0; node = parents[node]) nodes.push_back(node);
        std::reverse(nodes.begin(), nodes.end());
        return nodes;
    }
};

struct GrowthLimits {
    int64_t max_nodes, max_depth;
    double min_path_prob;
};

template <class State>
struct Successor {
    int64_t token;
    double prob;
    State state;
};

// The tree with the greatest score, grown on from a chain. `successors(tree, node, depth, state, found)` appends what
// may follow a node, the most probable first.
template <class State, class Successors>
GuessTree grow(GuessTree made, const State& root, const GrowthLimits& limits, Successors successors) {
    struct Open {
        double product;
        int64_t order, parent, depth;
        Successor<State> node;
    };
    const auto is_later = [](const Open& a, const Open& b) {
        return a.product < b.product || (a.product == b.product && a.order > b.order);
    };
    std::priority_queue<Open, std::vector<Open>, decltype(is_later)> open(is_later);
    std::vector<Successor<State>> found;
    double product = 1.0;
    for (const double prob : made.probs) product *= prob;
    int64_t depth = made.size(), node = depth - 1, order = 0;
    State state = root;
    while (true) {
        if (depth < limits.max_depth) {
            found.clear();
            successors(made, node, depth, state, found);
            for (const Successor<State>& next : found) {
                if (product * next.prob < limits.min_path_prob) break;
                open.push({product * next.prob, ++order, node, depth + 1, next});
            }
        }
        if (open.empty() || made.size() >= limits.max_nodes) return made;
        const Open best = open.top();
        open.pop();
        node = made.size();
        product = best.product;
        depth = best.depth;
        state = best.node.state;
        made.add(best.node.token, best.parent, best.node.prob, product);
    }
}

}  // namespace outrider
