// Tri-gram statistics and the search over them: drafting/sources/trigrams.py in C++, addition for addition.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <list>
#include <unordered_map>
#include <utility>
#include <vector>

#include "paths.h"

namespace outrider {

constexpr int64_t kNothing = -1;     // before a token that stands by itself
constexpr double kSingleRate = 0.5;  // SINGLE_RATE

class Trigrams {
public:
    using Row = std::vector<Candidate>;

    Trigrams(int64_t capacity, int64_t num_candidates, double rate)
        : capacity_(capacity), num_candidates_(num_candidates), rate_(rate) {}

    void learn(int64_t before, int64_t last, int64_t token) {
        update({kNothing, last}, token, rate_ * kSingleRate);
        if (before != kNothing) update({before, last}, token, rate_);
    }

    const Row* row(int64_t before, int64_t last) const {
        const auto found = rows_.find({before, last});
        return found == rows_.end() ? nullptr : &found->second->second;
    }

    int64_t size() const { return static_cast<int64_t>(rows_.size()); }

private:
    using Key = std::pair<int64_t, int64_t>;
    struct Hash {
        size_t operator()(const Key& key) const {
            uint64_t mixed = static_cast<uint64_t>(key.first) * 0x9E3779B97F4A7C15 + static_cast<uint64_t>(key.second);
            mixed = (mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93;
            return mixed ^ (mixed >> 32);
        }
    };
    using Entry = std::pair<Key, Row>;

    void update(Key key, int64_t token, double rate) {
        auto found = rows_.find(key);
        if (found != rows_.end()) {
            updated_.splice(updated_.end(), updated_, found->second);
        } else {
            if (size() >= capacity_) {
                rows_.erase(updated_.front().first);
                updated_.pop_front();
            }
            updated_.emplace_back(key, Row());
            found = rows_.emplace(key, std::prev(updated_.end())).first;
        }
        Row& row = found->second->second;
        for (Candidate& other : row) other.probability *= 1.0 - rate;
        auto known = std::find_if(row.begin(), row.end(), [&](const Candidate& c) { return c.token == token; });
        if (known != row.end()) {
            known->probability += rate;
            return;
        }
        if (static_cast<int64_t>(row.size()) >= num_candidates_) {
            row.erase(std::min_element(row.begin(), row.end(), [](const Candidate& a, const Candidate& b) {
                return a.probability < b.probability;
            }));
        }
        row.push_back({token, rate});
    }

    int64_t capacity_, num_candidates_;
    double rate_;
    std::list<Entry> updated_;  // the one that was updated longest ago first
    std::unordered_map<Key, std::list<Entry>::iterator, Hash> rows_;
};

struct TrigramLimits {
    int64_t num_candidates;
    double exploration;
    int64_t max_nodes, max_depth;
    double min_path_prob;
};

class TrigramSearch {
public:
    TrigramSearch(std::vector<const Trigrams*> matrices, TrigramLimits limits)
        : matrices_(std::move(matrices)), limits_(limits) {}

    using Path = std::vector<Candidate>;

    // The tree as the paths to its leaves.
    std::vector<Path> paths(int64_t before, int64_t last) {
        if (limits_.max_nodes <= 0 || limits_.max_depth <= 0) return {};
        states_.clear();
        states_.reserve(limits_.max_nodes + 1);
        states_.emplace_back(predict(before, last, limits_.min_path_prob));
        for (int64_t n = 0; n < limits_.max_nodes && states_[0].best >= limits_.min_path_prob; ++n) add_node(before, last);
        std::vector<Path> found;
        Path path;
        collect(0, path, found);
        return found;
    }

