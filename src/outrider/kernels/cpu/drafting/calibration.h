// Confidences corrected by what they have kept: drafting/sources/calibration.py in C++, addition for addition.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "paths.h"

namespace outrider {

class Calibration {
public:
    Calibration() {
        for (int bin = 0; bin <= kBins; ++bin) {
            promised_[bin] = right_[bin] = std::min((bin + 0.5) / kBins, 1.0) * kBelieved;
            observed_[bin] = kBelieved;
            factors_[bin] = 1.0;
        }
    }

    // Keeps the guesses as they are until the request's next tokens come, and gives them as they are to be believed.
    std::vector<WeightedPath> corrected(const std::string& request_id, std::vector<WeightedPath> paths) {
        std::vector<WeightedPath> found = paths;
        for (WeightedPath& path : found) {
            for (double& confidence : path.confidences) confidence = std::min(confidence * factors_[bin_of(confidence)], 1.0);
        }
        proposed_[request_id] = std::move(paths);
        return found;
    }

    void observe(const std::string& request_id, const std::vector<int64_t>& new_tokens) {
        const auto proposed = proposed_.find(request_id);
        if (proposed == proposed_.end()) return;
        const std::vector<WeightedPath> paths = std::move(proposed->second);
        proposed_.erase(proposed);
        std::vector<const WeightedPath*> right;
        for (const WeightedPath& path : paths) right.push_back(&path);
        for (size_t depth = 0; depth < new_tokens.size() && !right.empty(); ++depth) {
            std::vector<Candidate> guesses;  // where several say the same, the most confident one counts
            std::vector<const WeightedPath*> still;
            for (const WeightedPath* path : right) {
                if (path->tokens.size() <= depth) continue;
                const int64_t token = path->tokens[depth];
                auto guess = std::find_if(guesses.begin(), guesses.end(), [&](const Candidate& g) { return g.token == token; });
                if (guess == guesses.end()) guess = guesses.insert(guess, Candidate{token, 0.0});
                guess->probability = std::max(guess->probability, path->confidences[depth]);
                if (token == new_tokens[depth]) still.push_back(path);
            }
            for (const Candidate& guess : guesses) count(guess.probability, guess.token == new_tokens[depth]);
            right = std::move(still);
        }
    }

    void release(const std::string& request_id) { proposed_.erase(request_id); }

private:
    static constexpr int kBins = 10;           // NUM_BINS
    static constexpr double kBelieved = 8.0;   // NUM_BELIEVED
    static constexpr double kObserved = 200.0;  // MAX_OBSERVED

    static int bin_of(double confidence) { return std::clamp(static_cast<int>(confidence * kBins), 0, kBins); }

    void count(double confidence, bool is_right) {
        const int bin = bin_of(confidence);
        promised_[bin] += confidence;
        right_[bin] += is_right;
        observed_[bin] += 1.0;
        if (observed_[bin] > kObserved) {
            promised_[bin] /= 2;
            right_[bin] /= 2;
            observed_[bin] /= 2;
        }
        factors_[bin] = right_[bin] / promised_[bin];
    }

    std::array<double, kBins + 1> promised_, right_, observed_, factors_;
    std::unordered_map<std::string, std::vector<WeightedPath>> proposed_;
};

}  // namespace outrider
