// The latest candidates after contexts of several lengths: drafting/context_table.py in C++.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../kernel_table.h"
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

constexpr int kNumLengths = 8;
constexpr std::array<int64_t, kNumLengths> kLengths = {1, 2, 3, 4, 8, 16, 32, 64};  // LENGTHS

// Hashes of what ends at a place, by the index of the length. They stand for the contexts: of a million contexts two have
// the same with a probability of 3e-8, and would then share their candidates.
struct Contexts {
    std::array<uint64_t, kNumLengths> hashes;
    int size = 0;
};

// Candidates by the hash of their context.
class ContextMap {
public:
    int64_t size() const { return size_; }

    void prefetch(uint64_t hash) const {
        if (!slots_.empty()) outrider::prefetch(&slots_[hash & mask()]);
    }

    const SharedCandidates* find(uint64_t hash) const {
        if (slots_.empty()) return nullptr;
        const Slot& slot = slots_[place_of(hash)];
        return slot.candidates == nullptr ? nullptr : &slot.candidates;
    }

    void put(uint64_t hash, const SharedCandidates& candidates) {
        if (2 * size_ >= static_cast<int64_t>(slots_.size())) grow();
        Slot& slot = slots_[place_of(hash)];
        size_ += slot.candidates == nullptr;
        slot = {hash, candidates};
    }

private:
    struct Slot {
        uint64_t hash = 0;
        SharedCandidates candidates;  // none: an empty slot
    };

    uint64_t mask() const { return slots_.size() - 1; }

    // Where a hash stands, or would.
    uint64_t place_of(uint64_t hash) const {
        uint64_t place = hash & mask();
        while (slots_[place].candidates != nullptr && slots_[place].hash != hash) place = (place + 1) & mask();
        return place;
    }

    void grow() {
        std::vector<Slot> old(std::max<size_t>(2 * slots_.size(), 64));
        old.swap(slots_);
        for (Slot& slot : old) {
            if (slot.candidates != nullptr) slots_[place_of(slot.hash)] = std::move(slot);
        }
    }

    std::vector<Slot> slots_;  // a power of two, at least half of them empty
    int64_t size_ = 0;
};

class ContextTable {
public:
    ContextTable(int64_t max_context, int64_t num_candidates, int64_t capacity)
        : num_candidates_(num_candidates), half_(capacity / 2) {
        for (const int64_t length : kLengths) {
            if (length <= max_context) lengths_.push_back(length);
        }
    }

    const std::vector<int64_t>& lengths() const { return lengths_; }
    int64_t longest() const { return lengths_.back(); }
    int64_t size() const { return newer_.size() + older_.size(); }

    // A text's tokens from `start` on, each as what follows the contexts before it.
    void learn_seen(const std::vector<int32_t>& tokens, int64_t start) {
        for (int64_t position = start; position < static_cast<int64_t>(tokens.size()); ++position) {
            make_room(static_cast<int64_t>(lengths_.size()));
            const int64_t token = tokens[position];
            SharedCandidates alone;
            bool is_known = true;
            const Contexts contexts = contexts_before(tokens.data() + position, position);
            for (int index = 0; index < contexts.size; ++index) {
                const SharedCandidates* known = is_known ? find(contexts, index) : nullptr;
                is_known = known != nullptr;
                if (!is_known) {
                    if (alone == nullptr) alone = std::make_shared<Candidates>(Candidates{{token}, {}});
                    put(contexts, index, alone);
                } else if ((*known)->tokens[0] != token) {
                    Candidates made = {{token}, {}};
                    for (const int64_t other : (*known)->tokens) {
                        if (other != token && static_cast<int64_t>(made.tokens.size()) < num_candidates_) made.tokens.push_back(other);
                    }
                    put(contexts, index, std::make_shared<Candidates>(std::move(made)));
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
        const Contexts contexts = own.contexts_before(place.data() + place.size(), static_cast<int64_t>(place.size()));
        const int num_allowed = static_cast<int>(std::min<int64_t>(num_lengths, contexts.size));
        own.prefetch(contexts, num_allowed);
        shared.prefetch(contexts, num_allowed);
        for (int index = num_allowed - 1; index >= 0; --index) {
            Origin origin = Origin::kOwnChosen;
            const SharedCandidates* candidates = own.find(contexts, index);
            if (candidates == nullptr) {
                origin = Origin::kShared;
                candidates = shared.find(contexts, index);
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
        std::vector<Contexts> contexts;
        for (const ContextPlace& place : places) {
            contexts.push_back(first.contexts_before(place.data() + place.size(), static_cast<int64_t>(place.size())));
            for (const ContextTable* table : tables) table->prefetch(contexts.back(), contexts.back().size);
        }
        std::unordered_set<uint64_t> longer;
        size_t begin = 0;
        const auto learn_until = [&](size_t end) {
            for (ContextTable* table : tables) {
                table->make_room(static_cast<int64_t>(longer.size()));
                for (size_t i = begin; i < end; ++i) {
                    for (int index = 0; index < contexts[i].size; ++index) table->put(contexts[i], index, candidates[i]);
                }
            }
            longer.clear();
            begin = end;
        };
        const auto has_room = [&](const ContextTable* table) {
            return table->newer_.size() + static_cast<int64_t>(places.size() * first.lengths_.size()) <= table->half_;
        };
        // Only where a half may become full it matters how many different contexts there are.
        if (std::all_of(tables.begin(), tables.end(), has_room)) return learn_until(places.size());
        for (size_t i = 0; i < places.size(); ++i) {
            const auto& hashes = contexts[i].hashes;
            if (static_cast<int64_t>(longer.size()) + contexts[i].size - 1 > first.half_) learn_until(i);
            longer.insert(hashes.begin() + 1, hashes.begin() + contexts[i].size);
        }
        learn_until(places.size());
    }

private:
    // What ends before `end`, where `size` tokens are known.
    Contexts contexts_before(const int32_t* end, int64_t size) const {
        Contexts found;
        uint64_t hash = 0;
        int64_t length = 0;
        for (const int64_t wanted : lengths_) {
            if (wanted > size) break;
            for (; length < wanted; ++length) hash = hash * 0x9E3779B97F4A7C15 + static_cast<uint32_t>(*(end - 1 - length)) + 1;
            found.hashes[found.size++] = mixed(hash + static_cast<uint64_t>(length));
        }
        return found;
    }

    void prefetch(const Contexts& contexts, int num_lengths) const {
        for (int index = 0; index < num_lengths; ++index) {
            if (index == 0) {
                single_.prefetch(contexts.hashes[0]);
            } else {
                newer_.prefetch(contexts.hashes[index]);
            }
        }
    }

    const SharedCandidates* find(const Contexts& contexts, int index) const {
        if (index == 0) return single_.find(contexts.hashes[0]);
        const SharedCandidates* found = newer_.find(contexts.hashes[index]);
        return found != nullptr ? found : older_.find(contexts.hashes[index]);
    }

    void put(const Contexts& contexts, int index, const SharedCandidates& candidates) {
        (index == 0 ? single_ : newer_).put(contexts.hashes[index], candidates);
    }

    void make_room(int64_t num_contexts) {
        if (newer_.size() + num_contexts <= half_) return;
        older_ = std::move(newer_);
        newer_ = ContextMap();
    }

    int64_t num_candidates_, half_;
    std::vector<int64_t> lengths_;
    ContextMap single_;  // of one token: kept for good
    ContextMap newer_, older_;
};

}  // namespace outrider