    std::vector<Candidate> predict(int64_t before, int64_t last, double least) const {
        std::vector<Candidate> found;
        double left = 1.0;
        for (int level = before == kNothing; level < 2 && left >= least; ++level) {
            for (const Trigrams* matrix : matrices_) {
                if (left < least) break;
                const Trigrams::Row* row = matrix->row(level == 0 ? before : kNothing, last);
                if (row == nullptr) continue;
                double taken = 0.0;
                const size_t num_known = found.size();  // a row has no token twice
                for (const Candidate& next : *row) {
                    const bool known = std::any_of(found.begin(), found.begin() + num_known,
                                                   [&](const Candidate& c) { return c.token == next.token; });
                    if (known) continue;
                    found.push_back({next.token, left * next.probability});
                    taken += next.probability;
                }
                left *= 1.0 - taken;
            }
        }
        found.erase(std::remove_if(found.begin(), found.end(), [&](const Candidate& c) { return c.probability < least; }),
                    found.end());
        std::stable_sort(found.begin(), found.end(),
                         [](const Candidate& a, const Candidate& b) { return a.probability > b.probability; });
        if (static_cast<int64_t>(found.size()) > limits_.num_candidates) found.resize(limits_.num_candidates);
        return found;
    }

private:
    struct Child {
        int64_t token;
        double confidence, value;
        int64_t state, visits;
    };

    struct State {
        explicit State(const std::vector<Candidate>& candidates) {
            children.reserve(candidates.size());
            for (const Candidate& c : candidates) children.push_back({c.token, c.probability, c.probability, kNothing, 0});
            refresh();
        }
        void refresh() {
            best = 0.0;
            for (const Child& child : children) best = std::max(best, child.value);
        }
        std::vector<Child> children;
        int64_t num_visits = 0;
        double best;
    };

    void add_node(int64_t before, int64_t last) {
        walk_.clear();
        int64_t state = 0;
        double product = 1.0;
        while (state != kNothing) {
            const int64_t index = select(states_[state], limits_.min_path_prob / product);
            walk_.push_back({state, index});
            const Child& child = states_[state].children[index];
            before = last;
            last = child.token;
            product *= child.confidence;
            state = child.state;
        }
        const bool is_deepest = static_cast<int64_t>(walk_.size()) >= limits_.max_depth;
        const int64_t made = static_cast<int64_t>(states_.size());
        states_.emplace_back(is_deepest ? std::vector<Candidate>() : predict(before, last, limits_.min_path_prob / product));
        double value = states_.back().best;
        states_[walk_.back().first].children[walk_.back().second].state = made;
        for (auto step = walk_.rbegin(); step != walk_.rend(); ++step) {
            State& above = states_[step->first];
            Child& child = above.children[step->second];
            child.value = child.confidence * value;
            ++child.visits;
            ++above.num_visits;
            above.refresh();
            value = above.best;
        }
    }

    int64_t select(const State& state, double least) const {
        const double bonus = limits_.exploration != 0.0 ? limits_.exploration * std::sqrt(1.0 + state.num_visits) : 0.0;
        int64_t chosen = kNothing;
        double greatest = -1.0;
        for (size_t i = 0; i < state.children.size(); ++i) {
            const Child& child = state.children[i];
            if (child.value < least) continue;
            const double score = child.value + bonus * child.confidence / (1.0 + child.visits);
            if (score > greatest) {
                chosen = static_cast<int64_t>(i);
                greatest = score;
            }
        }
        if (chosen != kNothing) return chosen;
        for (size_t i = 0;; ++i) {  // a promise may be missed by a rounding
            if (state.children[i].value == state.best) return static_cast<int64_t>(i);
        }
    }

    void collect(int64_t state, Path& path, std::vector<Path>& found) const {
        bool is_leaf = true;
        for (const Child& child : states_[state].children) {
            if (child.state == kNothing) continue;
            is_leaf = false;
            path.push_back({child.token, child.confidence});
            collect(child.state, path, found);
            path.pop_back();
        }
        if (is_leaf && !path.empty()) found.push_back(path);
    }

    std::vector<const Trigrams*> matrices_;
    TrigramLimits limits_;
    std::vector<State> states_;
    std::vector<std::pair<int64_t, int64_t>> walk_;
};

}  // namespace outrider
