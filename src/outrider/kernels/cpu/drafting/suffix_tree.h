// The counted suffix tree of drafting/sources/suffix_index.py, and what suffix_guesses.py there grows below its places.
//
// Nodes stand in one array and are named by their index in it. One table finds a child by its family and first token;
// a family is who has the same parent, so that an edge is cut in constant time: all of a family change their parent.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "guess_tree.h"
#include "hashing.h"

namespace outrider {

// Where suffixes of a text stand in a tree, from the longest down to one token: nodes, and tokens of their labels.
struct SuffixPlaces {
    std::vector<int32_t> nodes, offsets;
};

struct SuffixLimits {
    int64_t num_pending;  // of the suffixes that have entered a place's edge, those that nothing follows yet
    double escape;
    int64_t deepest, num_matches;
    double max_spec_factor;
    GrowthLimits growth;
};

class SuffixTree {
public:
    explicit SuffixTree(int64_t max_depth) : max_depth_(max_depth) { new_node({}); }

    int64_t max_depth() const { return max_depth_; }
    int64_t version() const { return version_; }
    int64_t size() const { return static_cast<int64_t>(text_.size()); }

    std::vector<std::vector<int64_t>> sequences() const {
        std::vector<std::vector<int64_t>> found;
        auto start = text_.begin();
        for (const int64_t length : sequence_lengths_) {
            found.emplace_back(start, start + length);
            start += length;
        }
        return found;
    }

    void append(int32_t token) {
        std::vector<int32_t>&nodes = places_.nodes, &offsets = places_.offsets;
        const int64_t position = end();
        text_.push_back(token);
        const size_t num_places = nodes.size();
        size_t first = 0;  // the first place that can go on; whatever a suffix is followed by, its own suffixes are too
        for (; first < num_places; ++first) {
            const int32_t node = nodes[first], offset = offsets[first];
            if (offset < nodes_[node].length) {
                if (token_at(node, offset) == token) break;
                split(first, position);
            } else if (child_of(node, token) != kNone) {
                break;
            }
            nodes_[node].start = position - offset;
            new_child(node, token, {position, max_depth_ - static_cast<int64_t>(num_places - first), 1});
        }
        for (size_t k = first; k < num_places; ++k) {
            Node& node = nodes_[nodes[k]];
            if (offsets[k] < node.length) {
                ++offsets[k];
            } else {
                node.start = position - offsets[k];
                nodes[k] = child_of(nodes[k], token);
                ++nodes_[nodes[k]].count;
                offsets[k] = 1;
            }
        }
        nodes.erase(nodes.begin(), nodes.begin() + first);
        offsets.erase(offsets.begin(), offsets.begin() + first);
        if (static_cast<int64_t>(nodes.size()) == max_depth_ - 1) {  // the longest has reached the bottom
            nodes_[nodes[0]].start = position + 1 - offsets[0];
            nodes.erase(nodes.begin());
            offsets.erase(offsets.begin());
        }
        const int32_t child = child_of(kRoot, token);
        if (child == kNone) {
            new_child(kRoot, token, {position, max_depth_, 1});
        } else {
            ++nodes_[child].count;
            nodes.push_back(child);
            offsets.push_back(1);
        }
    }

    void end_sequence() {
        const int64_t stop = end();
        int64_t begin = base_;
        for (const int64_t length : sequence_lengths_) begin += length;
        if (begin == stop) return;
        const int64_t num_places = static_cast<int64_t>(places_.nodes.size());
        for (int64_t k = 0; k < num_places; ++k) {
            Node& node = nodes_[places_.nodes[k]];
            if (places_.offsets[k] < node.length) {
                split(k, stop);
            } else {
                node.start = stop - node.length;
            }
        }
        for (int64_t start = std::max(begin, stop - max_depth_ + 1); start < stop - num_places; ++start) {
            int32_t node = kRoot;
            int64_t position = start;
            while (position < stop) {
                node = child_of(node, text_at(position));
                position += nodes_[node].length;
            }
            nodes_[node].length -= position - stop;  // a leaf that would have grown on
        }
        places_ = {};
        sequence_lengths_.push_back(stop - begin);
        ++version_;
    }

