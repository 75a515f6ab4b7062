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
    PackedRows rows_for(const KernelTable& kernels, const PackedLinear& weight, int num_rows) {
        const int per_unit = kernels.unit_inputs[weight.format];
        int64_t num_units = (weight.num_inputs + per_unit - 1) / per_unit;
        if (weight.format == kInt4) num_units = weight.num_groups() * (weight.group_size / 4);
        if (weight.format == kBf16) num_units = (weight.num_inputs + 1) / 2 * 2 / per_unit;
        const bool whole = weight.format == kInt8 || weight.format == kInt4;
        const int64_t num_groups = whole ? weight.num_groups() : 0;
        return {num_rows,
                kernels.block_rows[weight.format],
                kernels.lone_rows[weight.format],
                num_units,
                num_groups,
                units_.at_least(num_rows * num_units),
                sums_.at_least(num_rows * num_groups),
                scales_.at_least(num_rows)};
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

// Who packs what: whole rows where there are several blocks of them, else a stretch of every row, because the rows of
// one block lie so close together that threads would fight for the same cache lines.
struct RowShare {
    Share rows;
    int part, num_parts;
};

inline RowShare share_of_rows(const PackedRows& rows, int thread, int num_threads) {
    if (rows.num_blocks() == 1) return {{0, rows.num_rows}, thread, num_threads};
    return {share_of(rows.num_rows, thread, num_threads), 0, 1};
}

}  // namespace outrider
