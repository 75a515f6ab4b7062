// What every level (AVX-512, AVX2, portable) offers: plain structs and functions, so that one binary holds all.
//
// Legend: M rows, N outputs, K inputs of a linear layer; a panel is 32 outputs. Layouts of packed weights and the
// arithmetic are those of kernels/packed.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

// Always, or the linker might keep one level's copy of a function for all of them.
#define OUTRIDER_INLINE inline __attribute__((always_inline))

namespace outrider {

// A line into the first cache, or into the outer ones only. Assembly, because GCC takes functions that only prefetch for
// functions without effect, and removes their calls. With the address in a register: beside a memory operand it also
// keeps the sums of a loop in memory.
OUTRIDER_INLINE void prefetch(const void* p) {
#if defined(OUTRIDER_X86)
    asm volatile("prefetcht0 (%0)" : : "r"(p));
#elif defined(__GNUC__)
    __builtin_prefetch(p);
#endif
}

OUTRIDER_INLINE void prefetch_far(const void* p) {
#if defined(OUTRIDER_X86)
    asm volatile("prefetcht1 (%0)" : : "r"(p));
#elif defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#endif
}

// A line that will be written, so that no other core's copy of it is in the way then.
OUTRIDER_INLINE void prefetch_for_write(const void* p) {
#if defined(OUTRIDER_X86)
    asm volatile("prefetchw (%0)" : : "r"(p));
#elif defined(__GNUC__)
    __builtin_prefetch(p, 1);
#endif
}

__extension__ typedef unsigned __int128 uint128_t;

constexpr int kPanel = 32;
constexpr int64_t kMaximaBlock = 64;  // logits whose maximum a forward may leave beside them
constexpr int kKeySplit = 64;  // keys of one split of a row's own key sequence
constexpr int kPartUnits = 32;  // parts of a packed row begin at its multiples: with whole groups of int4, chunks and lines
constexpr int kTaskRows = 64;  // most rows of an attention task

OUTRIDER_INLINE int64_t num_maxima(int64_t num_logits) { return (num_logits + kMaximaBlock - 1) / kMaximaBlock; }

enum Format : int { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3, kNumFormats = 4 };

struct PackedLinear {
    Format format;
    int64_t num_outputs, num_inputs;
    int group_size;  // int4; 0 otherwise
    bool has_zeros;
    const uint8_t* data;         // [num_panels][panel_bytes]
    const int32_t* input_order;  // [num_inputs] or null
    const float* bias;           // [num_outputs] or null

    OUTRIDER_INLINE int64_t num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
    OUTRIDER_INLINE int64_t num_groups() const { return format == kInt4 ? (num_inputs + group_size - 1) / group_size : 1; }
    OUTRIDER_INLINE int64_t panel_bytes() const {
        switch (format) {
            case kFp32: return num_inputs * kPanel * 4;
            case kBf16: return (num_inputs + 1) / 2 * kPanel * 4;
            case kInt8: return 4 * kPanel + (num_inputs + 3) / 4 * kPanel * 4;
            default: return num_groups() * (2 * kPanel * (has_zeros ? 2 : 1) + group_size / 2 * kPanel);
        }
    }
};

// Who brings weights into the caches before they are needed.
enum class Fetch : int {
    kProcessor,  // its own prefetchers alone
    kFar,        // and we, into the outer caches: what is on its way does not take up the first cache's few places
    kNear,       // and we, into the first cache
};

// How rows are packed for a layer.
struct RowsForm {
    int block_rows;   // most rows of a block
    int chunk_units;  // units of a row that lie together
};

// The M rows of a GEMM's input in the form that its inner loop reads: blocks of at most `block_rows` rows, each
// block [chunk][row of the block][unit of the chunk], a unit being 32 bits of consecutive inputs of one row.
struct PackedRows {
    int num_rows, block_rows, chunk_units;
    int num_parts;       // of a row, each packed by another thread
    Fetch fetch;
    int64_t num_units;   // per row, whole chunks
    int64_t num_groups;  // per row; int8: what the parts' sums are
    uint32_t* units;     // [num_rows * num_units]
    int32_t* sums;       // int8, int4: what each integer sum starts from, per block [group][row]; int8: the sum of all
    float* scales;       // int8, int4: [num_rows]

    OUTRIDER_INLINE int num_blocks() const { return (num_rows + block_rows - 1) / block_rows; }
    // First unit of a part; all but the last end with whole cache lines of a row.
    OUTRIDER_INLINE int64_t part_begin(int part) const {
        const int64_t begin = (num_units + kPartUnits - 1) / kPartUnits * part / num_parts * kPartUnits;
        return begin < num_units ? begin : num_units;
    }
    // Blocks of nearly equal size: the first `num_rows % num_blocks` have one row more.
    OUTRIDER_INLINE int block_start(int block) const {
        const int blocks = num_blocks(), size = num_rows / blocks, extra = num_rows % blocks;
        return block * size + (block < extra ? block : extra);
    }
    OUTRIDER_INLINE int block_of(int row) const {
        const int blocks = num_blocks(), size = num_rows / blocks, extra = num_rows % blocks;
        const int large = extra * (size + 1);
        return row < large ? row / (size + 1) : extra + (row - large) / size;
    }
};

// A row of floats, a panel's at a time; where there are no gaps, kPanel apart.
struct FloatRow {
    const float* data;
    int64_t stride;

