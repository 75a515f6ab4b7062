// Searches a corpus on disk: drafting/sources/datastore.py in C++, over the bytes of the mapped file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "guess_tree.h"

namespace outrider {

constexpr double kCorpusEscape = 10.0;  // ESCAPE of drafting/sources/datastore.py
constexpr int64_t kMoreMatches = 4;     // MORE_MATCHES

// A part of the corpus: tokens, big endian, and the order of their suffixes, uint32 little endian.
struct Chunk {
    const uint8_t *tokens, *suffix_array;
    int64_t length;
};

struct DatastoreLimits {
    int64_t num_lengths, num_samples;
    GrowthLimits growth;
};

class Datastore {
public:
    using Tokens = std::vector<int64_t>;

    // Tokens of `token_bytes` bytes; only those below `num_proposed` are proposed.
    Datastore(std::vector<Chunk> chunks, int64_t token_bytes, int64_t separator, int64_t num_proposed)
        : chunks_(std::move(chunks)), token_bytes_(token_bytes), separator_(separator), num_proposed_(num_proposed) {}

    // How much of a query's end occurs, and what follows there.
    std::pair<int64_t, std::vector<WeightedPath>> search(const Tokens& query, const DatastoreLimits& limits) const {
        const int64_t longest = longest_suffix(query);
        std::vector<WeightedPath> paths;
        int64_t num_looked_at = 0, num_matches = 0;
        for (int64_t length = longest; length > 0 && num_looked_at < limits.num_lengths; --length) {
            const std::vector<Matches> matches = find(query, length);
            const int64_t num_found = count(matches);
            if (num_found < kMoreMatches * num_matches) continue;
            for (WeightedPath& path : guesses(matches, length, limits)) paths.push_back(std::move(path));
            num_matches = num_found;
            ++num_looked_at;
        }
        return {longest, std::move(paths)};
    }

private:
    // Entries [first, end) of a chunk's suffix array.
    struct Matches {
        const Chunk* chunk;
        int64_t first, end;
        int64_t size() const { return end - first; }
    };

    struct Rows {
        int64_t first, end;
    };

    static int64_t count(const std::vector<Matches>& matches) {
        int64_t total = 0;
        for (const Matches& match : matches) total += match.size();
        return total;
    }

    static int64_t position_of(const Chunk& chunk, int64_t entry) {
        const uint8_t* bytes = chunk.suffix_array + 4 * entry;
        return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<int64_t>(bytes[3]) << 24;
    }

    int64_t token_at(const Chunk& chunk, int64_t position) const {
        const uint8_t* bytes = chunk.tokens + token_bytes_ * position;
        int64_t token = 0;
        for (int64_t i = 0; i < token_bytes_; ++i) token = token << 8 | bytes[i];
        return token;
    }

    // Below 0 if what stands at a position comes before some tokens, 0 if it begins with them.
    int compare(const Chunk& chunk, int64_t position, const int64_t* tokens, int64_t length) const {
        for (int64_t i = 0; i < length; ++i) {
            if (position + i >= chunk.length) return -1;
            const int64_t token = token_at(chunk, position + i);
            if (token != tokens[i]) return token < tokens[i] ? -1 : 1;
        }
        return 0;
    }

    std::vector<Matches> find(const Tokens& query, int64_t length) const {
        const int64_t* tokens = query.data() + query.size() - length;
        std::vector<Matches> found;
        for (const Chunk& chunk : chunks_) {
            const auto first_above = [&](int64_t first, int least) {
                int64_t end = chunk.length;
                while (first < end) {
                    const int64_t middle = first + (end - first) / 2;
                    if (compare(chunk, position_of(chunk, middle), tokens, length) < least) {
                        first = middle + 1;
                    } else {
                        end = middle;
                    }
                }
                return first;
            };
            const int64_t first = first_above(0, 0);
            found.push_back({&chunk, first, first_above(first, 1)});
        }
        return found;
    }

    // By bisection, as all suffixes of one that occurs do so too.
    int64_t longest_suffix(const Tokens& query) const {
        int64_t longest = 0, too_long = static_cast<int64_t>(query.size()) + 1;
        while (too_long - longest > 1) {
            const int64_t length = (longest + too_long) / 2;
            (count(find(query, length)) > 0 ? longest : too_long) = length;
        }
        return longest;
    }

    std::vector<WeightedPath> guesses(const std::vector<Matches>& matches, int64_t length, const DatastoreLimits& limits) const {
        const std::vector<Tokens> rows = samples(matches, length, limits);
        const double weight = static_cast<double>(count(matches)) / static_cast<double>(rows.size());
        const Rows all = {0, static_cast<int64_t>(rows.size())};
        return grow({}, all, limits.growth, [&](const GuessTree&, int64_t, int64_t depth, const Rows& of, Successors& found) {
            follow(rows, of, depth, kCorpusEscape / (length + depth), weight, found);
        }).paths();
    }

    // What follows some of the matches, in order; taken at equal distances, so that counts keep their ratios.
    std::vector<Tokens> samples(const std::vector<Matches>& matches, int64_t length, const DatastoreLimits& limits) const {
        const double share = std::min(1.0, static_cast<double>(limits.num_samples) / static_cast<double>(count(matches)));
        std::vector<Tokens> rows;
        for (const Matches& match : matches) {
            const int64_t num_samples = static_cast<int64_t>(std::ceil(match.size() * share));
            for (int64_t sample = 0; sample < num_samples; ++sample) {
                const int64_t entry = match.first + sample * match.size() / num_samples;
                const int64_t begin = position_of(*match.chunk, entry) + length;
                Tokens& row = rows.emplace_back();
                for (int64_t at = begin; at < begin + limits.growth.max_depth; ++at) {
                    row.push_back(at < match.chunk->length ? std::min(token_at(*match.chunk, at), separator_) : separator_);
                }
            }
        }
        std::sort(rows.begin(), rows.end());
        return rows;
    }

    using Successors = std::vector<Successor<Rows>>;

    void follow(const std::vector<Tokens>& rows, const Rows& of, int64_t depth, double escape, double weight,
                Successors& found) const {
        const int64_t token = rows[of.first][depth];
        if (token == rows[of.end - 1][depth]) {  // in order, so all between them are the same
            const double count = (of.end - of.first) * weight;
            if (token < num_proposed_) found.push_back({token, count / (count + escape), of});
            return;
        }
        int64_t num_groups = 0;
        for (int64_t first = of.first, end = first; first < of.end; first = end) {
            while (end < of.end && rows[end][depth] == rows[first][depth]) ++end;
            found.push_back({rows[first][depth], 0.0, {first, end}});
            ++num_groups;
        }
        const auto size = [](const Successor<Rows>& next) { return next.state.end - next.state.first; };
        std::stable_sort(found.begin(), found.end(), [&](const Successor<Rows>& a, const Successor<Rows>& b) {
            return size(a) > size(b);  // equals stay in order of their tokens
        });
        const double total = (of.end - of.first) * weight + num_groups * escape;
        for (Successor<Rows>& next : found) next.prob = size(next) * weight / total;
        found.erase(std::remove_if(found.begin(), found.end(), [&](const Successor<Rows>& next) { return next.token >= num_proposed_; }),
                    found.end());
    }

    std::vector<Chunk> chunks_;
    int64_t token_bytes_, separator_, num_proposed_;
};

}  // namespace outrider
