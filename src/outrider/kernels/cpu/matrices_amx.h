// Tiles of a GEMM on AMX: up to 32 rows by 32 outputs, all sums in the matrix registers. Included after tiles_avx512.h, to
// which few rows of int8 and int4 go: sums of integers are exact, so that both give the same bits. bf16 always comes here,
// for every sum has one order: of 32 inputs the even and the odd ones, these two, and that to the sum so far.
#pragma once

#include <algorithm>
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
constexpr int kStretchInputs = 256;  // of int4: what is unpacked at a time
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

// Nibbles [begin, end) of a group's inputs as bytes [input / 4][32][4]: q - 8, or q where there are zero points. Both are linear
// maps of bits (and a constant): one row of each matrix, the last one first, says which bits make a bit.
template <bool kZeros>
OUTRIDER_INLINE Ahead unpack_inputs(const uint8_t* packed, int begin, int end, uint8_t* bytes, Ahead ahead) {
    const __m512i low = _mm512_set1_epi64(kZeros ? 0x0102040800000000 : 0x0102040808080808);
    const __m512i high = _mm512_set1_epi64(kZeros ? 0x1020408000000000 : 0x1020408080808080);
    constexpr int kFlip = kZeros ? 0 : 0xf8;
    for (int i = begin; i < end; i += 8) {
        ahead.fetch();
        for (int half : {0, 64}) {
            const __m512i both = _mm512_loadu_si512(packed + i * kPanel / 2 + half);
            _mm512_store_si512(bytes + i * kPanel + half, _mm512_gf2p8affine_epi64_epi8(both, low, kFlip));
            _mm512_store_si512(bytes + (i + 4) * kPanel + half, _mm512_gf2p8affine_epi64_epi8(both, high, kFlip));
        }
    }
    return ahead;
}

// A panel of int4, whose groups are unpacked a stretch at a time: in pieces, two a group, that are done one by one while the
// stretch before is multiplied.
template <bool kZeros, int kGroup>
class Int4Panel {
public:
    static constexpr int kGroupWords = kGroup / 4;
    static constexpr int kGroups = kStretchInputs / kGroup;  // of a stretch

    Int4Panel(const uint8_t* panel, int64_t num_groups) : panel_(panel), num_groups_(num_groups) {}

    int num_groups(int stretch) const {  // none or fewer behind the last stretch
        return static_cast<int>(std::min<int64_t>(kGroups, num_groups_ - stretch * int64_t{kGroups}));
    }
    const uint16_t* scales(int64_t group) const { return reinterpret_cast<const uint16_t*>(packed(group)); }
    // Of a group of a stretch: [word][32][4]. There is room for two stretches, an even and an odd one.
    uint8_t* bytes(int stretch, int i) { return bytes_[stretch % 2] + i * kGroup * kPanel; }
    // Room for what is multiplied of an even and of an odd group: [half of the outputs][row][16].
    int32_t* products(int i) { return products_[i % 2]; }

    OUTRIDER_INLINE Ahead unpack_piece(int stretch, int piece, Ahead ahead) {
        const int64_t group = stretch * int64_t{kGroups} + piece / 2;
        if (group >= num_groups_) return ahead;
        for (int i = 0; i < kHead && piece % 2 == 0; i += 64) ahead.fetch_line();
        const int start = piece % 2 * kGroup / 2;
        return unpack_inputs<kZeros>(packed(group) + kHead, start, start + kGroup / 2, bytes(stretch, piece / 2), ahead);
    }

private:
    static constexpr int kHead = (kZeros ? 4 : 2) * kPanel;

    const uint8_t* packed(int64_t group) const { return panel_ + group * (kHead + kGroup / 2 * kPanel); }

    const uint8_t* panel_;
    int64_t num_groups_;
    alignas(64) uint8_t bytes_[2][kStretchInputs * kPanel];
    alignas(64) int32_t products_[2][2 * kMatrixRows * kMatrixWords];
};

// Up to 16 rows, of a block that has `stride` of them.
struct Int4Rows {
    const uint32_t* x;
    const int32_t* sums;  // of each group
    int num_rows, stride;
};

// products [row][16] = a group of the rows by 16 outputs
template <int kGroupWords, int kSums, int kRows, int kWeights>
OUTRIDER_INLINE void multiply_group(const Int4Rows& rows, const uint32_t* x, const uint8_t* weights, int32_t* products) {
    constexpr int kWords = std::min(kGroupWords, kMatrixWords);
    clear_matrix<kSums>();
    for (int word = 0; word < kGroupWords; word += kWords, x += rows.stride * kWords) {
        check_lines(x, 4 * kWords, rows.num_rows, 4 * kWords);
        check_lines(weights + word * 4 * kPanel, 4 * kPanel, kWords, 4 * kMatrixWords);
        load_matrix<kWeights>(weights + word * 4 * kPanel, 4 * kPanel);
        load_matrix<kRows>(x, 4 * kWords);
        multiply<outrider::kInt4, kSums, kRows, kWeights>();
    }
    check_lines(products, 4 * kMatrixWords, rows.num_rows, 4 * kMatrixWords);
    store_matrix<kSums>(products, 4 * kMatrixWords);
}