    void forget_oldest() {
        int64_t num_ended = 0;
        for (const int64_t length : sequence_lengths_) num_ended += length;
        if (num_ended != size() || sequence_lengths_.empty()) throw std::logic_error("a sequence has not ended");
        const int64_t length = sequence_lengths_.front(), stop = base_ + length;
        sequence_lengths_.pop_front();
        for (int64_t start = base_; start < stop; ++start) forget_suffix(start, std::min(start + max_depth_, stop));
        text_.erase(text_.begin(), text_.begin() + length);
        base_ = stop;
        ++version_;
    }

    // The places of the same text, a token later.
    void advance(SuffixPlaces& places, int32_t token) const {
        SuffixPlaces found;
        const auto stand = [&](int32_t node, int32_t offset) {
            found.nodes.push_back(node);
            found.offsets.push_back(offset);
        };
        for (size_t k = 0; k < places.nodes.size(); ++k) {
            const int32_t node = places.nodes[k], offset = places.offsets[k];
            if (offset < nodes_[node].length) {
                if (token_at(node, offset) == token) stand(node, offset + 1);
            } else if (const int32_t child = child_of(node, token); child != kNone) {
                stand(child, 1);
            }
        }
        if (const int32_t child = child_of(kRoot, token); child != kNone) stand(child, 1);
        const int64_t surplus = std::max<int64_t>(0, static_cast<int64_t>(found.nodes.size()) - max_depth_ + 1);
        found.nodes.erase(found.nodes.begin(), found.nodes.begin() + surplus);
        found.offsets.erase(found.offsets.begin(), found.offsets.begin() + surplus);
        places = std::move(found);
    }

    // The best-scoring tree of guesses below the current sequence's longest matches with different sets of occurrences.
    GuessTree best(const SuffixLimits& limits) const { return best(places_, limits); }

    // The same below the places of another text.
    GuessTree best(const SuffixPlaces& places, const SuffixLimits& limits) const {
        const int64_t num_places = static_cast<int64_t>(places.nodes.size());
        GuessTree best;
        int64_t num_found = 0, last_count = 0;
        for (int64_t k = std::max<int64_t>(0, num_places - limits.deepest); k < num_places; ++k) {
            const int64_t count = nodes_[places.nodes[k]].count;
            if (count == last_count) continue;
            last_count = count;
            GuessTree made = speculate(places.nodes[k], places.offsets[k], num_places - k, limits);
            if (num_found == 0 || made.score > best.score) best = std::move(made);
            if (++num_found == limits.num_matches) break;
        }
        return best;
    }

private:
    static constexpr int32_t kNone = -1, kRoot = 0;

    struct Node {
        int64_t start = 0, length = 0, count = 0;
        int32_t family = kNone;  // of its children; no other node has it, nor a free one
        int32_t first_child = kNone, next = kNone, previous = kNone;  // siblings; free nodes stand in a list by `next`
    };

    struct Place {
        int32_t node;
        int64_t offset, count;
    };

    int64_t end() const { return base_ + size(); }
    int32_t text_at(int64_t position) const { return text_[position - base_]; }
    int32_t token_at(int32_t node, int64_t offset) const { return text_at(nodes_[node].start + offset); }

    uint64_t key_of(int32_t parent, int32_t token) const {
        return static_cast<uint64_t>(static_cast<uint32_t>(nodes_[parent].family)) << 32 | static_cast<uint32_t>(token);
    }

    int32_t child_of(int32_t parent, int32_t token) const {
        if (nodes_[parent].first_child == kNone) return kNone;
        const auto found = children_.find(key_of(parent, token));
        return found == children_.end() ? kNone : found->second;
    }

