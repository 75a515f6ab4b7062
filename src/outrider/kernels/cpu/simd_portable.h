// Eight lanes of float32 in plain C++, for the compiler to vectorise as it can.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace OUTRIDER_LEVEL {

constexpr int W = 8;
struct vf {
    float x[W];
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

template <class F>
inline vf lanes(F f) {
    vf out;
    for (int i = 0; i < W; ++i) out.x[i] = f(i);
    return out;
}

inline vf load(const float* p) { return lanes([&](int i) { return p[i]; }); }
inline void store(float* p, vf v) {
    for (int i = 0; i < W; ++i) p[i] = v.x[i];
}
inline void stream(float* p, vf v) { store(p, v); }
inline void streamed() {}
inline vf splat(float x) { return lanes([&](int) { return x; }); }
inline vf add(vf a, vf b) { return lanes([&](int i) { return a.x[i] + b.x[i]; }); }
inline vf sub(vf a, vf b) { return lanes([&](int i) { return a.x[i] - b.x[i]; }); }
inline vf mul(vf a, vf b) { return lanes([&](int i) { return a.x[i] * b.x[i]; }); }
inline vf div(vf a, vf b) { return lanes([&](int i) { return a.x[i] / b.x[i]; }); }
// Two roundings: a fused one in software would take a hundred times as long.
inline vf fma(vf a, vf b, vf c) { return lanes([&](int i) { return a.x[i] * b.x[i] + c.x[i]; }); }
// Where either is NaN, max and min give the second operand.
inline vf max(vf a, vf b) { return lanes([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; }); }
inline vf min(vf a, vf b) { return lanes([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; }); }
inline vf round_even(vf v) { return lanes([&](int i) { return std::nearbyintf(v.x[i]); }); }

// Lane i with lane i + 4, then i + 2, i + 1: always in this order.
template <class F>
inline float fold(vf v, F f) {
    for (int half = W / 2; half > 0; half /= 2) v = f(v, lanes([&](int i) { return v.x[i ^ half]; }));
    return v.x[0];
}

// x * 2^n for integral n in [-127, 128].
inline vf scale_by_power(vf v, vf n) {
    return lanes([&](int i) { return std::ldexp(v.x[i], n.x[i] == n.x[i] ? static_cast<int>(n.x[i]) : 0); });
}

// The larger magnitude's bits; NaN counts as larger than infinity, so it is never lost.
inline vf max_magnitude(vf a, vf b) {
    return lanes([&](int i) {
        const uint32_t p = bits_of(a.x[i]) & 0x7fffffff, q = bits_of(b.x[i]) & 0x7fffffff;
        return float_of(p > q ? p : q);
    });
}

inline vf load_bf16(const uint16_t* p) {
    return lanes([&](int i) { return float_of(static_cast<uint32_t>(p[i]) << 16); });
}

// Rounds to nearest even; NaN stays NaN.
inline void store_bf16(uint16_t* p, vf v) {
    for (int i = 0; i < W; ++i) {
        const uint32_t bits = bits_of(v.x[i]);
        const uint32_t rounded = v.x[i] != v.x[i] ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
        p[i] = static_cast<uint16_t>(rounded >> 16);
    }
}

inline float float_of_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
    // As if it were a float32 with a far smaller exponent, then scaled: subnormals come out right too.
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

inline vf load_f16(const uint16_t* p) { return lanes([&](int i) { return float_of_f16(p[i]); }); }
inline vf load_s8(const int8_t* p) { return lanes([&](int i) { return static_cast<float>(p[i]); }); }

// Integral x in [-128, 127].
inline void store_s8(int8_t* p, vf v) {
    for (int i = 0; i < W; ++i) {  // NaN and infinity, which no integer is, may become any
        const float x = v.x[i] > -128.0f ? (v.x[i] < 127.0f ? v.x[i] : 127.0f) : -128.0f;
        p[i] = static_cast<int8_t>(x);
    }
}

// A bit for each lane: whether x is at least y; it is not where either is NaN.
inline uint32_t lanes_at_least(vf a, vf b) {
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(a.x[i] >= b.x[i]) << i;
    return bits;
}

using outrider::prefetch;
using outrider::prefetch_far;

// The first `count` lanes.
inline void store_lanes(float* p, vf v, int count) { std::memcpy(p, v.x, sizeof(float) * count); }

// Lanes [low, high) of x, the others of `other`; both may lie outside the vector.
inline vf keep_lanes(vf x, int low, int high, vf other) {
    return lanes([&](int i) { return low <= i && i < high ? x.x[i] : other.x[i]; });
}

// Of 32-bit pairs of bf16: the first of each, and the second, as the machine orders bytes.
inline vf first_of_bf16(vf pairs) { return lanes([&](int i) { return float_of(bits_of(pairs.x[i]) << 16); }); }
inline vf second_of_bf16(vf pairs) { return lanes([&](int i) { return float_of(bits_of(pairs.x[i]) & 0xffff0000); }); }

// W columns of W rows, which are floats from `offset` bytes on: take(column, vector).
template <class F>
inline void transpose_block(const char* const* rows, int64_t offset, F take) {
    for (int column = 0; column < W; ++column) {
        vf x;
        for (int i = 0; i < W; ++i) std::memcpy(x.x + i, rows[i] + offset + 4 * column, 4);
        take(column, x);
    }
}

inline void philox(const outrider::PhiloxStream& stream, uint64_t first, int64_t count, uint64_t* words) {
    for (int64_t i = 0; i < count; ++i) stream.block(first + i, words + 4 * i);
}

}  // namespace OUTRIDER_LEVEL
