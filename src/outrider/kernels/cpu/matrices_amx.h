// Tiles of a GEMM on AMX: up to 32 rows by 32 outputs, all sums in the matrix registers. Included after tiles_avx512.h, to
// which few rows of int8 and int4 go: sums of integers are exact, so that both give the same bits. bf16 always comes here,
// for every sum has one order: of 32 inputs the even and the odd ones, these two, and that to the sum so far.
#pragma once

#include <type_traits>

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
constexpr int kMostMatrixRows = 2 * kMatrixRows;
constexpr int kMostGroup = 128;
constexpr int kChunkBytes = kMatrixWords * 4 * kPanel;  // of weights
constexpr int kStretchUnits = 8 * kMatrixWords;
constexpr int kTileBlocks = 4;  // most blocks of rows whose tiles are made together
constexpr int64_t kSlabBytes = 3 << 19;  // of rows that all panels meet before the next ones: they stay in a core's cache

// Up to so many rows vectors are as fast.
constexpr int kFewRows[] = {INT32_MAX, 0, 4, 6};

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

// sums += rows * weights: of bf16, or signed bytes by unsigned ones (int8) or signed ones (int4)
template <Format kFormat, int kSums, int kRows, int kWeights>
OUTRIDER_INLINE void multiply() {
    if constexpr (kFormat == outrider::kBf16) {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kWeights));
    } else if constexpr (kFormat == outrider::kInt4) {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kWeights));
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

// From [row][32], and back.
template <bool kTwo>
OUTRIDER_INLINE void load_sums(const void* sums, int num_rows) {
    check_lines(sums, 4 * kPanel, num_rows, 4 * kPanel);
    const uint32_t* in = static_cast<const uint32_t*>(sums);
    load_matrix<0>(in, 4 * kPanel);
    load_matrix<1>(in + kMatrixWords, 4 * kPanel);
    if constexpr (kTwo) {
        load_matrix<2>(in + kMatrixRows * kPanel, 4 * kPanel);
        load_matrix<3>(in + kMatrixRows * kPanel + kMatrixWords, 4 * kPanel);
    }
}

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

// sums += x [row][num_words] by the same words of a panel's outputs: weights [num_words][32]. Meanwhile, four times, `fetch`
// is called: processors drop prefetches that come in bursts.
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

// The rows of a block, and where its sums go: [row][32] behind those of the blocks before it, of which `first` is the first.
struct MatrixBlock {
    int start, num_rows, before;

    MatrixBlock(const PackedRows& rows, int first, int block)
        : start(rows.block_start(block)), num_rows(rows.block_start(block + 1) - start), before(start - rows.block_start(first)) {}
};

// A stretch of the inputs, whose weights [unit][32] are `num_units`, by a block's rows.
template <Format kFormat, bool kTwo, class Fetch>
inline void add_stretch(const uint32_t* x, int num_rows, const uint8_t* weights, int64_t num_units, bool is_first, void* sums,
                        Fetch fetch) {
    if (is_first) clear_sums<kTwo>();
    else load_sums<kTwo>(sums, num_rows);
    for (; num_units >= kMatrixWords; num_units -= kMatrixWords, x += num_rows * kMatrixWords, weights += kChunkBytes)
        add_products<kFormat, kTwo>(x, num_rows, kMatrixWords, weights, fetch);
    if (num_units > 0) {  // behind the last inputs there are other weights
        alignas(64) uint8_t rest[kChunkBytes] = {};
        std::memcpy(rest, weights, num_units * 4 * kPanel);
        add_products<kFormat, kTwo>(x, num_rows, kMatrixWords, rest, fetch);
    }
    store_sums<kTwo>(sums, num_rows);
}

