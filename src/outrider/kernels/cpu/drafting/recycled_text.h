// One request's text in Token Recycling, and how much its candidates are believed: drafting/recycled_text.py in C++,
// addition for addition.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "context_table.h"
#include "guess_tree.h"

namespace outrider {

// How often candidates of each rank were the target's choice, by where they are from and by the length of the context.
class RecyclingRates {
public:
    using Priors = std::vector<std::vector<std::vector<double>>>;

    RecyclingRates(const Priors& priors, double num_believed, double max_observed) : max_observed_(max_observed) {
        for (const auto& of_origin : priors) {
            auto& made = rates_.emplace_back();
            for (const std::vector<double>& prior : of_origin) {
                made.emplace_back();
                for (const double rate : prior) made.back().push_back({rate, rate * num_believed, num_believed});
            }
        }
    }

    struct Rate {
        double rate, right, seen;
    };
    using ByRank = std::vector<Rate>;

    const ByRank& of(const Predicted& predicted) const {
        return rates_.at(static_cast<size_t>(predicted.origin)).at(predicted.length_index);
    }

    void count(const Predicted& predicted, int64_t chosen) {
        ByRank& by_rank = rates_.at(static_cast<size_t>(predicted.origin)).at(predicted.length_index);
        for (size_t rank = 0; rank < predicted.tokens.size(); ++rank) {
            Rate& of = by_rank.at(rank);
            if (predicted.tokens[rank] == chosen) of.right += 1.0;
            of.seen += 1.0;
            if (of.seen > max_observed_) {
                of.right /= 2;
                of.seen /= 2;
            }
            of.rate = of.right / of.seen;
        }
    }

private:
    double max_observed_;
    std::vector<std::vector<ByRank>> rates_;
};

class RecycledText {
public:
    RecycledText(ContextTable& shared, RecyclingRates& rates, int64_t max_context, int64_t num_candidates, int64_t capacity)
        : shared_(shared), rates_(rates), num_candidates_(num_candidates), own_(max_context, num_candidates, capacity) {}

    int64_t num_known() const { return num_known_; }
    int64_t longest() const { return own_.longest(); }
    int64_t num_candidates() const { return num_candidates_; }

    // The likeliest tree behind a text, of which what is new is learnt first. `ranked(candidates, depth)` orders those with
    // logits for the token so many positions behind the text's next one.
    //
    // `tokens` are the text's from `first` on, at least as many before what is not known as the longest context has.
    template <class Ranked>
    const GuessTree& grow(const std::vector<int32_t>& tokens, int64_t first, const GrowthLimits& limits, Ranked ranked) {
        own_.learn_seen(tokens, std::max<int64_t>(std::max<int64_t>(num_known_, 1) - first, 0));
        num_known_ = first + static_cast<int64_t>(tokens.size());
        tail_.assign(tokens.end() - std::min<int64_t>(longest(), tokens.size()), tokens.end());
        predictions_.clear();
        const auto successors = [&](const GuessTree& made, int64_t node, int64_t depth, const State& state, auto& found) {
            const auto at_depth = [&](const Candidates& candidates) { return ranked(candidates, depth); };
            auto [predicted, num_lengths] =
                ContextTable::predict(own_, shared_, place_of(made, node), state.num_lengths, num_candidates_, at_depth);
            for (const auto& [token, prob] : likeliest(predicted, limits.min_path_prob / state.product)) {
                found.push_back({token, prob, {state.product * prob, num_lengths}});
            }
            predictions_.resize(node + 2);
            predictions_[node + 1] = std::move(predicted);
        };
        const int64_t num_lengths = static_cast<int64_t>(own_.lengths().size());
        made_ = outrider::grow<State>(GuessTree(), {1.0, num_lengths}, limits, successors);
        return made_;
    }

    // Whether a verified tree stands behind the text as it was last shown.
    bool ends_with(int32_t root) const { return !tail_.empty() && tail_.back() == root; }

    // Tokens up to a verified tree's root, as far as they are known.
    ContextPlace up_to(int32_t root) const { return ends_with(root) ? tail_ : ContextPlace{root}; }

    void learn_chosen(const std::vector<ContextPlace>& places, const std::vector<SharedCandidates>& candidates) {
        ContextTable::learn_chosen({&shared_, &own_}, places, candidates);
    }

    // Judges the predictions along the tokens that came, which need not be learnt again.
    void take_in(const std::vector<int32_t>& new_tokens) {
        int64_t node = kRoot;
        for (const int32_t token : new_tokens) {
            if (node >= kRoot && node + 1 < static_cast<int64_t>(predictions_.size())) judge(predictions_[node + 1], token);
            node = child_of(node, token);
        }
        tail_.insert(tail_.end(), new_tokens.begin(), new_tokens.end());
        tail_.erase(tail_.begin(), tail_.end() - std::min<int64_t>(longest(), tail_.size()));
        predictions_.clear();
        num_known_ += static_cast<int64_t>(new_tokens.size());
    }

private:
    static constexpr int64_t kRoot = -1, kNotThere = -2;

    // Of a node: the product of probabilities up to it, and how many lengths of context may be known there.
    struct State {
        double product;
        int64_t num_lengths;
    };

    // The last tokens up to a node, as many as the longest context has.
    ContextPlace place_of(const GuessTree& made, int64_t node) const {
        ContextPlace place;
        for (; node >= 0 && static_cast<int64_t>(place.size()) < longest(); node = made.parents[node]) {
            place.push_back(static_cast<int32_t>(made.tokens[node]));
        }
        const int64_t num_before = std::min<int64_t>(longest() - place.size(), tail_.size());
        place.insert(place.end(), tail_.rbegin(), tail_.rbegin() + num_before);
        std::reverse(place.begin(), place.end());
        return place;
    }

    // The likeliest tokens, and their probabilities: what a context's rates leave is for the shorter ones.
    std::vector<std::pair<int64_t, double>> likeliest(const std::vector<Predicted>& predicted, double least) const {
        std::vector<std::pair<int64_t, double>> found;
        double left = 1.0;
        for (const Predicted& of : predicted) {
            double taken = 0.0;
            const RecyclingRates::ByRank& by_rank = rates_.of(of);
            const size_t num_ranks = std::min(by_rank.size(), of.tokens.size());
            for (size_t rank = 0; rank < num_ranks; ++rank) {
                const double rate = by_rank[rank].rate;
                taken += rate;
                if (left * rate >= least) found.emplace_back(of.tokens[rank], left * rate);
            }
            left *= 1.0 - taken;
            if (left < least) break;
        }
        std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
        found.resize(std::min<size_t>(found.size(), num_candidates_));
        return found;
    }

    void judge(const std::vector<Predicted>& predicted, int64_t chosen) {
        for (const Predicted& of : predicted) {
            rates_.count(of, chosen);
            if (std::find(of.tokens.begin(), of.tokens.end(), chosen) != of.tokens.end()) break;
        }
    }

    int64_t child_of(int64_t node, int64_t token) const {
        for (int64_t child = 0; child < made_.size(); ++child) {
            if (made_.parents[child] == node && made_.tokens[child] == token) return child;
        }
        return kNotThere;
    }

    ContextTable& shared_;
    RecyclingRates& rates_;
    int64_t num_candidates_;
    ContextTable own_;
    int64_t num_known_ = 0;                            // tokens of the text that have been learnt
    ContextPlace tail_;                                // the last of them, up to the root
    GuessTree made_;                                   // the last tree
    std::vector<std::vector<Predicted>> predictions_;  // below each of its nodes, the root first
};

}  // namespace outrider