    OUTRIDER_INLINE const float* at(int64_t i) const { return data + i / kPanel * stride + i % kPanel; }
};

// What a row's integer sum starts from: the sum of its parts', which stand `stride` apart.
OUTRIDER_INLINE int32_t start_of_sum(const int32_t* sums, int stride, int num_parts) {
    int32_t start = sums[0];
    for (int part = 1; part < num_parts; ++part) start += sums[part * stride];
    return start;
}

// out = y, or out += y, or out = y past the caches: of many outputs that nobody reads soon, whose lines would else be read first.
enum class Epilogue { kStore, kAdd, kStream };

enum class KvType : int { kFp32 = 0, kBf16 = 1, kInt8 = 2 };

// Keys or values of one layer: [slots][heads][width]. An int8 head is followed by its float32 scale.
struct KvCache {
    void* data;
    KvType type;
    int num_heads, width;

    OUTRIDER_INLINE int64_t head_bytes() const {
        return type == KvType::kFp32 ? 4 * width : type == KvType::kBf16 ? 2 * width : width + 4;
    }
    OUTRIDER_INLINE char* head(int64_t slot, int h) const {
        return static_cast<char*>(data) + (slot * num_heads + h) * head_bytes();
    }
};

// Rows [row_begin, row_end) of the batch belong to one sequence. A row attends to the context and to its
// ancestors among these rows; key j of a row stands at position j.
struct SequenceView {
    int row_begin, row_end;
    int64_t num_context;
    const int64_t* slots;    // [num_context + row_end - row_begin]
    const int32_t* parents;  // [row_end - row_begin] of this sequence's rows, -1 at the context; null for a chain
};

struct AttentionArgs {
    const float* query;  // [rows][num_heads * key width]
    float* out;          // [rows][num_heads * value width]
    int64_t query_stride, out_stride;
    int num_heads;
    KvCache keys, values;
    float scaling, softcap;  // softcap 0: none
    int64_t window;          // 0: none
    const float* sinks;      // [num_heads] or null
};

// Some rows of a sequence and some of its key/value heads.
struct AttentionTask {
    int sequence, head_begin, head_end, row_begin, row_end;
};

// The split that holds the first key which any of a task's rows sees.
OUTRIDER_INLINE int64_t first_split(const AttentionArgs& args, const SequenceView* sequences, const AttentionTask& task) {
    const SequenceView& sequence = sequences[task.sequence];
    const int64_t before = sequence.parents == nullptr ? task.row_begin - sequence.row_begin : 0;
    const int64_t oldest = args.window > 0 ? sequence.num_context + before + 1 - args.window : 0;
    return oldest > 0 ? oldest / kKeySplit * kKeySplit : 0;
}

// Reads all lines of the first split's context into the cache. No prefetches: processors drop them in such numbers.
OUTRIDER_INLINE void read_first_split(const AttentionArgs& args, const SequenceView* sequences, const AttentionTask& task) {
    const SequenceView& sequence = sequences[task.sequence];
    const int64_t first = first_split(args, sequences, task), end = first + kKeySplit;
    for (int64_t j = first; j < end && j < sequence.num_context; ++j) {
        for (const KvCache* cache : {&args.keys, &args.values}) {
            const volatile char* data = cache->head(sequence.slots[j], task.head_begin);
            const int64_t bytes = (task.head_end - task.head_begin) * cache->head_bytes();
            for (int64_t i = 0; i < bytes; i += 64) static_cast<void>(data[i]);
        }
    }
}

// The random numbers of sampling/noise.py: Philox4x64-10 (Salmon et al., SC 2011).
struct PhiloxStream {
    uint64_t seed, position, purpose, trial;

    static constexpr uint64_t kFirst = 0xD2E7470EE14C6C93, kSecond = 0xCA5A826395121157;
    static constexpr uint64_t kSeedStep = 0x9E3779B97F4A7C15, kPurposeStep = 0xBB67AE8584CAA73B;
    static constexpr int kRounds = 10;

