// Row-wise pieces of a forward, generic over the level's vectors. Each row is computed alone, in a fixed order.
#pragma once

#include <cfloat>
#include <cmath>

#include "ahead.h"
#include "kernel_table.h"

namespace OUTRIDER_LEVEL {

using outrider::Format;
using outrider::kPanel;
using outrider::KvCache;
using outrider::KvType;
using outrider::PackedLinear;
using outrider::PackedRows;
using outrider::FloatRow;

inline float sum_of(vf x) { return fold(x, add); }

// e^x within 2 units in the last place; below -87 and above 88 as at those points; NaN stays NaN.
inline vf exp(vf x) {
    x = min(splat(88.0f), max(splat(-87.0f), x));
    const vf n = round_even(mul(x, splat(1.44269504f)));
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), splat(1.0f));
    return scale_by_power(p, n);
}

inline vf silu(vf x) { return div(x, add(splat(1.0f), exp(sub(splat(0.0f), x)))); }

inline vf tanh(vf x) {
    const vf e = exp(add(x, x));
    return sub(splat(1.0f), div(splat(2.0f), add(e, splat(1.0f))));
}

// Loads up to W floats, zeros after them.
inline vf load_part(const float* p, int64_t count) {
    if (count >= W) return load(p);
    float lane[W] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
    return load(lane);
}

inline void store_part(float* p, vf x, int64_t count) {
    if (count >= W) return store(p, x);
    float lane[W];
    store(lane, x);
    for (int64_t i = 0; i < count; ++i) p[i] = lane[i];
}

inline void rms_norm(const FloatRow& x, const float* weight, float eps, float* out, int64_t width) {
    vf squares = splat(0.0f);
    for (int64_t i = 0; i < width; i += W) {
        const vf v = load_part(x.at(i), width - i);
        squares = fma(v, v, squares);
    }
    const vf factor = splat(1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps));
    for (int64_t i = 0; i < width; i += W) {
        const vf scaled = mul(load_part(x.at(i), width - i), factor);
        store_part(out + i, mul(scaled, load_part(weight + i, width - i)), width - i);
    }
}

inline float largest_magnitude(const FloatRow& x, int64_t width) {
    vf largest = splat(0.0f);
    for (int64_t i = 0; i < width; i += W) largest = max_magnitude(largest, load_part(x.at(i), width - i));
    return fold(largest, max_magnitude);
}

// 127 / largest, or 0 where that is not finite: rows of zeros, of almost zeros, or with NaN.
inline float inverse_scale(float largest) {
    const float inverse = 127.0f / largest;
    return inverse <= FLT_MAX ? inverse : 0.0f;
}

// x / scale rounded to integers in [-127, 127]; returns the scale (NaN or infinite if the row is).
inline float quantize(const float* x, int64_t width, int8_t* out) {
    const float largest = largest_magnitude({x, kPanel}, width);
    const vf inverse = splat(inverse_scale(largest));
    for (int64_t i = 0; i < width; i += W) {
        const vf q = round_even(mul(load_part(x + i, width - i), inverse));
        if (width - i >= W) {
            store_s8(out + i, q);
        } else {
            int8_t lane[W];
            store_s8(lane, q);
            for (int64_t j = 0; i + j < width; ++j) out[i + j] = lane[j];
        }
    }
    return largest / 127.0f;
}

constexpr int64_t kStretch = 1024;  // inputs handled at a time, so that they stay in the first cache; whole panels

// Inputs in the form of the format's units: rounded bytes, bf16 (widened where a unit is one input), or as they are. What
// the last unit has no input for becomes zero.
inline void write_words(Format format, int per_unit, const FloatRow& in, int64_t count, float inverse, uint32_t* words) {
    alignas(64) char last[4 * W] = {};
    const int64_t whole = count / W * W;
    if (format == outrider::kInt8 || format == outrider::kInt4) {
        int8_t* out = reinterpret_cast<int8_t*>(words);
        for (int64_t i = 0; i < whole; i += W) store_s8(out + i, round_even(mul(load(in.at(i)), splat(inverse))));
        if (whole == count) return;
        store_s8(reinterpret_cast<int8_t*>(last), round_even(mul(load_part(in.at(whole), count - whole), splat(inverse))));
        std::memcpy(out + whole, last, (count - whole + 3) / 4 * 4);
    } else if (format == outrider::kBf16 && per_unit == 2) {
        uint16_t* out = reinterpret_cast<uint16_t*>(words);
        for (int64_t i = 0; i < whole; i += W) store_bf16(out + i, load(in.at(i)));
        if (whole == count) return;
        store_bf16(reinterpret_cast<uint16_t*>(last), load_part(in.at(whole), count - whole));
        std::memcpy(out + whole, last, (count - whole + 1) / 2 * 4);
    } else if (format == outrider::kBf16) {
        uint16_t narrow[W];
        for (int64_t i = 0; i < count; i += W) {
            store_bf16(narrow, load_part(in.at(i), count - i));
            for (int64_t j = 0; j < W && i + j < count; ++j) words[i + j] = static_cast<uint32_t>(narrow[j]) << 16;
        }
    } else {
        for (int64_t i = 0; i < count; i += kPanel)
            std::memcpy(words + i, in.at(i), sizeof(float) * (count - i < kPanel ? count - i : kPanel));
    }
}

