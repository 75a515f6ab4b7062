// The rows of a step as Python describes them (kernels/rows.py), checked and flattened.
#pragma once

#include <string>
#include <vector>

#include "choice.h"
#include "drafting/convert.h"
#include "kernel_table.h"

namespace outrider {

// What all layers keep of the tokens that were read: addresses of their keys and of their values.
struct LlamaCaches {
    std::vector<uint64_t> keys, values;
    KvType type;
    int64_t num_slots;
};

// Memory of a NumPy array, held while it is read; not to be destroyed without the interpreter's lock.
class Int64Array {
public:
    explicit Int64Array(nb::handle array) {
        if (PyObject_GetBuffer(array.ptr(), &view_, PyBUF_FORMAT | PyBUF_ND) != 0) throw nb::python_error();
        const char* format = view_.format == nullptr ? "" : view_.format;
        const bool fits = view_.ndim == 1 && view_.itemsize == 8 && (format == std::string("l") || format == std::string("q"));
        if (!fits) {
            PyBuffer_Release(&view_);
            throw nb::value_error("slots: expected a contiguous array of int64");
        }
    }
    Int64Array(Int64Array&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
    Int64Array(const Int64Array&) = delete;
    ~Int64Array() {
        if (view_.obj != nullptr) PyBuffer_Release(&view_);
    }

    const int64_t* data() const { return static_cast<const int64_t*>(view_.buf); }
    int64_t size() const { return view_.len / 8; }

private:
    Py_buffer view_;
};

class StepRows {
public:
    std::vector<int64_t> token_ids, positions, write_slots, logits_rows;
    std::vector<Draw> draws;  // of the wanted rows
    std::vector<SequenceView> sequences;

    // Throws ValueError at rows that hang together wrongly, and at tokens and slots that are none.
    StepRows(nb::handle described, int64_t num_tokens, int64_t num_slots) {
        for (nb::handle sequence : described) {
            const int64_t start = size();
            std::vector<int64_t> tokens = all(sequence.attr("token_ids"));
            std::vector<int64_t> parents = all(sequence.attr("parents"));
            const int64_t num_rows = static_cast<int64_t>(tokens.size()), num_context = number(sequence.attr("num_context"));
            const Int64Array& slots = slots_.emplace_back(sequence.attr("slots"));
            require(num_rows > 0, "rows of a sequence", num_rows, "at least one");
            require(num_context >= 0, "num_context", num_context, "at least 0");
            require_equal("parents", static_cast<int64_t>(parents.size()), num_rows);
            require_equal("slots", slots.size(), num_context + num_rows);
            for (int64_t i = 0; i < slots.size(); ++i) require_within("slot", slots.data()[i], 0, num_slots);
            for (const int64_t token : tokens) require_within("token id", token, 0, num_tokens);
            bool is_chain = true;
            for (int64_t row = 0; row < num_rows; ++row) {
                const int64_t parent = parents[row];
                require_within("parent of a row", parent, -1, row);
                is_chain &= parent == row - 1;
                positions.push_back(parent < 0 ? num_context : positions[start + parent] + 1);
                parents_.push_back(static_cast<int32_t>(parent));
            }
            token_ids.insert(token_ids.end(), tokens.begin(), tokens.end());
            write_slots.insert(write_slots.end(), slots.data() + num_context, slots.data() + slots.size());
            add_wanted(sequence, start, num_rows);
            sequences.push_back({static_cast<int>(start), static_cast<int>(size()), num_context, slots.data(), nullptr});
            trees_.push_back(!is_chain);
        }
        for (size_t s = 0; s < sequences.size(); ++s)  // once they stay where they are
            if (trees_[s]) sequences[s].parents = parents_.data() + sequences[s].row_begin;
        if (token_ids.empty()) throw nb::value_error("rows of a step: got none, expected at least one");
    }

    int64_t size() const { return static_cast<int64_t>(token_ids.size()); }

private:
    static std::vector<int64_t> all(nb::handle sequence) {
        return numbers<int64_t>(sequence, static_cast<int64_t>(nb::len(sequence)));
    }
    static int64_t number(nb::handle value) { return nb::cast<int64_t>(value); }

    static void require(bool holds, const char* what, int64_t got, const char* expected) {
        if (!holds) throw nb::value_error((std::string(what) + ": got " + std::to_string(got) + ", expected " + expected).c_str());
    }
    static void require_equal(const char* what, int64_t got, int64_t expected) {
        if (got != expected) require(false, what, got, std::to_string(expected).c_str());  // no text where none is needed
    }
    static void require_within(const char* what, int64_t got, int64_t least, int64_t end) {
        if (got < least || got >= end) require(false, what, got, (std::to_string(least) + " to " + std::to_string(end - 1)).c_str());
    }

    void add_wanted(nb::handle sequence, int64_t start, int64_t num_rows) {
        const nb::object draw = sequence.attr("draw");
        Draw drawn;
        if (!draw.is_none()) {
            drawn.temperature = nb::cast<float>(draw.attr("temperature"));
            drawn.seed = nb::cast<uint64_t>(draw.attr("seed"));
            if (!(drawn.temperature > 0.0f)) throw nb::value_error("temperature of a draw: expected more than 0");
        }
        for (const int64_t row : all(sequence.attr("logits_rows"))) {
            require_within("wanted row", row, 0, num_rows);
            drawn.position = static_cast<uint64_t>(positions[start + row]) + 1;  // the successor's
            logits_rows.push_back(start + row);
            draws.push_back(drawn);
        }
    }

    std::vector<int32_t> parents_;
    std::vector<bool> trees_;
    std::vector<Int64Array> slots_;
};

}  // namespace outrider