    int32_t new_node(const Node& node) {
        int32_t made = free_, family = static_cast<int32_t>(nodes_.size());
        if (made == kNone) {
            made = family;
            nodes_.push_back(node);
        } else {
            free_ = nodes_[made].next;
            family = nodes_[made].family;
            nodes_[made] = node;
        }
        nodes_[made].family = family;
        return made;
    }

    int32_t new_child(int32_t parent, int32_t token, const Node& node) {
        const int32_t made = new_node(node);
        link(parent, token, made);
        return made;
    }

    void link(int32_t parent, int32_t token, int32_t child) {
        children_[key_of(parent, token)] = child;
        const int32_t next = nodes_[parent].first_child;
        nodes_[child].next = next;
        nodes_[child].previous = kNone;
        if (next != kNone) nodes_[next].previous = child;
        nodes_[parent].first_child = child;
    }

    void unlink(int32_t parent, int32_t token, int32_t child) {
        children_.erase(key_of(parent, token));
        const int32_t next = nodes_[child].next, previous = nodes_[child].previous;
        if (next != kNone) nodes_[next].previous = previous;
        (previous == kNone ? nodes_[parent].first_child : nodes_[previous].next) = next;
    }

    void release(int32_t node) {
        nodes_[node].next = free_;
        free_ = node;
    }

    // Cuts the edge of a place right there: longer suffixes have left it, shorter ones stay in its upper part.
    void split(size_t index, int64_t stop) {
        const int32_t upper = places_.nodes[index];
        const int64_t offset = places_.offsets[index];
        const int64_t num_above = std::count(places_.nodes.begin() + index, places_.nodes.end(), upper);
        const int64_t below = nodes_[upper].start + offset;
        const int32_t lower = new_node({below, nodes_[upper].length - offset, nodes_[upper].count - num_above});
        std::swap(nodes_[upper].family, nodes_[lower].family);
        std::swap(nodes_[upper].first_child, nodes_[lower].first_child);
        link(upper, text_at(below), lower);
        nodes_[upper].start = stop - offset;
        nodes_[upper].length = offset;
    }

    void forget_suffix(int64_t start, int64_t stop) {
        int32_t parent = kRoot, node = kRoot;
        for (int64_t position = start; position < stop;) {
            const int32_t token = text_at(position), child = child_of(node, token);
            if (--nodes_[child].count == 0) {  // all that is below belonged to this suffix alone
                unlink(node, token, child);
                release_all(child);
                join(parent, node);
                return;
            }
            position += nodes_[child].length;
            if (!join(parent, node)) parent = node;
            node = child;
        }
        join(parent, node);
    }

    void release_all(int32_t top) {
        std::vector<int32_t> open = {top};
        while (!open.empty()) {
            const int32_t node = open.back();
            open.pop_back();
            while (nodes_[node].first_child != kNone) {
                const int32_t child = nodes_[node].first_child;
                unlink(node, token_at(child, 0), child);
                open.push_back(child);
            }
            release(node);
        }
    }

    // Leaves out a node at which nothing branches and nothing ends; says whether it did.
    bool join(int32_t parent, int32_t node) {
        const int32_t child = nodes_[node].first_child;
        if (node == kRoot || child == kNone || nodes_[child].count != nodes_[node].count) return false;
        unlink(node, token_at(child, 0), child);
        nodes_[child].start -= nodes_[node].length;
        nodes_[child].length += nodes_[node].length;
        const int32_t token = token_at(child, 0);
        unlink(parent, token, node);
        release(node);
        link(parent, token, child);
        return true;
    }