inline int32_t sum_of_bytes(const int8_t* bytes, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += bytes[i];
    return sum;
}

inline void pack_row(const PackedLinear& weight, const FloatRow& x, float largest, const PackedRows& rows, int row, int part,
                     uint32_t* words) {
    const int block = rows.block_of(row), start = rows.block_start(block);
    const int size = rows.block_start(block + 1) - start, per_unit = kUnitInputs[weight.format];
    const int64_t first_unit = rows.part_begin(part), num_units = rows.part_begin(part + 1) - first_unit;
    const int64_t width = weight.num_inputs, begin = first_unit * per_unit < width ? first_unit * per_unit : width;
    const int64_t end = begin + num_units * per_unit < width ? begin + num_units * per_unit : width;
    const bool whole = weight.format == outrider::kInt8 || weight.format == outrider::kInt4;
    const float inverse = whole ? inverse_scale(largest) : 0.0f;
    if (whole && part == 0) rows.scales[row] = largest / 127.0f;
    alignas(64) float ordered[kStretch];
    for (int64_t first = begin; first < end; first += kStretch) {
        const int64_t count = end - first < kStretch ? end - first : kStretch;
        FloatRow in = {x.at(first), x.stride};  // stretches begin with panels
        if (weight.input_order != nullptr) {
            for (int64_t i = 0; i < count; ++i) ordered[i] = *x.at(weight.input_order[first + i]);
            in = {ordered, kPanel};
        }
        write_words(weight.format, per_unit, in, count, inverse, words + (first - begin) / per_unit);
    }
    const int64_t written = (end - begin + per_unit - 1) / per_unit;
    std::memset(words + written, 0, sizeof(uint32_t) * (num_units - written));
    int32_t* sums = rows.sums + start * rows.num_groups + (row - start);
    const int8_t* bytes = reinterpret_cast<const int8_t*>(words);
    if (weight.format == outrider::kInt8) {
        sums[part * size] = -128 * sum_of_bytes(bytes, end - begin);
    } else if (weight.format == outrider::kInt4) {
        const int factor = weight.has_zeros ? -1 : -8;
        for (int64_t i = begin; i < end; i += weight.group_size) {
            const int64_t count = end - i < weight.group_size ? end - i : weight.group_size;
            sums[i / weight.group_size * size] = factor * sum_of_bytes(bytes + i - begin, count);
        }
    }
}

inline void interleave(const PackedRows& rows, int block, int part, const uint32_t* words) {
    const int start = rows.block_start(block), size = rows.block_start(block + 1) - start;
    const int64_t num_units = rows.part_begin(part + 1) - rows.part_begin(part);
    uint32_t* units = rows.units + start * rows.num_units + rows.part_begin(part) * size;
    int64_t unit = 0;
    if (rows.chunk_units > 1) {
        constexpr int kStep = 8;  // which chunks are multiples of
        for (; unit < num_units; unit += rows.chunk_units)
            for (int row = 0; row < size; ++row)
                for (int i = 0; i < rows.chunk_units; i += kStep, units += kStep)
                    std::memcpy(units, words + row * num_units + unit + i, sizeof(uint32_t) * kStep);
        return;
    }
    for (; unit + W <= num_units; unit += W) {
        for (int first = 0; first < size; first += W) {
            const char* from[W];
            const int count = size - first < W ? size - first : W;
            for (int i = 0; i < W; ++i)
                from[i] = reinterpret_cast<const char*>(words + (first + (i < count ? i : 0)) * num_units + unit);
            float* to = reinterpret_cast<float*>(units + unit * size + first);
            transpose_block(from, 0, [&](int column, vf x) { store_lanes(to + column * size, x, count); });
        }
    }
    for (; unit < num_units; ++unit)
        for (int row = 0; row < size; ++row) units[unit * size + row] = words[row * num_units + unit];
}

