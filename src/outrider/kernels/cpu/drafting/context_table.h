// The latest candidates after contexts of several lengths: drafting/context_table.py in C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "hashing.h"

namespace outrider {

// What may follow a context, the likeliest or latest first; no logits of tokens that were only seen to follow.
struct Candidates {
    std::vector<int64_t> tokens;
    std::vector<float> logits;
};
using SharedCandidates = std::shared_ptr<const Candidates>;

// The tokens before a place, no more than the longest context has.
using ContextPlace = std::vector<int32_t>;

// Where tokens of a prediction are from.
enum class Origin { kOwnChosen, kOwnSeen, kShared };

struct Predicted {
    Origin origin;
    int64_t length_index;
    std::vector<int64_t> tokens;
};

class ContextTable {
public:
    ContextTable(int64_t max_context, int64_t num_candidates, int64_t capacity)
        : num_candidates_(num_candidates), half_(capacity / 2) {
        for (const int64_t length : {1, 2, 3, 4, 8, 16, 32, 64}) {  // LENGTHS
            if (length <= max_context) lengths_.push_back(length);
        }
    }

    ContextTable(const ContextTable&) = delete;  // keys point to tokens that a half owns
    ContextTable& operator=(const ContextTable&) = delete;

    const std::vector<int64_t>& lengths() const { return lengths_; }
    int64_t longest() const { return lengths_.back(); }
    int64_t size() const { return static_cast<int64_t>(newer_.entries.size() + older_.entries.size()); }

    // A text's tokens from `start` on, each as what follows the contexts before it.
    void learn_seen(const std::vector<int32_t>& tokens, int64_t start) {
        for (int64_t position = start; position < static_cast<int64_t>(tokens.size()); ++position) {
            make_room(static_cast<int64_t>(lengths_.size()));
            const int64_t token = tokens[position];
            SharedCandidates alone;
            bool is_known = true;
            const ContextPlace place(tokens.begin() + std::max<int64_t>(0, position - longest()), tokens.begin() + position);
            Keeper keeper(newer_, place);
            for (const Context& context : contexts_at(place)) {
                const SharedCandidates* known = is_known ? find(context) : nullptr;
                is_known = known != nullptr;
                if (!is_known) {
                    if (alone == nullptr) alone = std::make_shared<Candidates>(Candidates{{token}, {}});
                    put(context, alone, keeper);
                } else if ((*known)->tokens[0] != token) {
                    Candidates made = {{token}, {}};
                    for (const int64_t other : (*known)->tokens) {
                        if (other != token && static_cast<int64_t>(made.tokens.size()) < num_candidates_) made.tokens.push_back(other);
                    }
                    put(context, std::make_shared<Candidates>(std::move(made)), keeper);
                }
            }
        }
    }

    // What may follow a place of a request, the longest known contexts first, each without what longer ones propose;
    // and how many lengths of context may be known one token later. `ranked(candidates)` orders those with logits.
    template <class Ranked>
    static std::pair<std::vector<Predicted>, int64_t> predict(const ContextTable& own, const ContextTable& shared,
                                                              const ContextPlace& place, int64_t num_lengths, int64_t count,
                                                              Ranked ranked) {
        std::vector<Predicted> found;
        std::vector<int64_t> proposed;
        const Candidates* last = nullptr;
        int64_t num_known = 0;
        const std::vector<Context> contexts = own.contexts_at(place);
        for (int64_t index = std::min(num_lengths, static_cast<int64_t>(contexts.size())) - 1; index >= 0; --index) {
            Origin origin = Origin::kOwnChosen;
            const SharedCandidates* candidates = own.find(contexts[index]);
            if (candidates == nullptr) {
                origin = Origin::kShared;
                candidates = shared.find(contexts[index]);
                if (candidates == nullptr) continue;
            } else if ((*candidates)->logits.empty()) {
                origin = Origin::kOwnSeen;
            }
            if (num_known == 0) num_known = index + 1;
            if (candidates->get() == last) continue;
            last = candidates->get();
            std::vector<int64_t> fresh;
            for (const int64_t token : last->logits.empty() ? last->tokens : ranked(*last)) {
                const bool is_new = std::find(proposed.begin(), proposed.end(), token) == proposed.end();
                if (is_new && static_cast<int64_t>(fresh.size()) < count) fresh.push_back(token);
            }
            if (fresh.empty()) continue;
            proposed.insert(proposed.end(), fresh.begin(), fresh.end());
            found.push_back({origin, index, std::move(fresh)});
            if (static_cast<int64_t>(proposed.size()) >= count) break;
        }
        return {std::move(found), num_known + 1};
    }

