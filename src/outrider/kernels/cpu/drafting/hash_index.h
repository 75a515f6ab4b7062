// Where stretches of tokens stand in a text: drafting/sources/hash_index.py in C++, with the same hashes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "noise.h"
#include "paths.h"

namespace outrider {

constexpr int64_t kEndOfText = -1;  // END_OF_TEXT of drafting/sources/matches.py

// A continuation, and how many tokens before it agree.
struct Copy {
    std::vector<int64_t> tokens;
    int64_t length;
};

struct CopyLimits {
    int64_t depth, per_length, most;
    bool periodic;
};

class HashIndex {
public:
    explicit HashIndex(const std::vector<int64_t>& lengths) {
        for (const int64_t length : lengths) {
            Level& level = levels_.emplace_back();
            level.length = length;
            for (int64_t i = 0; i < length; ++i) level.power = times(level.power, kBase);
        }
    }

    int64_t size() const { return static_cast<int64_t>(text_.size()); }

    // How much of a text `copies` reads.
    int64_t num_read() const {
        int64_t longest = kMaxLength;
        for (const Level& level : levels_) longest = std::max(longest, level.length);
        return longest;
    }

    void append(int32_t token) {
        text_.push_back(token);
        hashes_.push_back(next(hashes_.back(), token));
        for (Level& level : levels_) {
            if (level.length > size()) {
                level.earlier.push_back(kNowhere);
                continue;
            }
            const uint64_t behind = times(hashes_[size() - level.length], level.power);
            const auto [latest, is_new] = level.latest.try_emplace(minus(hashes_.back(), behind), kNowhere);
            level.earlier.push_back(latest->second);
            latest->second = static_cast<int32_t>(size());
        }
    }

    std::vector<Copy> copies(const std::vector<int32_t>& tokens, const CopyLimits& limits) const {
        std::vector<Copy> found;
        int64_t num_found = 0;
        std::vector<int64_t> seen;
        for (const Level& level : levels_) {
            if (level.length > static_cast<int64_t>(tokens.size())) continue;
            uint64_t wanted = 0;
            for (auto token = tokens.end() - level.length; token != tokens.end(); ++token) wanted = next(wanted, *token);
            const auto latest = level.latest.find(wanted);
            int64_t end = latest == level.latest.end() ? kNowhere : latest->second;
            for (int64_t i = 0; i <= limits.per_length && end != kNowhere; ++i, end = level.earlier[end]) {
                if (end >= size() || std::find(seen.begin(), seen.end(), end) != seen.end()) continue;
                if (num_found++ == limits.most) return found;
                seen.push_back(end);
                const int64_t length = match_length(tokens, end);
                if (length < std::min(level.length, kMaxLength)) continue;  // equal hashes of different tokens
                found.push_back({continuation(end, limits), length});
            }
        }
        return found;
    }

private:
    static constexpr uint64_t kModulus = (uint64_t{1} << 61) - 1;  // MODULUS
    static constexpr uint64_t kBase = 0x1F3D5B79A2C4E681 % kModulus;
    static constexpr int32_t kNowhere = -1;

    struct Level {
        int64_t length;
        uint64_t power = 1;
        std::unordered_map<uint64_t, int32_t> latest;
        std::vector<int32_t> earlier = {kNowhere};  // [position] the end before, of an equal hash
    };

    static uint64_t reduced(uint64_t value) { return value >= kModulus ? value - kModulus : value; }
    static uint64_t times(uint64_t a, uint64_t b) {  // 2^61 is 1 in this field
        const uint128_t product = static_cast<uint128_t>(a) * b;
        return reduced((static_cast<uint64_t>(product) & kModulus) + static_cast<uint64_t>(product >> 61));
    }
    static uint64_t minus(uint64_t a, uint64_t b) { return a >= b ? a - b : a + kModulus - b; }
    static uint64_t next(uint64_t hash, int64_t token) {
        return reduced(times(hash, kBase) + static_cast<uint64_t>(token + 2));
    }

    int64_t match_length(const std::vector<int32_t>& tokens, int64_t end) const {
        const int64_t most = std::min({end, static_cast<int64_t>(tokens.size()), kMaxLength});
        int64_t length = 0;
        while (length < most && text_[end - 1 - length] == tokens[tokens.size() - 1 - length]) ++length;
        return length;
    }

    std::vector<int64_t> continuation(int64_t end, const CopyLimits& limits) const {
        const int64_t known = std::min(limits.depth, size() - end);
        std::vector<int64_t> path(text_.begin() + end, text_.begin() + end + known);
        if (limits.periodic && known < limits.depth) {
            for (int64_t i = known; i < limits.depth; ++i) path.push_back(path[i % known]);
            return path;
        }
        path.erase(std::find(path.begin(), path.end(), kEndOfText), path.end());
        return path;
    }

    std::vector<Level> levels_;
    std::vector<int32_t> text_;
    std::vector<uint64_t> hashes_ = {0};  // of the text up to each position
};

}  // namespace outrider