// Rotates the first half of each head against the second (Su et al., arXiv 2104.09864, as Llama lays it out).
inline void rotate(float* heads, int num_heads, int width, const float* cos, const float* sin) {
    const int half = width / 2;
    for (int h = 0; h < num_heads; ++h, heads += width) {
        for (int i = 0; i < half; i += W) {
            const int64_t count = half - i;
            const vf a = load_part(heads + i, count), b = load_part(heads + half + i, count);
            const vf c = load_part(cos + i, count), s = load_part(sin + i, count);
            store_part(heads + i, sub(mul(a, c), mul(b, s)), count);
            store_part(heads + half + i, add(mul(b, c), mul(a, s)), count);
        }
    }
}

inline void write_kv(const float* heads, const KvCache& cache, int64_t slot) {
    for (int h = 0; h < cache.num_heads; ++h, heads += cache.width) {
        char* out = cache.head(slot, h);
        if (cache.type == KvType::kFp32) {
            std::memcpy(out, heads, sizeof(float) * cache.width);
        } else if (cache.type == KvType::kBf16) {
            for (int i = 0; i < cache.width; i += W) {
                uint16_t lane[W];
                store_bf16(lane, load_part(heads + i, cache.width - i));
                std::memcpy(out + 2 * i, lane, 2 * (cache.width - i < W ? cache.width - i : W));
            }
        } else {
            const float scale = quantize(heads, cache.width, reinterpret_cast<int8_t*>(out));
            std::memcpy(out + cache.width, &scale, sizeof scale);
        }
    }
}

// How W dimensions of a head in the cache become float32.
struct ReadFp32 {
    static constexpr int size = 4;
    ReadFp32(const char*, int) {}
    vf operator()(const char* in) const { return load(reinterpret_cast<const float*>(in)); }
};

struct ReadBf16 {
    static constexpr int size = 2;
    ReadBf16(const char*, int) {}
    vf operator()(const char* in) const { return load_bf16(reinterpret_cast<const uint16_t*>(in)); }
};

struct ReadInt8 {
    static constexpr int size = 1;
    vf scale;
    ReadInt8(const char* head, int width) {
        float x;
        std::memcpy(&x, head + width, sizeof x);
        scale = splat(x);
    }
    vf operator()(const char* in) const { return mul(load_s8(reinterpret_cast<const int8_t*>(in)), scale); }
};

// Dimensions [begin, end) of one head of some positions as float32, `stride` apart: a multiple of W, zeros at the end.
template <class Read>
inline void read_heads_as(const KvCache& cache, const char* const* heads, int64_t count, int begin, int end, float* out,
                          int64_t stride) {
    const int whole = begin + (end - begin) / W * W;
    for (int64_t j = 0; j < count; ++j, out += stride) {
        const Read read(heads[j], cache.width);
        for (int i = begin; i < whole; i += W) store(out + i - begin, read(heads[j] + i * Read::size));
        if (whole < end) {
            alignas(64) char rest[W * Read::size] = {};
            std::memcpy(rest, heads[j] + whole * Read::size, (end - whole) * Read::size);
            store(out + whole - begin, read(rest));
        }
    }
}

inline void read_heads(const KvCache& cache, const char* const* heads, int64_t count, int begin, int end, float* out,
                       int64_t stride) {
    switch (cache.type) {
        case KvType::kFp32: return read_heads_as<ReadFp32>(cache, heads, count, begin, end, out, stride);
        case KvType::kBf16: return read_heads_as<ReadBf16>(cache, heads, count, begin, end, out, stride);
        default: return read_heads_as<ReadInt8>(cache, heads, count, begin, end, out, stride);
    }
}

inline void read_row(const void* table, KvType type, int64_t row, int64_t width, float* out) {
    if (type == KvType::kFp32) {
        std::memcpy(out, static_cast<const float*>(table) + row * width, sizeof(float) * width);
        return;
    }
    const uint16_t* in = static_cast<const uint16_t*>(table) + row * width;
    int64_t i = 0;
    for (; i + W <= width; i += W) store(out + i, load_bf16(in + i));
    for (; i < width; ++i) {
        const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
        std::memcpy(out + i, &bits, sizeof bits);
    }
}

