// Counts of what followed n-grams of several levels, and the tree below them: drafting/sources/anpd.py in C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <unordered_map>
#include <utility>
#include <vector>

#include "guess_tree.h"
#include "hashing.h"

namespace outrider {

constexpr double kLeastLeft = 0.01;  // MIN_PATH_PROB of drafting/sources/anpd.py

class NgramCounts {
public:
    // Lengths of n-grams, the longest first.
    explicit NgramCounts(std::vector<int64_t> levels) : levels_(std::move(levels)) {}

    int64_t size() const { return static_cast<int64_t>(text_.size()); }

    void append(int32_t token) {
        const auto [known, is_new] = numbers_.try_emplace(token, static_cast<int32_t>(tokens_.size()));
        if (is_new) {
            tokens_.push_back(token);
            is_found_.push_back(0);
        }
        const Backwards before = last();
        const std::vector<uint64_t> hashes = hashes_of(before);
        for (size_t level = 0; level < levels_.size(); ++level) {
            if (levels_[level] > size()) continue;
            int32_t row = find(levels_[level], hashes[level], before);
            if (row == kNone) row = add_row(levels_[level], hashes[level]);
            count(rows_[row], known->second);
        }
        text_.push_back(known->second);
    }

    // What may follow the text: paths to the leaves of the most likely tree, in the order in which these were taken.
    std::vector<WeightedPath> paths(int64_t num_candidates, const GrowthLimits& limits) {
        const Backwards end = last();
        const auto successors = [&](const GuessTree& tree, int64_t node, int64_t, End, std::vector<Successor<End>>& found) {
            Backwards before;
            for (; node >= 0 && static_cast<int64_t>(before.size()) < levels_[0]; node = tree.parents[node]) {
                before.push_back(static_cast<int32_t>(tree.tokens[node]));
            }
            const size_t missing = std::min(levels_[0] - before.size(), end.size());
            before.insert(before.end(), end.begin(), end.begin() + missing);
            for (const Candidate& next : predict(before, num_candidates)) found.push_back({next.token, next.probability, {}});
        };
        const GuessTree tree = grow(GuessTree(), End(), limits, successors);
        std::vector<WeightedPath> found;
        for (const int64_t leaf : tree.leaves()) {
            found.push_back(tree.path_to(leaf));
            for (int64_t& token : found.back().tokens) token = tokens_[token];
        }
        return found;
    }

private:
    static constexpr int32_t kNone = -1;

    using Backwards = std::vector<int32_t>;  // numbers of the tokens before a place, the nearest first
    struct End {};

    // What followed an n-gram.
    struct Row {
        int32_t end, length;  // where in the text it first ended, and its tokens
        int32_t same_hash;    // the next row of an equal hash
        int32_t latest;       // of `followers_`
    };
    struct Follower {
        int32_t token, count;
        int32_t earlier;  // the one that was seen before it
    };

    Backwards last() const {
        const int64_t length = std::min(levels_[0], size());
        return Backwards(text_.rbegin(), text_.rbegin() + length);
    }

    // [level] of the n-grams that end at a place, as far as there are as many tokens.
    std::vector<uint64_t> hashes_of(const Backwards& before) const {
        std::vector<uint64_t> found(levels_.size());
        uint64_t hash = 0;
        int64_t length = 0;
        for (size_t level = levels_.size(); level-- > 0 && levels_[level] <= static_cast<int64_t>(before.size());) {
            for (; length < levels_[level]; ++length) hash = hash * 0x9E3779B97F4A7C15 + static_cast<uint32_t>(before[length]) + 1;
            found[level] = mixed(hash);
        }
        return found;
    }

    int32_t find(int64_t length, uint64_t hash, const Backwards& before) const {
        const auto known = latest_row_.find(hash);
        int32_t row = known == latest_row_.end() ? kNone : known->second;
        for (; row != kNone; row = rows_[row].same_hash) {
            if (rows_[row].length != length) continue;
            const auto from = std::make_reverse_iterator(text_.begin() + rows_[row].end);
            if (std::equal(from, from + length, before.begin())) return row;
        }
        return kNone;
    }

    // Of what ends with the text.
    int32_t add_row(int64_t length, uint64_t hash) {
        const int32_t row = static_cast<int32_t>(rows_.size());
        const auto [latest, is_new] = latest_row_.try_emplace(hash, kNone);
        rows_.push_back({static_cast<int32_t>(size()), static_cast<int32_t>(length), latest->second, kNone});
        latest->second = row;
        return row;
    }

    void count(Row& row, int32_t token) {
        int32_t* link = &row.latest;
        while (*link != kNone && followers_[*link].token != token) link = &followers_[*link].earlier;
        int32_t follower = *link;
        if (follower == kNone) {
            follower = static_cast<int32_t>(followers_.size());
            followers_.push_back({token, 0, kNone});  // `link` may point to what has moved, but is not needed any more
        } else {
            *link = followers_[follower].earlier;
        }
        ++followers_[follower].count;
        followers_[follower].earlier = row.latest;
        row.latest = follower;
    }

    // The likeliest tokens after a place, of equals those of longer n-grams, then the latest.
    std::vector<Candidate> predict(const Backwards& before, int64_t num_candidates) {
        const std::vector<uint64_t> hashes = hashes_of(before);
        std::vector<Candidate> best;
        double left = 1.0;
        const Row* longer = nullptr;  // all that followed a longer n-gram has followed a shorter one too
        for (size_t level = 0; level < levels_.size() && left >= kLeastLeft; ++level) {
            if (levels_[level] > static_cast<int64_t>(before.size())) continue;
            const int32_t found = find(levels_[level], hashes[level], before);
            if (found == kNone) continue;
            if (longer != nullptr) mark(*longer, 1);
            int64_t total = 0, num_new = 0;
            each_new(rows_[found], [&](const Follower& next) {
                total += next.count;
                ++num_new;
            });
            if (num_new > 0) {
                const double discount = discount_of(levels_[level]);
                each_new(rows_[found], [&](const Follower& next) {
                    offer(best, {next.token, left * (next.count - discount) / total}, num_candidates);
                });
                left *= discount * num_new / total;
            }
            if (longer != nullptr) mark(*longer, 0);
            longer = &rows_[found];
        }
        return best;
    }

    void mark(const Row& row, char is_found) {
        for (int32_t i = row.latest; i != kNone; i = followers_[i].earlier) is_found_[followers_[i].token] = is_found;
    }

    template <class Use>
    void each_new(const Row& row, Use use) const {
        for (int32_t i = row.latest; i != kNone; i = followers_[i].earlier) {
            if (!is_found_[followers_[i].token]) use(followers_[i]);
        }
    }

    static void offer(std::vector<Candidate>& best, const Candidate& candidate, int64_t limit) {
        const bool is_full = static_cast<int64_t>(best.size()) == limit;
        if (is_full && candidate.probability <= best.back().probability) return;
        if (is_full) best.pop_back();
        const auto is_likelier = [](const Candidate& a, const Candidate& b) { return a.probability > b.probability; };
        best.insert(std::upper_bound(best.begin(), best.end(), candidate, is_likelier), candidate);
    }

    std::vector<int64_t> levels_;
    std::unordered_map<int32_t, int32_t> numbers_;  // of tokens, in the order in which they came
    std::vector<int32_t> tokens_, text_;            // [number]; [position] numbers
    std::vector<char> is_found_;                    // [number] while a prediction is made; else 0
    std::unordered_map<uint64_t, int32_t> latest_row_;
    std::vector<Row> rows_;
    std::vector<Follower> followers_;
};

}  // namespace outrider
