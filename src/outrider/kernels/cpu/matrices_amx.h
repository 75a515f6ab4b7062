// Tiles of a GEMM on AMX: up to 32 rows by 32 outputs, all sums in the matrix registers. Included after tiles_avx512.h, to
// which few rows of int8 and int4 go: sums of integers are exact, so that both give the same bits. bf16 always comes here,
// for every sum has one order: of 32 inputs the even and the odd ones, these two, and that to the sum so far.
#pragma once

#include "ahead.h"
#include "kernel_table.h"

#define OUTRIDER_HAS_MATRICES

namespace OUTRIDER_LEVEL {

using outrider::Format;
using outrider::PackedLinear;
using outrider::PackedRows;

// A register has up to 16 rows of 16 words. Sums are in 0 to 3: the first rows by the first 16 outputs of a panel and by
// the others, then the second rows; rows are in 4 and 5, weights in 6 and 7.
constexpr int kMatrixRows = 16, kMatrixWords = 16;
constexpr int kMatrixBytes = 4 * kMatrixRows * kMatrixWords;
constexpr int kMostMatrixRows = 2 * kMatrixRows;
constexpr int kMostGroup = 128;

// Up to so many rows vectors are as fast.
constexpr int kFewRows[] = {INT32_MAX, 0, 4, 3};

inline outrider::RowsForm rows_form(const PackedLinear& weight, int num_rows) {
    if (num_rows <= kFewRows[weight.format]) return {kBlockRows[weight.format], 1};
    const int group_words = weight.format == outrider::kInt4 ? weight.group_size / 4 : kMatrixWords;
    return {kMostMatrixRows, group_words < kMatrixWords ? group_words : kMatrixWords};
}

// A thread's registers, for as long as it lives.
class Matrices {
public:
    Matrices() = default;
    Matrices(const Matrices&) = delete;
    Matrices& operator=(const Matrices&) = delete;
    ~Matrices() {
        if (num_rows_ > 0) asm volatile("tilerelease");
    }

    // For so many rows, and so many words of each at a time. That takes 100 cycles, so tiles of one shape share it.
    void shape(int num_rows, int num_words) {
        if (num_rows == num_rows_ && num_words == num_words_) return;
        num_rows_ = num_rows;
        num_words_ = num_words;
        const int first = num_rows < kMatrixRows ? num_rows : kMatrixRows, second = num_rows - first;
        Config config;
        for (int i : {0, 1}) {
            config.set(i, first, kMatrixWords);
            config.set(2 + i, second, kMatrixWords);
            config.set(6 + i, num_words, kMatrixWords);
        }
        config.set(4, first, num_words);
        config.set(5, second, num_words);
        asm volatile("ldtilecfg %0" : : "m"(config));
    }

private:
    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};

        void set(int matrix, int num_rows, int num_words) {
            if (num_rows == 0) return;
            rows[matrix] = static_cast<uint8_t>(num_rows);
            row_bytes[matrix] = static_cast<uint16_t>(4 * num_words);
        }
    };

    int num_rows_ = 0, num_words_ = 0;
};

// The sanitizers see nothing of what assembly reads and writes.
OUTRIDER_INLINE void check_lines([[maybe_unused]] const void* p, [[maybe_unused]] int64_t stride, [[maybe_unused]] int count,
                                 [[maybe_unused]] int num_bytes) {
#if defined(__SANITIZE_ADDRESS__)
    for (int i = 0; i < count; ++i) {
        const volatile char* line = static_cast<const char*>(p) + i * stride;
        static_cast<void>(line[0]), static_cast<void>(line[num_bytes - 1]);
    }
#endif
}

template <int kMatrix>
OUTRIDER_INLINE void load_matrix(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kMatrix) : "memory");
}

template <int kMatrix>
OUTRIDER_INLINE void store_matrix(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kMatrix) : "memory");
}

template <int kMatrix>
OUTRIDER_INLINE void clear_matrix() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kMatrix));
}

// sums += rows * weights
template <Format kFormat, int kSums, int kRows, int kWeights>
OUTRIDER_INLINE void multiply() {
    if constexpr (kFormat == outrider::kBf16) {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kWeights));
    } else {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kWeights));
    }
}

template <bool kTwo>
OUTRIDER_INLINE void clear_sums() {
    clear_matrix<0>();
    clear_matrix<1>();
    if constexpr (kTwo) clear_matrix<2>(), clear_matrix<3>();
}