// Sums of all inputs of a panel, whose units lie at `weights`, for blocks [first, end), to [row][32]. Of several blocks each
// goes through the same stretch of the weights, which stays in the first cache, before any goes on.
template <Format kFormat>
Ahead sum_products(const PackedRows& rows, int first, int end, const uint8_t* weights, int64_t num_units, void* sums, Ahead ahead,
                   Matrices& matrices) {
    const int64_t stretch = end - first > 1 ? kStretchUnits : num_units;
    for (int64_t unit = 0; unit < num_units; unit += stretch) {
        const int64_t count = num_units - unit < stretch ? num_units - unit : stretch;
        for (int block = first; block < end; ++block) {
            const MatrixBlock own(rows, first, block);
            matrices.shape(own.num_rows, kMatrixWords);
            const auto fetch = [&] {
                for (int i = 0; i < kMatrixWords / 4 && block == first; ++i) ahead.fetch();
            };
            const auto add = [&](auto two) {
                add_stretch<kFormat, decltype(two)::value>(rows.units + own.start * rows.num_units + unit * own.num_rows, own.num_rows,
                                                           weights + unit * 4 * kPanel, count, unit == 0,
                                                           static_cast<uint32_t*>(sums) + own.before * kPanel, fetch);
            };
            if (own.num_rows > kMatrixRows) add(std::true_type{});
            else add(std::false_type{});
        }
    }
    return ahead;
}

inline Ahead matrix_int8(const PackedLinear& weight, const PackedRows& rows, int first, int end, const uint8_t* panel, float* tile,
                         Ahead ahead, Matrices& matrices) {
    const float* scales = reinterpret_cast<const float*>(panel);
    ahead.fetch();
    ahead = sum_products<outrider::kInt8>(rows, first, end, panel + 4 * kPanel, (weight.num_inputs + 3) / 4, tile, ahead, matrices);
    for (int block = first; block < end; ++block) {
        const MatrixBlock own(rows, first, block);
        const int32_t* sums = rows.sums + own.start * rows.num_groups;
        for (int row = 0; row < own.num_rows; ++row) {
            const __m512i start = _mm512_set1_epi32(start_of_sum(sums + row, own.num_rows, rows.num_parts));
            float* const out = tile + (own.before + row) * kPanel;
            for (int c = 0; c < kPanel; c += W)
                store(out + c, mul(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(out + c), start)), load(scales + c)));
        }
    }
    return ahead;
}

// The nibbles of a group as bytes [group / 4][32][4]: q - 8, or q where there are zero points. Both are linear maps of bits
// (and a constant): one row of each matrix, the last one first, says which bits make a bit.
template <bool kZeros>
inline Ahead unpack_group(const uint8_t* packed, int group_size, uint8_t* bytes, Ahead ahead) {
    const __m512i low = _mm512_set1_epi64(kZeros ? 0x0102040800000000 : 0x0102040808080808);
    const __m512i high = _mm512_set1_epi64(kZeros ? 0x1020408000000000 : 0x1020408080808080);
    constexpr int kFlip = kZeros ? 0 : 0xf8;
    for (int i = 0; i < group_size; i += 8, packed += 4 * kPanel, bytes += 8 * kPanel) {
        ahead.fetch();
        for (int half : {0, 64}) {
            const __m512i both = _mm512_loadu_si512(packed + half);
            _mm512_store_si512(bytes + half, _mm512_gf2p8affine_epi64_epi8(both, low, kFlip));
            _mm512_store_si512(bytes + 4 * kPanel + half, _mm512_gf2p8affine_epi64_epi8(both, high, kFlip));
        }
    }
    return ahead;
}

// totals += sums of kCount groups, one after the other, by their scales. `sums` are of each group those of the rows.
template <bool kZeros, int kCount>
inline void add_groups(const int32_t (*products)[kMostMatrixRows * kPanel], const int32_t* sums, const uint8_t* head,
                       int64_t group_bytes, int num_rows, float* totals) {
    for (int c = 0; c < kPanel; c += W) {
        vf scale[kCount], zero[kCount];
        for (int i = 0; i < kCount; ++i) {
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(head + i * group_bytes) + c;
            scale[i] = load_f16(scales);
            zero[i] = kZeros ? load_f16(scales + kPanel) : splat(0.0f);
        }
        for (int row = 0; row < num_rows; ++row) {
            vf total = load(totals + row * kPanel + c);
            for (int i = 0; i < kCount; ++i) {
                vf sum = _mm512_cvtepi32_ps(_mm512_load_si512(products[i] + row * kPanel + c));
                if constexpr (kZeros)  // integers below 2^24: exact
                    sum = fma(splat(static_cast<float>(sums[i * num_rows + row])), zero[i], sum);
                total = fma(sum, scale[i], total);
            }
            store(totals + row * kPanel + c, total);
        }
    }
}