    GuessTree speculate(int32_t node, int64_t offset, int64_t length, const SuffixLimits& limits) const {
        GrowthLimits growth = limits.growth;
        growth.max_nodes = std::min(growth.max_nodes, static_cast<int64_t>(limits.max_spec_factor * length));
        const int64_t count = nodes_[node].count - limits.num_pending;
        GuessTree chain;
        double product = 1.0;  // what stands on the edge behind the match: nothing else has followed
        const int64_t on_edge = std::min(nodes_[node].length, end() - nodes_[node].start) - offset;
        const int64_t num_chained = std::min({on_edge, growth.max_nodes, growth.max_depth});
        for (int64_t depth = 0; depth < num_chained; ++depth) {
            const double prob = count / (count + limits.escape / (length + depth));
            product *= prob;
            if (product < growth.min_path_prob) break;
            chain.add(token_at(node, offset + depth), depth - 1, prob, product);
        }
        const Place behind = {node, offset + chain.size(), count};
        return grow(std::move(chain), behind, growth,
                    [&](const GuessTree& made, int64_t guess, int64_t depth, const Place& at, Successors& found) {
                        follow(made, guess, at, limits.escape / (length + depth), growth.max_nodes, found);
                    });
    }

    using Successors = std::vector<Successor<Place>>;

    void follow(const GuessTree& made, int64_t guess, const Place& at, double escape, int64_t most, Successors& found) const {
        const Node& node = nodes_[at.node];
        if (at.offset < node.length) {
            // A match that reaches the end of the text goes on with what was guessed there.
            const int64_t beyond = at.offset - std::min(node.length, end() - node.start);
            const int64_t token = beyond < 0 ? token_at(at.node, at.offset) : made.token_on_path(guess, beyond);
            found.push_back({token, at.count / (at.count + escape), {at.node, at.offset + 1, at.count}});
            return;
        }
        int64_t num_children = 0, total = 0;
        for (int32_t child = node.first_child; child != kNone; child = nodes_[child].next) {
            found.push_back({0, 0.0, {child, 1, nodes_[child].count}});
            ++num_children;
            total += nodes_[child].count;
        }
        const auto last = found.begin() + std::min(most, num_children);
        std::partial_sort(found.begin(), last, found.end(), [&](const Successor<Place>& a, const Successor<Place>& b) {
            const Node &left = nodes_[a.state.node], &right = nodes_[b.state.node];
            return left.count > right.count || (left.count == right.count && left.start > right.start);
        });
        found.erase(last, found.end());
        const double weight = escape * num_children + total;
        for (Successor<Place>& next : found) {
            next.token = token_at(next.state.node, 0);
            next.prob = next.state.count / weight;
        }
    }

    int64_t max_depth_, version_ = 0, base_ = 0;  // base: absolute position of the text's first token
    std::vector<int32_t> text_;
    std::deque<int64_t> sequence_lengths_;  // of the ended ones
    std::vector<Node> nodes_;
    std::unordered_map<uint64_t, int32_t, MixedHash> children_;
    int32_t free_ = kNone;
    SuffixPlaces places_;  // of the current sequence's suffixes that occurred before
};

// Where the suffixes of a text that grows outside of a tree stand in the tree's ended sequences.
class SuffixCursor {
public:
    explicit SuffixCursor(const SuffixTree& tree) : tree_(tree), version_(tree.version()) {}

    // How many of a text's last tokens are to be taken up, if so many are new.
    int64_t num_read(int64_t size, int64_t num_new) const {
        return std::min({size, version_ == tree_.version() ? num_new : size, tree_.max_depth() - 1});
    }

    void follow(const std::vector<int32_t>& tokens) {
        if (version_ != tree_.version()) places_ = {};
        version_ = tree_.version();
        for (const int32_t token : tokens) tree_.advance(places_, token);
    }

    GuessTree best(const SuffixLimits& limits) const {
        if (version_ != tree_.version()) throw std::logic_error("the tree has changed since the cursor followed");
        return tree_.best(places_, limits);
    }

private:
    const SuffixTree& tree_;
    int64_t version_;
    SuffixPlaces places_;
};

}  // namespace outrider