    // The four words of eight tokens.
    OUTRIDER_INLINE void block(uint64_t index, uint64_t* words) const {
        uint64_t c0 = index + 1, c1 = 0, c2 = position, c3 = trial, k0 = seed, k1 = purpose;
        for (int round = 0; round < kRounds; ++round) {
            const uint128_t first = static_cast<uint128_t>(kFirst) * c0, second = static_cast<uint128_t>(kSecond) * c2;
            c0 = static_cast<uint64_t>(second >> 64) ^ c1 ^ k0;
            c1 = static_cast<uint64_t>(second);
            c2 = static_cast<uint64_t>(first >> 64) ^ c3 ^ k1;
            c3 = static_cast<uint64_t>(first);
            k0 += kSeedStep;
            k1 += kPurposeStep;
        }
        words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
    }
};

// Numbers in the order of floats, and back; of both zeros there is one.
OUTRIDER_INLINE int32_t in_order(float x) {
    const float one_zero = x + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &one_zero, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

OUTRIDER_INLINE float out_of_order(int32_t ordered) {
    const int32_t bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF);
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

struct KernelTable {
    const char* name;
    int unit_inputs[kNumFormats];
    RowsForm (*rows_form)(const PackedLinear& weight, int num_rows);

    // The largest magnitude of x; NaN if there is one.
    float (*largest_magnitude)(const FloatRow& x, int64_t width);
    // Part `part` of row `row` of `rows` from x [K] (order and format of `weight`), whose largest magnitude int8 and int4
    // need. Its units go into `words`, and from there `interleave` brings those of all rows of a block to their places:
    // words [row of the block][unit of the part]. A block of one row has them in place.
    void (*pack_row)(const PackedLinear& weight, const FloatRow& x, float largest, const PackedRows& rows, int row, int part,
                     uint32_t* words);
    void (*interleave)(const PackedRows& rows, int block, int part, const uint32_t* words);
    // Panels [begin, end) of the layer for all rows; `out` is the first row's first output of panel `begin`, from which
    // rows and panels lie at the strides. `then` is what this thread will read next (or null): with the last panel its
    // beginning is fetched. Lines of many rows, each in another place, take up to a tenth of the time of the weights:
    // where all rows of a panel lie together they take none.
    void (*linear)(const PackedLinear& weight, const PackedRows& rows, float* out, int64_t row_stride, int64_t panel_stride,
                   Epilogue epilogue, int64_t begin, int64_t end, const uint8_t* then);
    // Likewise silu(gate) * up of two layers of one format, to [panel][row][kPanel].
    void (*gated_silu)(const PackedLinear& gate, const PackedLinear& up, const PackedRows& gate_rows,
                       const PackedRows& up_rows, float* out, int64_t begin, int64_t end, const uint8_t* then);
    void (*rms_norm)(const FloatRow& x, const float* weight, float eps, float* out, int64_t width);
    // Rotates each of `num_heads` heads of `width` in place; cos and sin [width / 2].
    void (*rotate)(float* heads, int num_heads, int width, const float* cos, const float* sin);
    void (*write_kv)(const float* heads, const KvCache& cache, int64_t slot);
    void (*read_row)(const void* table, KvType type, int64_t row, int64_t width, float* out);
    // Floats that a task needs, of sequences of at most so many rows; `num_row_heads` are its rows times its heads.
    size_t (*attention_scratch)(const AttentionArgs& args, int64_t num_step_rows, int64_t num_row_heads);
    // One task; meanwhile the beginning of the next one (or null) is fetched.
    void (*attention)(const AttentionArgs& args, const SequenceView* sequences, const AttentionTask& task,
                      const AttentionTask* next, float* scratch);
    // The greatest of each of consecutive blocks of `block` floats, a multiple of 16; NaN counts as -inf.
    void (*block_maxima)(const float* x, int64_t num_blocks, int64_t block, float* maxima);
    // The greatest of x; NaN if there is one.
    float (*greatest)(const float* x, int64_t count);
    // The words of Philox blocks [first, first + count): words [count][4].
    void (*philox)(const PhiloxStream& stream, uint64_t first, int64_t count, uint64_t* words);
    // Tokens whose logit / temperature and Gumbel noise may add up to `floor` or more; `halves` are their random numbers.
    // Returns how many there are; their places go into `places`, and of all tokens what they add up to at most into
    // `ceilings`. Both have room for `count` rounded up to a multiple of 16.
    int64_t (*noise_hits)(const float* logits, const uint32_t* halves, int64_t count, float temperature, float floor,
                          float* ceilings, uint16_t* places);
    // What at least `count` of the floats reach, none of which is NaN, and few more do; `ordered` has room for all.
    float (*common_bound)(const float* x, int64_t size, int64_t count, int32_t* ordered);
    // Appends where floats reach a bound above -inf, counted from `first` on, in their order; their number. The size is a
    // multiple of 16.
    int64_t (*places_reaching)(const float* x, int64_t size, float bound, uint32_t first, uint32_t* places);
    // How many keys each one stands behind: the greatest comes first, of equals the first.
    void (*rank_keys)(const int32_t* keys, int64_t size, int32_t* ranks);
    // Something that depends on every byte.
    uint64_t (*read_memory)(const void* data, size_t num_bytes, Fetch fetch);
};

#if defined(OUTRIDER_X86)
#if defined(OUTRIDER_AMX)
extern const KernelTable kAmx;
#endif
extern const KernelTable kAvx512;
extern const KernelTable kAvx2;
#endif
extern const KernelTable kPortable;

}  // namespace outrider