// kCount groups of a block at a time. While their matrices are multiplied, vectors unpack the next ones and add up what was
// before.
template <bool kZeros, int kCount>
Ahead matrix_int4(const PackedLinear& weight, const PackedRows& rows, int first, int end, const uint8_t* panel, float* totals,
                  Ahead ahead, Matrices& matrices) {
    constexpr int kHead = (kZeros ? 4 : 2) * kPanel;
    static_assert(kCount <= 2, "what is left over is one group");
    alignas(64) uint8_t weights[2][kCount][kMostGroup * kPanel];
    alignas(64) int32_t products[2][kCount][kMostMatrixRows * kPanel];
    const int group_size = weight.group_size, num_words = rows.chunk_units;
    const int64_t group_bytes = kHead + group_size / 2 * kPanel;
    const auto unpack = [&](int64_t begin) {
        for (int64_t g = begin; g < begin + kCount && g < rows.num_groups; ++g) {
            for (int i = 0; i < kHead; i += 64) ahead.fetch_line();
            ahead = unpack_group<kZeros>(panel + g * group_bytes + kHead, group_size, weights[begin / kCount % 2][g - begin], ahead);
        }
    };
    const auto multiply_group = [&](auto two, const uint32_t* x, int num_rows, const uint8_t* bytes, int32_t* sums) {
        constexpr bool kTwo = decltype(two)::value;
        clear_sums<kTwo>();
        for (int word = 0; word < group_size / 4; word += num_words, x += num_rows * num_words)
            add_products<outrider::kInt4, kTwo>(x, num_rows, num_words, bytes + word * 4 * kPanel, [] {});
        store_sums<kTwo>(sums, num_rows);
    };
    int turn = 0;
    const auto add_up = [&](int64_t g, int block) {
        const MatrixBlock own(rows, first, block);
        const int32_t* sums = rows.sums + own.start * rows.num_groups + g * own.num_rows;
        const auto add = g + kCount <= rows.num_groups ? add_groups<kZeros, kCount> : add_groups<kZeros, 1>;
        add(products[turn], sums, panel + g * group_bytes, group_bytes, own.num_rows, totals + own.before * kPanel);
    };
    std::memset(totals, 0, sizeof(float) * (rows.block_start(end) - rows.block_start(first)) * kPanel);
    unpack(0);
    int64_t before = -1;  // groups whose sums wait to be added up, and the block
    int block_before = 0;
    for (int64_t begin = 0; begin < rows.num_groups; begin += kCount) {
        unpack(begin + kCount);
        for (int block = first; block < end; ++block) {
            const MatrixBlock own(rows, first, block);
            matrices.shape(own.num_rows, num_words);
            for (int64_t g = begin; g < begin + kCount && g < rows.num_groups; ++g) {
                const uint32_t* x = rows.units + own.start * rows.num_units + g * (group_size / 4) * own.num_rows;
                const uint8_t* bytes = weights[begin / kCount % 2][g - begin];
                if (own.num_rows > kMatrixRows) multiply_group(std::true_type{}, x, own.num_rows, bytes, products[1 - turn][g - begin]);
                else multiply_group(std::false_type{}, x, own.num_rows, bytes, products[1 - turn][g - begin]);
            }
            if (before >= 0) add_up(before, block_before);
            turn = 1 - turn;
            before = begin;
            block_before = block;
        }
    }
    add_up(before, block_before);
    return ahead;
}

// The tiles of one panel and blocks [first, end) of rows in chunks.
inline Ahead run_matrix_tiles(const PackedLinear& weight, const PackedRows& rows, int first, int end, const uint8_t* panel,
                              float* tiles, Ahead ahead, Matrices& matrices) {
    switch (weight.format) {
        case outrider::kBf16:
            return sum_products<outrider::kBf16>(rows, first, end, panel, (weight.num_inputs + 1) / 2, tiles, ahead, matrices);
        case outrider::kInt8:
            return matrix_int8(weight, rows, first, end, panel, tiles, ahead, matrices);
        default: {
            // With two groups totals of many rows pass through memory half as often; one keeps memory busier meanwhile.
            const auto run = end - first > 1 ? (weight.has_zeros ? matrix_int4<true, 2> : matrix_int4<false, 2>)
                                             : (weight.has_zeros ? matrix_int4<true, 1> : matrix_int4<false, 1>);
            return run(weight, rows, first, end, panel, tiles, ahead, matrices);
        }
    }
}

}  // namespace OUTRIDER_LEVEL