    // Lets tables of one kind learn the candidates after places; of equal contexts the last place's.
    static void learn_chosen(const std::vector<ContextTable*>& tables, const std::vector<ContextPlace>& places,
                             const std::vector<SharedCandidates>& candidates) {
        const ContextTable& first = *tables[0];
        std::vector<std::vector<Context>> contexts;
        std::unordered_set<Context, ContextHash> longer;
        size_t first_place = 0;
        const auto learn = [&]() {
            for (ContextTable* table : tables) {
                table->make_room(static_cast<int64_t>(longer.size()));
                for (size_t i = first_place; i < contexts.size(); ++i) table->learn_at(places[i], contexts[i], candidates[i]);
            }
            longer.clear();
            first_place = contexts.size();
        };
        for (const ContextPlace& place : places) {
            std::vector<Context> at = first.contexts_at(place);
            if (static_cast<int64_t>(longer.size() + at.size()) - 1 > first.half_) learn();
            longer.insert(at.begin() + 1, at.end());
            contexts.push_back(std::move(at));
        }
        learn();
    }

private:
    struct Context {
        const int32_t* tokens;
        int64_t length;
        uint64_t hash;
        bool operator==(const Context& other) const {
            return hash == other.hash && length == other.length && std::memcmp(tokens, other.tokens, length * sizeof(int32_t)) == 0;
        }
    };
    struct ContextHash {
        size_t operator()(const Context& context) const { return mixed(context.hash); }
    };

    // Contexts of more than one token, and the tokens that their keys point to.
    struct Half {
        std::unordered_map<Context, SharedCandidates, ContextHash> entries;
        std::vector<std::unique_ptr<int32_t[]>> tokens;
    };

    // Keeps the tokens of a place in a half, once, if a context of it is new there.
    class Keeper {
    public:
        Keeper(Half& half, const ContextPlace& place) : half_(half), place_(place) {}

        Context kept(const Context& context) {
            if (end_ == nullptr) {
                half_.tokens.emplace_back(new int32_t[place_.size()]);
                end_ = std::copy(place_.begin(), place_.end(), half_.tokens.back().get());
            }
            return {end_ - context.length, context.length, context.hash};
        }

    private:
        Half& half_;
        const ContextPlace& place_;
        const int32_t* end_ = nullptr;
    };

    // What ends at a place, from one token on.
    std::vector<Context> contexts_at(const ContextPlace& place) const {
        std::vector<Context> found;
        found.reserve(lengths_.size());
        uint64_t hash = 0;
        int64_t length = 0;
        const int64_t size = static_cast<int64_t>(place.size());
        for (const int64_t wanted : lengths_) {
            if (wanted > size) break;
            for (; length < wanted; ++length) {
                hash = hash * 0x9E3779B97F4A7C15 + static_cast<uint32_t>(place[size - 1 - length]) + 1;
            }
            found.push_back({place.data() + size - length, length, hash});
        }
        return found;
    }

    const SharedCandidates* find(const Context& context) const {
        if (context.length == 1) {
            const auto found = single_.find(context.tokens[0]);
            return found == single_.end() ? nullptr : &found->second;
        }
        for (const Half* half : {&newer_, &older_}) {
            const auto found = half->entries.find(context);
            if (found != half->entries.end()) return &found->second;
        }
        return nullptr;
    }

    void put(const Context& context, const SharedCandidates& candidates, Keeper& keeper) {
        if (context.length == 1) {
            single_[context.tokens[0]] = candidates;
            return;
        }
        const auto known = newer_.entries.find(context);
        if (known != newer_.entries.end()) {
            known->second = candidates;
        } else {
            newer_.entries.emplace(keeper.kept(context), candidates);
        }
    }

    void learn_at(const ContextPlace& place, const std::vector<Context>& contexts, const SharedCandidates& candidates) {
        Keeper keeper(newer_, place);
        for (const Context& context : contexts) put(context, candidates, keeper);
    }

    void make_room(int64_t num_contexts) {
        if (static_cast<int64_t>(newer_.entries.size()) + num_contexts <= half_) return;
        older_ = std::move(newer_);
        newer_ = Half();
    }

    int64_t num_candidates_, half_;
    std::vector<int64_t> lengths_;
    std::unordered_map<int32_t, SharedCandidates> single_;  // kept for good
    Half newer_, older_;
};

}  // namespace outrider