// total [row] += a group's products [row][16] by its scales
template <bool kZeros, int kMost>
OUTRIDER_INLINE void add_group(const int32_t* products, const uint16_t* scales, const int32_t* sums, int num_rows, vf (&total)[kMost]) {
    const vf scale = load_f16(scales), zero = kZeros ? load_f16(scales + kPanel) : splat(0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < kMost; ++r) {
        vf sum = _mm512_cvtepi32_ps(_mm512_load_si512(products + r * kMatrixWords));
        if constexpr (kZeros)  // integers below 2^24: exact
            sum = fma(splat(static_cast<float>(sums[r < num_rows ? r : 0])), zero, sum);
        total[r] = fma(sum, scale, total[r]);
    }
}

// totals [row][32] += a stretch by kHalves times 16 outputs from `c`. They stay in registers meanwhile. There are at most kMost
// rows; for those that are missing whatever lies there is added up and not stored. kSecond says which of a block's registers the
// rows have.
template <int kMost, int kHalves, bool kSecond, bool kZeros, int kGroup>
OUTRIDER_INLINE Ahead add_int4(const Int4Rows& rows, Int4Panel<kZeros, kGroup>& panel, int stretch, int c, bool unpacks,
                               float* totals, Ahead ahead) {
    static_assert(W == kMatrixWords && kHalves * kMost <= 16);
    constexpr int kSums = kSecond ? 2 : 0, kRows = kSecond ? 5 : 4, kProducts = kMatrixRows * kMatrixWords;
    constexpr int kGroups = Int4Panel<kZeros, kGroup>::kGroups, kWords = Int4Panel<kZeros, kGroup>::kGroupWords;
    const int64_t first = stretch * int64_t{kGroups};
    const int count = panel.num_groups(stretch);
    const uint32_t* x = rows.x + first * kWords * rows.stride;
    vf total[kHalves][kMost];
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h)
#pragma GCC unroll 16
        for (int r = 0; r < kMost; ++r)
            total[h][r] = stretch > 0 && r < rows.num_rows ? load(totals + r * kPanel + c + h * W) : splat(0.0f);
    const auto add = [&](int i) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h)
            add_group<kZeros, kMost>(panel.products(i) + h * kProducts, panel.scales(first + i) + c + h * W,
                                     rows.sums + (first + i) * rows.stride, rows.num_rows, total[h]);
    };
    for (int i = 0; i < count; ++i, x += kWords * rows.stride) {  // a group's products are added up while the next one is multiplied
        multiply_group<kWords, kSums, kRows, 6>(rows, x, panel.bytes(stretch, i) + 4 * c, panel.products(i));
        if (unpacks) ahead = panel.unpack_piece(stretch + 1, kHalves * i + c / W * kGroups, ahead);
        if constexpr (kHalves == 2) {
            multiply_group<kWords, kSums + 1, kRows, 7>(rows, x, panel.bytes(stretch, i) + 4 * W, panel.products(i) + kProducts);
            if (unpacks) ahead = panel.unpack_piece(stretch + 1, 2 * i + 1, ahead);
        }
        if (i > 0) add(i - 1);
    }
    add(count - 1);
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h)
#pragma GCC unroll 16
        for (int r = 0; r < kMost; ++r)
            if (r < rows.num_rows) store(totals + r * kPanel + c + h * W, total[h][r]);
    return ahead;
}

template <bool kZeros, int kGroup>
Ahead matrix_int4(const PackedRows& rows, int first, int end, const uint8_t* data, float* totals, Ahead ahead, Matrices& matrices) {
    Int4Panel<kZeros, kGroup> panel(data, rows.num_groups);
    for (int piece = 0; piece < 2 * panel.kGroups; ++piece) ahead = panel.unpack_piece(0, piece, ahead);
    for (int stretch = 0; panel.num_groups(stretch) > 0; ++stretch) {
        for (int block = first; block < end; ++block) {
            const MatrixBlock own(rows, first, block);
            matrices.shape(own.num_rows, rows.chunk_units);
            for (int start = 0; start < own.num_rows; start += kMatrixRows) {
                const Int4Rows some = {rows.units + own.start * rows.num_units + start * rows.chunk_units,
                                       rows.sums + own.start * rows.num_groups + start,
                                       std::min(own.num_rows - start, kMatrixRows), own.num_rows};
                const bool unpacks = block == first && start == 0;  // what comes next
                float* const to = totals + (own.before + start) * kPanel;
                const auto add = [&](auto second) __attribute__((always_inline)) {
                    constexpr bool kSecond = decltype(second)::value;
                    if (some.num_rows <= 8) {
                        ahead = add_int4<8, 2, kSecond>(some, panel, stretch, 0, unpacks, to, ahead);
                        return;
                    }
                    for (int c = 0; c < kPanel; c += W) ahead = add_int4<16, 1, kSecond>(some, panel, stretch, c, unpacks, to, ahead);
                };
                if (start > 0) add(std::true_type{});
                else add(std::false_type{});
            }
        }
    }
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
            const auto run = [&](auto zeros) {
                constexpr bool kZeros = decltype(zeros)::value;
                switch (weight.group_size) {
                    case 32: return matrix_int4<kZeros, 32>(rows, first, end, panel, tiles, ahead, matrices);
                    case 64: return matrix_int4<kZeros, 64>(rows, first, end, panel, tiles, ahead, matrices);
                    default: return matrix_int4<kZeros, 128>(rows, first, end, panel, tiles, ahead, matrices);
                }
            };
            return weight.has_zeros ? run(std::true_type{}) : run(std::false_type{});
        }
    }
}

}  // namespace OUTRIDER_LEVEL