// x [row][num_words] by the same words of a panel's outputs: weights [num_words][32]. Meanwhile every so often, four times,
// `fetch` is called: processors drop prefetches that come in bursts.
template <Format kFormat, bool kTwo, class Fetch>
OUTRIDER_INLINE void add_products(const uint32_t* x, int num_rows, int num_words, const uint8_t* weights, Fetch fetch) {
    check_lines(x, 4 * num_words, num_rows, 4 * num_words);
    check_lines(weights, 4 * kPanel, num_words, 4 * kPanel);
    load_matrix<6>(weights, 4 * kPanel);
    fetch();
    load_matrix<4>(x, 4 * num_words);
    multiply<kFormat, 0, 4, 6>();
    fetch();
    load_matrix<7>(weights + 4 * kMatrixWords, 4 * kPanel);
    fetch();
    multiply<kFormat, 1, 4, 7>();
    fetch();
    if constexpr (kTwo) {
        load_matrix<5>(x + kMatrixRows * num_words, 4 * num_words);
        multiply<kFormat, 2, 5, 6>();
        multiply<kFormat, 3, 5, 7>();
    }
}

// To [row][32].
template <bool kTwo>
OUTRIDER_INLINE void store_sums(void* sums, int num_rows) {
    check_lines(sums, 4 * kPanel, num_rows, 4 * kPanel);
    uint32_t* out = static_cast<uint32_t*>(sums);
    store_matrix<0>(out, 4 * kPanel);
    store_matrix<1>(out + kMatrixWords, 4 * kPanel);
    if constexpr (kTwo) {
        store_matrix<2>(out + kMatrixRows * kPanel, 4 * kPanel);
        store_matrix<3>(out + kMatrixRows * kPanel + kMatrixWords, 4 * kPanel);
    }
}

// Sums of all inputs of a panel, whose `num_units` lie at `weights`, to [row][32].
template <Format kFormat, bool kTwo>
Ahead sum_products(const uint32_t* x, int num_rows, const uint8_t* weights, int64_t num_units, void* sums, Ahead ahead) {
    constexpr int kChunkBytes = kMatrixWords * 4 * kPanel;
    clear_sums<kTwo>();
    int64_t unit = 0;
    const auto fetch = [&] {
        for (int i = 0; i < kMatrixWords / 4; ++i) ahead.fetch();
    };
    for (; unit + kMatrixWords <= num_units; unit += kMatrixWords, x += num_rows * kMatrixWords, weights += kChunkBytes)
        add_products<kFormat, kTwo>(x, num_rows, kMatrixWords, weights, fetch);
    if (unit < num_units) {  // behind the last inputs there are other weights
        alignas(64) uint8_t rest[kChunkBytes] = {};
        std::memcpy(rest, weights, (num_units - unit) * 4 * kPanel);
        for (; unit < num_units; ++unit) ahead.fetch();
        add_products<kFormat, kTwo>(x, num_rows, kMatrixWords, rest, [] {});
    }
    store_sums<kTwo>(sums, num_rows);
    return ahead;
}

template <Format kFormat>
Ahead sum_products(const uint32_t* x, int num_rows, const uint8_t* weights, int64_t num_units, void* sums, Ahead ahead) {
    if (num_rows > kMatrixRows) return sum_products<kFormat, true>(x, num_rows, weights, num_units, sums, ahead);
    return sum_products<kFormat, false>(x, num_rows, weights, num_units, sums, ahead);
}

inline Ahead matrix_int8(const uint32_t* x, int num_rows, const int32_t* sums, int num_parts, const uint8_t* panel,
                         int64_t num_units, float* tile, Ahead ahead) {
    alignas(64) int32_t products[kMostMatrixRows * kPanel];
    const float* scales = reinterpret_cast<const float*>(panel);
    ahead.fetch();
    ahead = sum_products<outrider::kInt8>(x, num_rows, panel + 4 * kPanel, num_units, products, ahead);
    for (int row = 0; row < num_rows; ++row) {
        const __m512i start = _mm512_set1_epi32(start_of_sum(sums + row, num_rows, num_parts));
        for (int c = row * kPanel; c < (row + 1) * kPanel; c += W) {
            const __m512i sum = _mm512_add_epi32(_mm512_load_si512(products + c), start);
            store(tile + c, mul(_mm512_cvtepi32_ps(sum), load(scales + c % kPanel)));
        }
    }
    return ahead;
}

