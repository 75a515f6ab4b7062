// Memory that calls reuse, 64-byte aligned and never shrunk.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "kernel_table.h"

namespace outrider {

template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
        other.data_ = nullptr;
        other.size_ = 0;
    }
    ~Buffer() { std::free(data_); }

    // Room for `size` elements; what was there is lost if it grows.
    T* at_least(int64_t size) {
        if (size > size_) {
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
            data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
            if (data_ == nullptr) throw std::bad_alloc();
            size_ = size;
        }
        return data_;
    }

private:
    T* data_ = nullptr;
    int64_t size_ = 0;
};

// Packed inputs of one or more layers that read rows in the same form.
class RowsBuffer {
public:
    PackedRows rows_for(const KernelTable& kernels, const PackedLinear& weight, int num_rows, int num_threads, Fetch fetch) {
        const int per_unit = kernels.unit_inputs[weight.format];
        int64_t num_units = (weight.num_inputs + per_unit - 1) / per_unit;
        if (weight.format == kInt4) num_units = weight.num_groups() * (weight.group_size / 4);
        if (weight.format == kBf16) num_units = (weight.num_inputs + 1) / 2 * 2 / per_unit;
        const RowsForm form = kernels.rows_form(weight, num_rows);
        num_units = (num_units + form.chunk_units - 1) / form.chunk_units * form.chunk_units;
        PackedRows rows{num_rows, form.block_rows, form.chunk_units, 1, fetch, num_units, 0, nullptr, nullptr, nullptr};
        if (rows.num_blocks() < num_threads) rows.num_parts = num_threads;
        rows.num_groups = weight.format == kInt4 ? weight.num_groups() : weight.format == kInt8 ? rows.num_parts : 0;
        rows.units = units_.at_least(num_rows * num_units);
        rows.sums = sums_.at_least(num_rows * rows.num_groups);
        rows.scales = scales_.at_least(num_rows);
        return rows;
    }

private:
    Buffer<uint32_t> units_;
    Buffer<int32_t> sums_;
    Buffer<float> scales_;
};

struct Share {
    int64_t begin, end;
};

// The part of `count` things that falls to a thread.
inline Share share_of(int64_t count, int thread, int num_threads) {
    return {count * thread / num_threads, count * (thread + 1) / num_threads};
}

// Words that a thread needs to pack a block.
inline int64_t num_words(const PackedRows& rows) {
    return rows.num_units * (rows.num_rows < rows.block_rows ? rows.num_rows : rows.block_rows);
}

// Packs a thread's share of rows: whole blocks where there are enough, else a stretch of every row. Threads that packed a
// row each of one block would fight for the cache lines in which its rows lie interleaved.
// row_of(row) gives its inputs, largest_of(row, inputs) their largest magnitude; `words` are the thread's own.
template <class RowOf, class LargestOf>
void pack_share(const KernelTable& kernels, const PackedLinear& weight, const PackedRows& rows, int thread, int num_threads,
                uint32_t* words, RowOf row_of, LargestOf largest_of) {
    const bool whole = weight.format == kInt8 || weight.format == kInt4;
    const int part = rows.num_parts > 1 ? thread : 0;
    const int64_t num_units = rows.part_begin(part + 1) - rows.part_begin(part);
    const Share blocks = rows.num_parts > 1 ? Share{0, rows.num_blocks()} : share_of(rows.num_blocks(), thread, num_threads);
    for (int block = static_cast<int>(blocks.begin); block < blocks.end; ++block) {
        const int start = rows.block_start(block), end = rows.block_start(block + 1);
        for (int row = start; row < end; ++row) {
            const FloatRow x = row_of(row);
            uint32_t* out = end - start == 1 ? rows.units + row * rows.num_units + rows.part_begin(part)
                                             : words + (row - start) * num_units;
            kernels.pack_row(weight, x, whole ? largest_of(row, x) : 0.0f, rows, row, part, out);
        }
        if (end - start > 1) kernels.interleave(rows, block, part, words);
    }
}

}  // namespace outrider