inline void block_maxima(const float* x, int64_t num_blocks, int64_t block, float* maxima) {
    const vf lowest = splat(-INFINITY);
    for (int64_t b = 0; b < num_blocks; ++b, x += block) {
        vf best[4] = {lowest, lowest, lowest, lowest};
        int64_t i = 0;
        for (; i + 4 * W <= block; i += 4 * W) {
            for (int part = 0; part < 4; ++part) best[part] = max(load(x + i + part * W), best[part]);
        }
        for (; i < block; i += W) best[0] = max(load(x + i), best[0]);
        maxima[b] = fold(max(max(best[0], best[1]), max(best[2], best[3])), max);
    }
}

inline float greatest(const float* x, int64_t count) {
    vf most = splat(-INFINITY), magnitude = splat(0.0f);
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const vf v = load(x + i);
        most = max(v, most);
        magnitude = max_magnitude(magnitude, v);
    }
    float found = fold(most, max), largest = fold(magnitude, max_magnitude);
    for (; i < count; ++i) {
        if (x[i] > found) found = x[i];
        if (x[i] != x[i]) largest = x[i];
    }
    return largest != largest ? largest : found;
}

// The noise -log(-log(1 - r)) of a random number, r = (complement + 1/2) / 2^32, is at most -log(r), and nearly that where
// it is large; a logarithm is at least the line between powers of two that a float's bits are.
inline int64_t noise_hits(const float* __restrict logits, const uint32_t* __restrict halves, int64_t count, float temperature,
                          float floor, float* __restrict ceilings, uint16_t* __restrict places) {
    constexpr float kPerBit = 0.69314718f / (1 << 23), kMost = 0.69314718f * (127 + 31) + 1e-4f;  // and what rounding takes
    constexpr int64_t kGroup = 16;
    for (int64_t i = 0; i < count; ++i) {
        const float rest = static_cast<float>(static_cast<int32_t>(~halves[i] >> 1));  // of 0 the logarithm is low enough
        int32_t bits;
        __builtin_memcpy(&bits, &rest, sizeof bits);
        ceilings[i] = logits[i] / temperature + (kMost - static_cast<float>(bits) * kPerBit);
    }
    for (int64_t i = count; i % kGroup != 0; ++i) ceilings[i] = -INFINITY;
    int64_t num_hits = 0;
    for (int64_t group = 0; group < count; group += kGroup) {
        vf most = splat(-INFINITY);
        for (int64_t i = group; i < group + kGroup; i += W) most = max(load(ceilings + i), most);
        if (fold(most, max) < floor) continue;
        for (int64_t i = group; i < group + kGroup && i < count; ++i) {
            places[num_hits] = static_cast<uint16_t>(i);
            num_hits += ceilings[i] >= floor;
        }
    }
    return num_hits;
}

// Reads every byte once and returns something that depends on all: the machine's read bandwidth is this, timed.
inline uint64_t read_memory(const void* data, size_t num_bytes, outrider::Fetch fetch) {
    const uint8_t* p = static_cast<const uint8_t*>(data);
    const bool is_ours = fetch != outrider::Fetch::kProcessor;
    Ahead ahead = is_ours ? Ahead(p + kAheadBytes, nullptr, nullptr, 128, fetch == outrider::Fetch::kFar) : Ahead(p);
    vf a = splat(0.0f), b = a, c = a, d = a;
    for (size_t i = 0; i + 16 * W <= num_bytes; i += 16 * W) {
        for (int bytes = 0; bytes < 16 * W; bytes += 128) ahead.fetch();
        a = max_magnitude(a, load(reinterpret_cast<const float*>(p + i)));
        b = max_magnitude(b, load(reinterpret_cast<const float*>(p + i + 4 * W)));
        c = max_magnitude(c, load(reinterpret_cast<const float*>(p + i + 8 * W)));
        d = max_magnitude(d, load(reinterpret_cast<const float*>(p + i + 12 * W)));
    }
    const float largest = fold(max_magnitude(max_magnitude(a, b), max_magnitude(c, d)), max_magnitude);
    uint32_t bits;
    std::memcpy(&bits, &largest, sizeof bits);
    return bits;
}

}  // namespace OUTRIDER_LEVEL
