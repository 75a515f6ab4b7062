// Guesses of what follows, as paths: weighing and merging them as the Python of drafting/ does, addition for addition.
#pragma once

#include <algorithm>
#include <cstdint>
#include <queue>
#include <utility>
#include <vector>

namespace outrider {

struct Candidate {
    int64_t token;
    double probability;
};

struct WeightedPath {
    std::vector<int64_t> tokens;
    std::vector<double> confidences;
};

// DISCOUNTS of drafting/sources/matches.py.
constexpr double kDiscounts[] = {1.0,  0.68, 0.45, 0.37, 0.3,  0.25, 0.24, 0.2, 0.16,
                                 0.14, 0.14, 0.13, 0.11, 0.1,  0.09, 0.07, 0.05};
constexpr int64_t kMaxLength = 16;  // MAX_LENGTH

inline double discount_of(int64_t length) { return kDiscounts[std::min(length, kMaxLength)]; }
inline double vote_of(int64_t length) { return static_cast<double>(int64_t{1} << length); }

// `weighted_paths` of drafting/sources/matches.py.
class PathWeights {
public:
    // A continuation, and the length of the match before it: the longest matches first.
    void add(std::vector<int64_t> tokens, int64_t length) {
        for (Voted& path : paths_) {
            if (path.tokens == tokens) {
                path.votes += vote_of(length);
                return;
            }
        }
        paths_.push_back({std::move(tokens), {}, vote_of(length), length, false});
    }

    std::vector<WeightedPath> weigh(int64_t max_paths) {
        std::vector<Voted*> all;
        for (Voted& path : paths_) all.push_back(&path);
        if (!all.empty()) weigh(all, {});
        std::vector<WeightedPath> found;
        for (Voted& path : paths_) {
            if (path.is_weighed && static_cast<int64_t>(found.size()) < max_paths) {
                found.push_back({std::move(path.tokens), std::move(path.confidences)});
            }
        }
        return found;
    }

private:
    struct Voted {
        std::vector<int64_t> tokens;
        std::vector<double> confidences;
        double votes;
        int64_t length;
        bool is_weighed;
    };

    static double votes_of(const std::vector<Voted*>& paths) {
        double total = 0.0;
        for (const Voted* path : paths) total += path->votes;
        return total;
    }

    // Paths whose first `shared.size()` tokens are equal; these tokens' confidences.
    void weigh(const std::vector<Voted*>& paths, std::vector<double> shared) {
        const size_t first = shared.size();
        size_t depth = first;
        Voted& front = *paths[0];
        const double share = vote_of(front.length) / votes_of(paths);
        if (paths.size() == 1) {
            for (; depth < front.tokens.size(); ++depth) shared.push_back(1.0 - share * discount_of(front.length + depth));
            front.confidences = std::move(shared);
            front.is_weighed = true;
            return;
        }
        const auto agree = [&](size_t at) {
            for (const Voted* path : paths) {
                if (path->tokens.size() <= at || path->tokens[at] != front.tokens[at]) return false;
            }
            return true;
        };
        for (; agree(depth); ++depth) shared.push_back(1.0 - share * discount_of(front.length + depth));
        std::vector<std::vector<Voted*>> groups;
        for (Voted* path : paths) {
            if (path->tokens.size() <= depth) continue;  // the others hold all of it
            auto group = std::find_if(groups.begin(), groups.end(), [&](const std::vector<Voted*>& other) {
                return other[0]->tokens[depth] == path->tokens[depth];
            });
            if (group == groups.end()) group = groups.insert(group, std::vector<Voted*>());
            group->push_back(path);
        }
        double total = 0.0;
        for (const auto& group : groups) total += votes_of(group);
        for (const auto& group : groups) {
            const double votes = votes_of(group);
            const double discount = discount_of(group[0]->length + depth) * vote_of(group[0]->length) / votes;
            std::vector<double> with = shared;
            with.push_back(votes / total * (1.0 - discount));
            weigh(group, std::move(with));
        }
    }

    std::vector<Voted> paths_;
};

struct MergedTree {
    std::vector<int64_t> tokens, parents;
    std::vector<double> confidences;
};

// `merge_paths` of drafting/tree_merge.py.
inline MergedTree merge_paths(int64_t root, const std::vector<WeightedPath>& paths, int64_t max_nodes, double min_path_prob) {
    struct Child {
        double product;
        int64_t parent, depth, token;
        double confidence;
        std::vector<const WeightedPath*> paths;  // that lead there
    };
    std::vector<Child> found;
    const auto is_later = [&](size_t a, size_t b) {
        return found[a].product < found[b].product || (found[a].product == found[b].product && a > b);
    };
    std::priority_queue<size_t, std::vector<size_t>, decltype(is_later)> open(is_later);
    MergedTree tree = {{root}, {-1}, {1.0}};
    std::vector<const WeightedPath*> group;
    for (const WeightedPath& path : paths) group.push_back(&path);
    double product = 1.0;
    int64_t node = 0, depth = 0;
    while (static_cast<int64_t>(tree.tokens.size()) <= max_nodes) {
        const size_t first = found.size();
        for (const WeightedPath* path : group) {
            if (static_cast<int64_t>(path->tokens.size()) <= depth) continue;
            const int64_t token = path->tokens[depth];
            const double confidence = path->confidences[depth];
            auto child = std::find_if(found.begin() + first, found.end(), [&](const Child& c) { return c.token == token; });
            if (child == found.end()) child = found.insert(child, Child{0.0, node, depth + 1, token, confidence, {}});
            child->paths.push_back(path);
            child->confidence = std::max(child->confidence, confidence);
        }
        for (size_t child = first; child < found.size(); ++child) {
            found[child].product = product * found[child].confidence;
            if (found[child].product >= min_path_prob) open.push(child);
        }
        if (open.empty()) break;
        const size_t next = open.top();
        open.pop();
        product = found[next].product;
        depth = found[next].depth;
        group = std::move(found[next].paths);
        node = static_cast<int64_t>(tree.tokens.size());
        tree.tokens.push_back(found[next].token);
        tree.parents.push_back(found[next].parent);
        tree.confidences.push_back(found[next].confidence);
    }
    return tree;
}

}  // namespace outrider