// The nibbles of a group as bytes [group / 4][32][4].
inline Ahead unpack_group(const uint8_t* packed, int group_size, uint8_t* bytes, Ahead ahead) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    for (int i = 0; i < group_size; i += 8, packed += 4 * kPanel, bytes += 8 * kPanel) {
        ahead.fetch();
        for (int half : {0, 64}) {
            const __m512i both = _mm512_loadu_si512(packed + half);
            _mm512_store_si512(bytes + half, _mm512_and_si512(both, low));
            _mm512_store_si512(bytes + 4 * kPanel + half, _mm512_and_si512(_mm512_srli_epi32(both, 4), low));
        }
    }
    return ahead;
}

// totals += a group's sums by its scales
template <bool kZeros>
inline void add_group(const int32_t* products, const int32_t* sums, const uint16_t* head, int num_rows, float* totals) {
    for (int c = 0; c < kPanel; c += W) {
        const vf scale = load_f16(head + c), zero = kZeros ? load_f16(head + kPanel + c) : splat(0.0f);
        for (int row = 0; row < num_rows; ++row) {
            const __m512i product = _mm512_load_si512(products + row * kPanel + c);
            vf sum;
            if constexpr (kZeros) {  // integers below 2^24: exact
                sum = fma(splat(static_cast<float>(sums[row])), zero, _mm512_cvtepi32_ps(product));
            } else {
                sum = _mm512_cvtepi32_ps(_mm512_add_epi32(product, _mm512_set1_epi32(sums[row])));
            }
            store(totals + row * kPanel + c, fma(sum, scale, load(totals + row * kPanel + c)));
        }
    }
}

// While the matrices of one group are multiplied, vectors unpack the next one and add up the one before.
template <bool kZeros, bool kTwo>
Ahead matrix_int4(const uint32_t* x, int num_rows, int num_words, const int32_t* sums, const uint8_t* panel, int64_t num_groups,
                  int group_size, float* totals, Ahead ahead) {
    alignas(64) uint8_t weights[2][kMostGroup * kPanel];
    alignas(64) int32_t products[2][kMostMatrixRows * kPanel];
    constexpr int kHead = (kZeros ? 4 : 2) * kPanel;
    const int64_t group_bytes = kHead + group_size / 2 * kPanel;
    const auto unpack = [&](int64_t g) {
        for (int i = 0; i < kHead; i += 64) ahead.fetch_line();
        ahead = unpack_group(panel + g * group_bytes + kHead, group_size, weights[g % 2], ahead);
    };
    const auto add_up = [&](int64_t g) {
        const uint16_t* head = reinterpret_cast<const uint16_t*>(panel + g * group_bytes);
        add_group<kZeros>(products[g % 2], sums + g * num_rows, head, num_rows, totals);
    };
    std::memset(totals, 0, sizeof(float) * num_rows * kPanel);
    unpack(0);
    for (int64_t g = 0; g < num_groups; ++g) {
        if (g + 1 < num_groups) unpack(g + 1);
        clear_sums<kTwo>();
        for (int word = 0; word < group_size / 4; word += num_words, x += num_rows * num_words)
            add_products<outrider::kInt8, kTwo>(x, num_rows, num_words, weights[g % 2] + word * 4 * kPanel, [] {});
        store_sums<kTwo>(products[g % 2], num_rows);
        if (g > 0) add_up(g - 1);
    }
    add_up(num_groups - 1);
    return ahead;
}

// The tile of one panel and one block of rows in chunks.
inline Ahead run_matrix_tile(const PackedLinear& weight, const PackedRows& rows, int block, const uint8_t* panel, float* tile,
                             Ahead ahead, Matrices& matrices) {
    const int start = rows.block_start(block), num_rows = rows.block_start(block + 1) - start;
    matrices.shape(num_rows, rows.chunk_units);
    const uint32_t* x = rows.units + start * rows.num_units;
    const int32_t* sums = rows.sums + start * rows.num_groups;
    if (weight.format == outrider::kBf16)
        return sum_products<outrider::kBf16>(x, num_rows, panel, (weight.num_inputs + 1) / 2, tile, ahead);
    if (weight.format == outrider::kInt8)
        return matrix_int8(x, num_rows, sums, rows.num_parts, panel, (weight.num_inputs + 3) / 4, tile, ahead);
    const auto run = num_rows > kMatrixRows ? (weight.has_zeros ? matrix_int4<true, true> : matrix_int4<false, true>)
                                            : (weight.has_zeros ? matrix_int4<true, false> : matrix_int4<false, false>);
    return run(x, num_rows, rows.chunk_units, sums, panel, rows.num_groups, weight.group_size, tile, ahead);
}

}  // namespace OUTRIDER_LEVEL
