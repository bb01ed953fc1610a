// Packed attention: causal, block-diagonal (documents side by side), grouped-query, with an optional sliding window;
// forward and backward. The scheme is FlashAttention-2's (Dao 2023, arXiv 2307.08691): tiles of scores that never leave
// the cache, an online softmax, and scores recomputed in backward from the logsumexp.
//
// Score tiles are held transposed, [key][query], so that a vector's lanes are queries: maximum, sum, logsumexp and
// delta are then lane by lane, without any reduction across lanes. Every product of a tile has the form
//     c[row][lane] += sum_i a[row][i] * b[i][lane]
// with `a` broadcast and `b` loaded, over 32-bit "words": one fp32, or two bf16 that are neighbours along the summed
// dimension (what vdpbf16ps multiplies). One micro-kernel, `multiply`, serves all seven:
//     forward    S = K Qt         Ot += Vt P
//     backward   S = K Qt         dP = V dOt      dV += P dO      dK += dS Q      dQt += Kt dS
// On the diagonal only the lanes that see a key are computed, at the grain of one vector.
//
// Tasks write disjoint results and each sums in a fixed order, so results do not depend on the number of threads.
// Forward: (document, key head, tile of queries). Backward: (document, key head), which owns dk and dv of that head and
// dq of its query heads; costly documents are split by ranges of queries, whose dk and dv are then summed in order.
//
// Left out: dropout, attention biases, queries that are not also keys (decoding has its own kernel).
#include "attention.h"

#include <cstdlib>
#include <cstring>

#include "dispatch.h"
#include "threads.h"
#include "vec.h"

namespace nybble::NYBBLE_ISA {

constexpr int kTile = 64;                      // queries and keys of a tile
constexpr int kGroups = kTile / kLanes;        // vectors across a tile's queries
constexpr int kStep = 8;                       // rows of `a` are padded to a multiple of this
constexpr int kHeadsTogether = 4;              // query heads that share a packed tile of keys in forward
constexpr int kTasks = 8;                      // backward splits documents whose tasks exceed 1 / kTasks of the work
constexpr float kMasked = -0x1p100f;           // vanishes in the softmax, is finite, and stays exact when scaled
constexpr float kLog2E = 1.44269504f;
#if defined(__AVX512F__)
constexpr int kWide = 4;  // vectors of `b` that `multiply` takes at once
#elif defined(__AVX2__)
constexpr int kWide = 2;
#else
constexpr int kWide = 1;
#endif

template <int N>
struct Int {
    static constexpr int value = N;
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int smaller(int a, int b) { return a < b ? a : b; }
inline int larger(int a, int b) { return a > b ? a : b; }

// ---- words ----------------------------------------------------------------------------------------------------------

// Buffers of words are float*, whatever the words hold; words are only copied, never used as numbers by themselves.
inline F32 broadcast(const float* word) {
    int32_t bits;
    memcpy(&bits, word, 4);
    return (F32)(I32{} + bits);
}

struct F32Words {
    using Element = float;
    static constexpr int kPack = 1;  // elements of a word
    static F32 dot(F32 a, F32 b, F32 sum) { return fma(a, b, sum); }
    static F32 join(F32 even, F32) { return even; }
};

#if defined(__AVX512BF16__)
struct BF16Words {
    using Element = bf16;
    static constexpr int kPack = 2;
    static F32 dot(F32 a, F32 b, F32 sum) { return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
    // Words of which `even` becomes the first element and `odd` the second.
    static F32 join(F32 even, F32 odd) {
        const __m512i order = (__m512i)(U16x32{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
        return (F32)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
    }
    typedef uint16_t U16x32 __attribute__((vector_size(64)));
};
#endif

// e^x for x not much above 0, cheaper than `exp`; 0 below -87; NaN for NaN. 2^(x log2 e) = 2^n 2^f with |f| <= 1/2; the
// polynomial is the minimax one of degree 5 for the relative error there, 1.4e-7 with fp32 roundings.
inline F32 exp_below_0(F32 x) {
#if defined(__AVX512F__)
    const F32 power = x * kLog2E;
    const F32 n = (F32)_mm512_roundscale_ps((__m512)power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const F32 power = max(splat(-126.0f), x * kLog2E);
    const F32 shifted = power + round;
    const F32 n = shifted - round;
#endif
    const F32 f = power - n;
    F32 p = splat(0.00132764713f);
    p = fma(p, f, splat(0.00967554189f));
    p = fma(p, f, splat(0.0555071309f));
    p = fma(p, f, splat(0.240221202f));
    p = fma(p, f, splat(0.693146944f));
    p = fma(p, f, splat(1.00000012f));
#if defined(__AVX512F__)
    return (F32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return power > -126.0f ? p * (F32)(((I32)shifted + 127) << 23) : (power == power ? F32{} : power);
#endif
}

// ---- the micro-kernel -----------------------------------------------------------------------------------------------

// c[m][n] += sum_i a[m][i] * b[i][n]: rows m of words `lda` apart, vectors n of words in rows `ldb` apart.
template <class W, int M, int N>
inline __attribute__((always_inline)) void multiply(F32 (&c)[M][N], const float* a, int64_t lda, const float* b,
                                                    int64_t ldb, int count) {
    for (int i = 0; i < count; ++i) {
        F32 vectors[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) vectors[n] = load(b + i * ldb + n * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const F32 word = broadcast(a + m * lda + i);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) c[m][n] = W::dot(word, vectors[n], c[m][n]);
        }
    }
}

// Rows at a time, so that M x N sums and N vectors stay in registers.
template <int N>
constexpr int rows_at_once() { return N > 2 || kWide == 1 ? 4 : 8 / (kWide == 2 ? N : 1); }

// f(Int<n>{}, first) over the vectors [first, end), n of them at a time, n as large as kWide allows.
template <class F>
inline __attribute__((always_inline)) void by_width(int first, int end, F f) {
    for (; end - first >= kWide; first += kWide) f(Int<kWide>{}, first);
    if constexpr (kWide == 4) {
        switch (end - first) {
            case 3: return f(Int<3>{}, first);
            case 2: return f(Int<2>{}, first);
        }
    }
    if (kWide > 1 && end > first) f(Int<1>{}, first);
}

// c[row][lane] += sum_i a[row][i] * b[i][lane] in memory, `rows` a multiple of kStep, the vectors [first, end).
// With kScaled, c[row][lane] is first multiplied by factor[lane].
template <class W, bool kScaled = false>
void accumulate(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int rows, int first,
                int end, int count, const float* factor = nullptr) {
    by_width(first, end, [&](auto width, int g) __attribute__((always_inline)) {
        constexpr int N = decltype(width)::value, M = rows_at_once<N>();
        for (int row = 0; row < rows; row += M) {
            F32 sum[M][N];
            float* to = c + row * ldc + g * kLanes;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) {
                    sum[m][n] = load(to + m * ldc + n * kLanes);
                    if constexpr (kScaled) sum[m][n] *= load(factor + (g + n) * kLanes);
                }
            multiply<W>(sum, a + row * lda, lda, b + g * kLanes, ldb, count);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) store(to + m * ldc + n * kLanes, sum[m][n]);
        }
    });
}

// ---- layouts --------------------------------------------------------------------------------------------------------

// to[column][row] = from[row][column], words; a block of kLanes x kLanes.
inline void transpose_block(float* to, int64_t ldt, const float* from, int64_t ldf) {
#if defined(__AVX512F__)
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * ldf);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // r[i + j]: column j of rows i to i + 3, in each 128-bit quarter
        r[i] = (__m512)_mm512_unpacklo_pd((__m512d)t[i], (__m512d)t[i + 2]);
        r[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i], (__m512d)t[i + 2]);
        r[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
        r[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // quarters q of the rows' vectors: columns 4 q + j
        const __m512 low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
        const __m512 low_odd = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
        const __m512 high = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        const __m512 high_odd = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_ps(to + j * ldt, _mm512_shuffle_f32x4(low, high, 0x88));
        _mm512_storeu_ps(to + (4 + j) * ldt, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
        _mm512_storeu_ps(to + (8 + j) * ldt, _mm512_shuffle_f32x4(low, high, 0xdd));
        _mm512_storeu_ps(to + (12 + j) * ldt, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
    }
#elif defined(__AVX2__)
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * ldf);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = (__m256)_mm256_unpacklo_pd((__m256d)t[i], (__m256d)t[i + 2]);
        r[i + 1] = (__m256)_mm256_unpackhi_pd((__m256d)t[i], (__m256d)t[i + 2]);
        r[i + 2] = (__m256)_mm256_unpacklo_pd((__m256d)t[i + 1], (__m256d)t[i + 3]);
        r[i + 3] = (__m256)_mm256_unpackhi_pd((__m256d)t[i + 1], (__m256d)t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        _mm256_storeu_ps(to + j * ldt, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
        _mm256_storeu_ps(to + (4 + j) * ldt, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
    }
#else
    for (int column = 0; column < kLanes; ++column)
        for (int row = 0; row < kLanes; ++row) memcpy(to + column * ldt + row, from + row * ldf + column, 4);
#endif
}

// to[column][row] = from[row][column], words; both sizes multiples of kLanes.
inline void transpose(float* to, int64_t ldt, const float* from, int64_t ldf, int rows, int columns) {
    for (int row = 0; row < rows; row += kLanes)
        for (int column = 0; column < columns; column += kLanes)
            transpose_block(to + column * ldt + row, ldt, from + row * ldf + column, ldf);
}

// Copies one head's part of a row, converted; zeros up to `padded`.
template <typename From, typename To>
inline void copy_row(To* to, const From* from, int dim, int padded) {
    int i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(to + i, load(from + i));
    if (i < dim) store(to + i, load(from + i, dim - i), smaller(kLanes, padded - i)), i += kLanes;
    for (; i < padded; i += kLanes) store(to + i, F32{});
}
template <typename T>
inline void copy_row(T* to, const T* from, int dim, int padded) {  // bit for bit
    constexpr int kWhole = sizeof(F32) / sizeof(T);
    int i = 0;
    for (; i + kWhole <= dim; i += kWhole) store((float*)(to + i), load((const float*)(from + i)));
    if (i < padded) {
        memcpy(to + i, from + i, size_t(dim - i) * sizeof(T));
        memset(to + dim, 0, size_t(padded - dim) * sizeof(T));
    }
}

// Sizes that all layouts of one problem share.
template <class W>
struct Layout {
    int dim, padded, words;  // head_dim; the same, padded to whole vectors of words; words of a padded row
    int summed;              // words of a row that are not padding
    int64_t row_tile;        // words of a tile of rows, in any of the layouts below

    explicit Layout(int64_t head_dim)
        : dim(int(head_dim)),
          padded(int(round_up(head_dim, kLanes * W::kPack))),
          words(padded / W::kPack),
          summed(int(head_dim + W::kPack - 1) / W::kPack),
          row_tile(int64_t(kTile) * words) {}

    // [kTile][words]: rows as they are; those from `count` on are zero.
    template <typename T>
    void rows(float* to, const T* from, int64_t stride, int count) const {
        auto* elements = (typename W::Element*)to;
        for (int row = 0; row < count; ++row) copy_row(elements + row * padded, from + row * stride, dim, padded);
        memset(elements + count * padded, 0, size_t(kTile - count) * padded * sizeof(*elements));
    }

    // [words][kTile] from [kTile][words]: lanes are rows, summed over the head dimension.
    void lanes(float* to, const float* rows) const { transpose(to, kTile, rows, words, kTile, words); }

    // [kTile / kPack][padded]: lanes are the head dimension, summed over rows. Returns `rows` itself where that is it.
    const float* paired(float* to, const float* rows) const {
        if constexpr (W::kPack == 1) {
            return rows;
        } else {
#if defined(__AVX512BF16__)
            const auto widened = [&](int row, int i) {  // one element a word, in its lower half
                const bf16* from = (const bf16*)rows + row * padded + i;
                return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
            };
            for (int row = 0; row < kTile; row += 2)
                for (int i = 0; i < padded; i += kLanes) {
                    const __m512i odd = _mm512_slli_epi32(widened(row + 1, i), 16);
                    store(to + row / 2 * padded + i, (F32)_mm512_or_si512(widened(row, i), odd));
                }
#endif
            return to;
        }
    }

    // [padded][kTile / kPack]: rows are the head dimension, summed over (the tile's) rows.
    void columns(float* to, float* scratch, const float* rows) const {
        const float* pairs = paired(scratch, rows);
        transpose(to, kTile / W::kPack, pairs, padded, kTile / W::kPack, padded);
    }

    // to[row] = sum_i a[row][i] * b[row][i], from tiles of rows.
    void row_products(float* to, const float* a, const float* b, float* scratch) const {
        for (int row = 0; row < kTile; row += kLanes) {
            for (int i = 0; i < kLanes; ++i) {
                F32 sum = {};
                for (int j = 0; j < words; j += kLanes)
                    sum = W::dot(load(a + (row + i) * words + j), load(b + (row + i) * words + j), sum);
                store(scratch + i * kLanes, sum);
            }
            transpose_block(scratch + kLanes * kLanes, kLanes, scratch, kLanes);
            F32 total = {};
            for (int i = 0; i < kLanes; ++i) total += load(scratch + (kLanes + i) * kLanes);
            store(to + row, total);
        }
    }

    // Rows of the result from sums [padded][kTile] whose lanes are rows, each lane times its factor.
    template <typename T>
    void store_lanes(T* to, int64_t stride, int rows, float* sums, const float* factor, float* scratch) const {
        for (int i = 0; i < padded; i += W::kPack)
            for (int g = 0; g < kTile; g += kLanes) {
                const F32 f = load(factor + g);
                const F32 even = load(sums + i * kTile + g) * f;
                const F32 odd = W::kPack == 2 ? load(sums + (i + 1) * kTile + g) * f : F32{};
                store(sums + i / W::kPack * kTile + g, W::join(even, odd));
            }
        transpose(scratch, words, sums, kTile, words, kTile);
        const auto* elements = (const typename W::Element*)scratch;
        for (int row = 0; row < rows; ++row) copy_row(to + row * stride, elements + row * padded, dim, dim);
    }
};

// ---- documents, tiles and masks -------------------------------------------------------------------------------------

inline int num_tiles(int length) { return (length + kTile - 1) / kTile; }

// The first tile of keys that some query of tile `tile` sees.
inline int first_key_tile(int tile, int64_t window) {
    const int64_t first = window ? int64_t(tile) * kTile - window + 1 : 0;
    return first > 0 ? int(first / kTile) : 0;
}

// Which scores of a tile of keys count. Positions are relative to the document.
struct Mask {
    int first_query, first_key, window;  // window: INT32_MAX / 2 when there is none
    bool diagonal, partial;              // the tile of keys is that of the queries; some of its scores are masked

    Mask(int query_tile, int key_tile, int64_t window_or_0)
        : first_query(query_tile * kTile),
          first_key(key_tile * kTile),
          window(window_or_0 && window_or_0 < INT32_MAX / 2 ? int(window_or_0) : INT32_MAX / 2),
          diagonal(query_tile == key_tile),
          partial(diagonal || first_query + kTile - first_key > window) {}

    // Vectors of queries before this one see no key of the kStep keys from `key` on.
    int first_group(int key) const { return diagonal ? key / kLanes : 0; }

    // Queries of vector `group` see no key of the tile from this one on; `keys` in all.
    int end_key(int group, int keys) const { return diagonal ? smaller(keys, (group + 1) * kLanes) : keys; }

    F32 apply(F32 score, int key, int group) const {
        I32 query;
        for (int i = 0; i < kLanes; ++i) query[i] = i;
        const I32 distance = query + (first_query + group * kLanes - first_key - key);
        return (distance >= 0) & (distance < window) ? score : splat(kMasked);
    }
};

// ---- scratch --------------------------------------------------------------------------------------------------------

// Hands out consecutive 64-byte aligned pieces; with base == nullptr it only counts.
struct Scratch {
    char* base;
    size_t used = 0;

    template <typename T>
    T* take(int64_t count) {
        T* piece = base ? (T*)(base + used) : nullptr;
        used += size_t(round_up(count * int64_t(sizeof(T)), 64));
        return piece;
    }
};

// ---- forward --------------------------------------------------------------------------------------------------------

struct ForwardTask {
    int start, length, tile, head, num_heads, kv_head;  // `num_heads` query heads from `head` on, all of `kv_head`
};

template <class W>
struct ForwardScratch {
    float *rows, *pairs;                       // a tile of rows, and a layout on the way to another
    float *k, *v_columns;                      // the tile of keys and values
    float *q_lanes, *out;                      // per head: queries, sums of the output
    float *maximum, *sum;                      // per head and query
    float *scores, *weights, *tile_maximum, *factor;

    ForwardScratch(Scratch& s, const Layout<W>& layout) {
        rows = s.take<float>(layout.row_tile);
        pairs = s.take<float>(layout.row_tile);
        k = s.take<float>(layout.row_tile);
        v_columns = s.take<float>(layout.row_tile);
        q_lanes = s.take<float>(kHeadsTogether * layout.row_tile);
        out = s.take<float>(kHeadsTogether * layout.padded * kTile);
        maximum = s.take<float>(kHeadsTogether * kTile);
        sum = s.take<float>(kHeadsTogether * kTile);
        scores = s.take<float>(kTile * kTile);
        weights = s.take<float>(kTile * kTile / W::kPack);
        tile_maximum = s.take<float>(kTile);
        factor = s.take<float>(kTile);
    }
};

// scores[key][query], masked, and their maximum by query.
template <class W>
void score_tile(ForwardScratch<W>& s, const float* q_lanes, const Layout<W>& layout, const Mask& mask, int keys,
                int groups) {
    for (int i = 0; i < kTile; i += kLanes) store(s.tile_maximum + i, splat(kMasked));
    for (int key = 0; key < keys; key += kStep)
        by_width(mask.first_group(key), groups, [&](auto width, int g) __attribute__((always_inline)) {
            constexpr int N = decltype(width)::value, M = rows_at_once<N>();
            for (int row = key; row < key + kStep; row += M) {
                F32 sum[M][N] = {};
                multiply<W>(sum, s.k + row * layout.words, layout.words, q_lanes + g * kLanes, kTile, layout.summed);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) {
                    F32 best = load(s.tile_maximum + (g + n) * kLanes);
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        if (mask.partial) sum[m][n] = mask.apply(sum[m][n], row + m, g + n);
                        best = max(best, sum[m][n]);
                        store(s.scores + (row + m) * kTile + (g + n) * kLanes, sum[m][n]);
                    }
                    store(s.tile_maximum + (g + n) * kLanes, best);
                }
            }
        });
}

// One step of the online softmax: scores become weights, `sum` is scaled to the new maximum; so is `out`, by `factor`,
// when it is next added to.
template <class W>
void softmax_tile(ForwardScratch<W>& s, float* maximum, float* sum, const Mask& mask, int keys, int groups,
                  float scale) {
    for (int g = 0; g < groups; ++g) {
        const int lane = g * kLanes;
        const F32 before = load(maximum + lane), now = max(before, load(s.tile_maximum + lane) * scale);
        const F32 factor = exp_below_0(before - now);
        F32 even = load(sum + lane) * factor, odd = {};
        const int end = mask.end_key(g, keys);
        for (int key = 0; key < end; key += 2) {
            const F32 a = exp_below_0(fma(load(s.scores + key * kTile + lane), splat(scale), -now));
            const F32 b = exp_below_0(fma(load(s.scores + (key + 1) * kTile + lane), splat(scale), -now));
            even += a;
            odd += b;
            if constexpr (W::kPack == 2) {
                store(s.weights + key / 2 * kTile + lane, W::join(a, b));
            } else {
                store(s.weights + key * kTile + lane, a);
                store(s.weights + (key + 1) * kTile + lane, b);
            }
        }
        store(sum + lane, even + odd);
        store(maximum + lane, now);
        store(s.factor + lane, factor);
    }
}

template <class W, typename T>
void forward_task(const NybbleAttention& p, const ForwardTask& task, const Layout<W>& layout, ForwardScratch<W>& s) {
    const int64_t first_row = task.start + int64_t(task.tile) * kTile;
    const int rows = smaller(kTile, task.length - task.tile * kTile), groups = (rows + kLanes - 1) / kLanes;
    const float scale = p.scale;
    const int64_t out_tile = int64_t(layout.padded) * kTile;

    const T* q_rows = (const T*)p.q + first_row * p.q_stride + task.head * layout.dim;
    const T* k_rows = (const T*)p.k + task.start * p.k_stride + task.kv_head * layout.dim;
    const T* v_rows = (const T*)p.v + task.start * p.v_stride + task.kv_head * layout.dim;
    for (int h = 0; h < task.num_heads; ++h) {
        layout.rows(s.rows, q_rows + h * layout.dim, p.q_stride, rows);
        layout.lanes(s.q_lanes + h * layout.row_tile, s.rows);
    }
    memset(s.out, 0, size_t(task.num_heads * out_tile) * sizeof(float));
    memset(s.sum, 0, size_t(task.num_heads * kTile) * sizeof(float));
    for (int i = 0; i < task.num_heads * kTile; ++i) s.maximum[i] = kMasked;

    for (int key_tile = first_key_tile(task.tile, p.window); key_tile <= task.tile; ++key_tile) {
        const Mask mask(task.tile, key_tile, p.window);
        const int valid = smaller(kTile, task.length - key_tile * kTile), keys = int(round_up(valid, kStep));
        layout.rows(s.rows, v_rows + key_tile * kTile * p.v_stride, p.v_stride, valid);
        layout.columns(s.v_columns, s.pairs, s.rows);
        layout.rows(s.k, k_rows + key_tile * kTile * p.k_stride, p.k_stride, valid);
        for (int h = 0; h < task.num_heads; ++h) {
            float* out = s.out + h * out_tile;
            score_tile(s, s.q_lanes + h * layout.row_tile, layout, mask, keys, groups);
            softmax_tile(s, s.maximum + h * kTile, s.sum + h * kTile, mask, keys, groups, scale);
            for (int g = 0; g < groups; g = mask.diagonal ? g + 1 : groups)
                accumulate<W, true>(out, kTile, s.v_columns, kTile / W::kPack, s.weights, kTile, layout.padded, g,
                                    mask.diagonal ? g + 1 : groups, mask.end_key(g, keys) / W::kPack, s.factor);
        }
    }

    for (int h = 0; h < task.num_heads; ++h) {
        const float *sum = s.sum + h * kTile, *maximum = s.maximum + h * kTile;
        for (int i = 0; i < kTile; ++i) s.factor[i] = 1.0f / sum[i];
        T* out = (T*)p.out + first_row * p.out_stride + (task.head + h) * layout.dim;
        layout.store_lanes(out, p.out_stride, rows, s.out + h * out_tile, s.factor, s.rows);
        float* lse = p.lse + (task.head + h) * p.num_tokens + first_row;
        for (int i = 0; i < rows; ++i) lse[i] = maximum[i] + __builtin_logf(sum[i]);
    }
}

template <class W, typename T>
void forward(NybbleAttention& p) {
    const Layout<W> layout(p.head_dim);
    const int group_size = int(p.num_heads / p.num_kv_heads);
    const int parts = (group_size + kHeadsTogether - 1) / kHeadsTogether;  // of a group of query heads
    int64_t tiles = 0, most_tiles = 0;
    for (int doc = 0; doc < p.num_docs; ++doc) {
        const int n = num_tiles(p.cu_seqlens[doc + 1] - p.cu_seqlens[doc]);
        tiles += n;
        most_tiles = n > most_tiles ? n : most_tiles;
    }
    const int64_t num_tasks = tiles * p.num_kv_heads * parts;

    Scratch count{nullptr};
    ForwardScratch<W>(count, layout);
    const size_t per_thread = count.used;
    char* memory = (char*)allocate_scratch(per_thread * max_threads() + size_t(num_tasks) * sizeof(ForwardTask));
    if (!memory) return;
    ForwardTask* tasks = (ForwardTask*)(memory + per_thread * max_threads());

    int64_t n = 0;
    // Key head by key head, so that its keys stay in the cache; within one the costliest first, so that threads end at
    // about the same time.
    for (int kv_head = 0; kv_head < p.num_kv_heads; ++kv_head)
        for (int tile = int(most_tiles) - 1; tile >= 0; --tile)
            for (int doc = 0; doc < p.num_docs; ++doc) {
                const int start = p.cu_seqlens[doc], length = p.cu_seqlens[doc + 1] - start;
                if (tile >= num_tiles(length)) continue;
                for (int head = 0; head < group_size; head += kHeadsTogether)
                    tasks[n++] = {start, length, tile, kv_head * group_size + head,
                                  smaller(kHeadsTogether, group_size - head), kv_head};
            }

#pragma omp parallel
    {
        Scratch pieces{memory + per_thread * thread_index()};
        ForwardScratch<W> scratch(pieces, layout);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_tasks; ++i) forward_task<W, T>(p, tasks[i], layout, scratch);
    }
    free(memory);
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct BackwardTask {
    int start, length, first_tile, end_tile, kv_head;  // tiles of queries
    int64_t partial;  // where its dk and dv go, in floats into the partial sums; -1: they are the result
};

template <class W>
struct BackwardScratch {
    float *rows, *pairs;                                    // a tile of rows, and a layout on the way to another
    float *k, *v, *k_columns;                               // every tile of keys and values of the document
    float *dk, *dv;                                         // [length, padded]
    float *q_rows, *q_pairs, *q_lanes, *dout_rows, *dout_pairs, *dout_lanes;
    float *dq;                                              // [padded][kTile]
    float *lse, *delta, *factor;                            // by query
    float *weights, *dscores, *dscores_paired;              // P and dS: [key][query words], and [key words][query]

    BackwardScratch(Scratch& s, const Layout<W>& layout, int64_t most_tiles) {
        rows = s.take<float>(layout.row_tile);
        pairs = s.take<float>(layout.row_tile);
        k = s.take<float>(most_tiles * layout.row_tile);
        v = s.take<float>(most_tiles * layout.row_tile);
        k_columns = s.take<float>(most_tiles * layout.row_tile);
        dk = s.take<float>(most_tiles * kTile * layout.padded);
        dv = s.take<float>(most_tiles * kTile * layout.padded);
        q_rows = s.take<float>(layout.row_tile);
        q_pairs = s.take<float>(layout.row_tile);
        q_lanes = s.take<float>(layout.row_tile);
        dout_rows = s.take<float>(layout.row_tile);
        dout_pairs = s.take<float>(layout.row_tile);
        dout_lanes = s.take<float>(layout.row_tile);
        dq = s.take<float>(layout.padded * kTile);
        lse = s.take<float>(kTile);
        delta = s.take<float>(kTile);
        factor = s.take<float>(kTile);
        weights = s.take<float>(kTile * kTile / W::kPack);
        dscores = s.take<float>(kTile * kTile / W::kPack);
        dscores_paired = W::kPack == 1 ? dscores : s.take<float>(kTile * kTile / W::kPack);
    }
};

// P and dS of one tile; the vectors of queries that see no key of a row are left unwritten.
template <class W>
void dscore_tile(BackwardScratch<W>& s, const float* k, const float* v, const Layout<W>& layout, const Mask& mask,
                 int keys, int groups, float scale) {
    auto *weights = (typename W::Element*)s.weights, *dscores = (typename W::Element*)s.dscores;
    for (int key = 0; key < keys; key += kStep)
        by_width(mask.first_group(key), groups, [&](auto width, int g) __attribute__((always_inline)) {
            constexpr int N = decltype(width)::value, M = rows_at_once<N>();
            for (int row = key; row < key + kStep; row += M) {
                F32 weight[M][N] = {}, dweight[M][N] = {};
                multiply<W>(weight, k + row * layout.words, layout.words, s.q_lanes + g * kLanes, kTile, layout.summed);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        const int lane = (g + n) * kLanes;
                        if (mask.partial) weight[m][n] = mask.apply(weight[m][n], row + m, g + n);
                        weight[m][n] = exp_below_0(fma(weight[m][n], splat(scale), -load(s.lse + lane)));
                        store(weights + (row + m) * kTile + lane, weight[m][n]);
                    }
                multiply<W>(dweight, v + row * layout.words, layout.words, s.dout_lanes + g * kLanes, kTile,
                            layout.summed);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
                    for (int m = 0; m < M; m += 2) {
                        const int lane = (g + n) * kLanes;
                        const F32 delta = load(s.delta + lane);
                        const F32 even = weight[m][n] * (dweight[m][n] - delta);
                        const F32 odd = weight[m + 1][n] * (dweight[m + 1][n] - delta);
                        store(dscores + (row + m) * kTile + lane, even);
                        store(dscores + (row + m + 1) * kTile + lane, odd);
                        if constexpr (W::kPack == 2)
                            store(s.dscores_paired + (row + m) / 2 * kTile + lane, W::join(even, odd));
                    }
            }
        });
}

// The gradient that one query tile of one head sends to its dq, and to dk and dv of the keys it sees.
template <class W, typename T>
void backward_tile(const NybbleAttention& p, const BackwardTask& task, int tile, int head, const Layout<W>& layout,
                   BackwardScratch<W>& s) {
    const int64_t first_row = task.start + int64_t(tile) * kTile;
    const int rows = smaller(kTile, task.length - tile * kTile), groups = (rows + kLanes - 1) / kLanes;
    const int64_t column = int64_t(head) * layout.dim;
    const T* dout = (const T*)p.dout + first_row * p.dout_stride + column;
    const T* out = (const T*)p.out + first_row * p.out_stride + column;
    const float* lse = p.lse + head * p.num_tokens + first_row;

    layout.rows(s.q_rows, (const T*)p.q + first_row * p.q_stride + column, p.q_stride, rows);
    layout.rows(s.dout_rows, dout, p.dout_stride, rows);
    layout.lanes(s.q_lanes, s.q_rows);
    layout.lanes(s.dout_lanes, s.dout_rows);
    const float* q_pairs = layout.paired(s.q_pairs, s.q_rows);
    const float* dout_pairs = layout.paired(s.dout_pairs, s.dout_rows);
    for (int i = 0; i < kTile; ++i) s.lse[i] = i < rows ? lse[i] : 0.0f, s.factor[i] = p.scale;
    layout.rows(s.rows, out, p.out_stride, rows);
    layout.row_products(s.delta, s.dout_rows, s.rows, s.pairs);
    memset(s.dq, 0, size_t(layout.padded) * kTile * sizeof(float));

    for (int key_tile = first_key_tile(tile, p.window); key_tile <= tile; ++key_tile) {
        const Mask mask(tile, key_tile, p.window);
        const int keys = int(round_up(smaller(kTile, task.length - key_tile * kTile), kStep));
        const int64_t packed = key_tile * layout.row_tile;
        const int64_t first_sum = int64_t(key_tile) * kTile * layout.padded;
        float *dk = s.dk + first_sum, *dv = s.dv + first_sum;
        dscore_tile(s, s.k + packed, s.v + packed, layout, mask, keys, groups, p.scale);
        // Rows of keys sum over the queries that see them, vectors of queries over the keys that they see.
        const int rows_together = mask.diagonal ? kLanes : keys, words = kTile / W::kPack;
        for (int key = 0; key < keys; key += rows_together) {
            const int first = mask.first_group(key) * kLanes / W::kPack, count = groups * kLanes / W::kPack - first;
            const int end = smaller(rows_together, keys - key);
            accumulate<W>(dv + key * layout.padded, layout.padded, s.weights + key * words + first, words,
                          dout_pairs + first * layout.padded, layout.padded, end, 0, layout.padded / kLanes, count);
            accumulate<W>(dk + key * layout.padded, layout.padded, s.dscores + key * words + first, words,
                          q_pairs + first * layout.padded, layout.padded, end, 0, layout.padded / kLanes, count);
        }
        for (int g = 0; g < groups; g = mask.diagonal ? g + 1 : groups)
            accumulate<W>(s.dq, kTile, s.k_columns + packed, words, s.dscores_paired, kTile, layout.padded, g,
                          mask.diagonal ? g + 1 : groups, mask.end_key(g, keys) / W::kPack);
    }
    layout.store_lanes((T*)p.dq + first_row * p.dq_stride + column, p.dq_stride, rows, s.dq, s.factor, s.rows);
}

// One row of dk or dv from its fp32 sums.
template <typename T>
inline void store_row(T* to, const float* sums, int dim, float factor) {
    int i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(to + i, load(sums + i) * factor);
    if (i < dim) store(to + i, load(sums + i, dim - i) * factor, dim - i);
}

// `rows` rows of dk and dv, from tile `tile` of keys on.
template <class W, typename T>
void store_keys(const NybbleAttention& p, const BackwardTask& task, int tile, int rows, const Layout<W>& layout,
                const float* dk, const float* dv) {
    const int64_t first_row = task.start + int64_t(tile) * kTile, column = int64_t(task.kv_head) * layout.dim;
    for (int i = 0; i < rows; ++i) {
        const int64_t row = first_row + i, sums = int64_t(i) * layout.padded;
        store_row((T*)p.dk + row * p.dk_stride + column, dk + sums, layout.dim, p.scale);
        store_row((T*)p.dv + row * p.dv_stride + column, dv + sums, layout.dim, 1.0f);
    }
}

template <class W, typename T>
void backward_task(const NybbleAttention& p, const BackwardTask& task, const Layout<W>& layout, BackwardScratch<W>& s,
                   float* partials) {
    const int first_key = first_key_tile(task.first_tile, p.window), keys = smaller(task.length, task.end_tile * kTile);
    const int64_t column = int64_t(task.kv_head) * layout.dim;
    for (int tile = first_key; tile < task.end_tile; ++tile) {
        const int64_t row = task.start + int64_t(tile) * kTile, packed = tile * layout.row_tile;
        const int valid = smaller(kTile, task.length - tile * kTile);
        const T *k = (const T*)p.k + row * p.k_stride + column, *v = (const T*)p.v + row * p.v_stride + column;
        layout.rows(s.v + packed, v, p.v_stride, valid);
        layout.rows(s.k + packed, k, p.k_stride, valid);
        layout.columns(s.k_columns + packed, s.pairs, s.k + packed);
    }
    const int64_t sums = int64_t(task.end_tile) * kTile * layout.padded;
    memset(s.dk, 0, size_t(sums) * sizeof(float));
    memset(s.dv, 0, size_t(sums) * sizeof(float));

    const int group_size = int(p.num_heads / p.num_kv_heads);
    for (int tile = task.first_tile; tile < task.end_tile; ++tile)
        for (int h = 0; h < group_size; ++h)
            backward_tile<W, T>(p, task, tile, task.kv_head * group_size + h, layout, s);

    const int64_t skipped = int64_t(first_key) * kTile * layout.padded;
    if (task.partial >= 0) {
        const int64_t count = int64_t(keys) * layout.padded - skipped;
        memcpy(partials + task.partial, s.dk + skipped, size_t(count) * sizeof(float));
        memcpy(partials + task.partial + count, s.dv + skipped, size_t(count) * sizeof(float));
        return;
    }
    store_keys<W, T>(p, task, 0, keys, layout, s.dk, s.dv);
}

// Tiles of keys that the queries of the tiles [first, end) see, all told: what a task costs.
inline int64_t cost_of(int first, int end, int64_t window) {
    int64_t cost = 0;
    for (int tile = first; tile < end; ++tile) cost += tile + 1 - first_key_tile(tile, window);
    return cost;
}

// Tasks of one document and key head: ranges of queries of about equal cost. Returns how many; `tasks` may be null.
inline int split(BackwardTask* tasks, int start, int length, int kv_head, int64_t window, int64_t limit) {
    const int tiles = num_tiles(length);
    const int64_t cost = cost_of(0, tiles, window);
    const int wanted = int((cost + limit - 1) / limit), most = (tiles + 3) / 4;  // not less than 4 tiles each
    const int parts = smaller(wanted, most);
    int64_t so_far = 0;
    int made = 0, first = 0;
    for (int tile = 0; tile < tiles; ++tile) {
        so_far += cost_of(tile, tile + 1, window);
        if (so_far * parts < cost * (made + 1)) continue;
        if (tasks) tasks[made] = {start, length, first, tile + 1, kv_head, -1};
        ++made;
        first = tile + 1;
    }
    return made;
}

// dk and dv of the tile `tile` of keys from the partial sums of `num_parts` tasks.
template <class W, typename T>
void add_partials(const NybbleAttention& p, const BackwardTask* parts, int num_parts, int tile, const Layout<W>& layout,
                  const float* partials, float* dk, float* dv) {
    const BackwardTask& any = parts[0];
    const int rows = smaller(kTile, any.length - tile * kTile);
    memset(dk, 0, size_t(rows) * layout.padded * sizeof(float));
    memset(dv, 0, size_t(rows) * layout.padded * sizeof(float));
    for (int part = 0; part < num_parts; ++part) {
        const BackwardTask& task = parts[part];
        const int first_key = first_key_tile(task.first_tile, p.window);
        if (tile < first_key || tile >= task.end_tile) continue;
        const int64_t keys = smaller(task.length, task.end_tile * kTile) - first_key * kTile;
        const float* from = partials + task.partial + int64_t(tile - first_key) * kTile * layout.padded;
        for (int i = 0; i < rows * layout.padded; i += kLanes) {
            store(dk + i, load(dk + i) + load(from + i));
            store(dv + i, load(dv + i) + load(from + keys * layout.padded + i));
        }
    }
    store_keys<W, T>(p, any, tile, rows, layout, dk, dv);
}

template <class W, typename T>
void backward(NybbleAttention& p) {
    const Layout<W> layout(p.head_dim);
    int64_t cost = 0, most_tiles = 0;
    for (int doc = 0; doc < p.num_docs; ++doc) {
        const int tiles = num_tiles(p.cu_seqlens[doc + 1] - p.cu_seqlens[doc]);
        cost += cost_of(0, tiles, p.window) * p.num_kv_heads;
        most_tiles = tiles > most_tiles ? tiles : most_tiles;
    }
    const int64_t limit = cost / kTasks + 1;
    int64_t num_tasks = 0;
    for (int doc = 0; doc < p.num_docs; ++doc)
        num_tasks += p.num_kv_heads *
                     split(nullptr, 0, p.cu_seqlens[doc + 1] - p.cu_seqlens[doc], 0, p.window, limit);

    BackwardTask* tasks = (BackwardTask*)allocate_scratch(size_t(num_tasks) * sizeof(BackwardTask));
    if (!tasks) return;
    int64_t n = 0, partial_sums = 0;
    for (int64_t tiles = most_tiles; tiles > 0; --tiles)  // the costliest first
        for (int doc = 0; doc < p.num_docs; ++doc) {
            const int start = p.cu_seqlens[doc], length = p.cu_seqlens[doc + 1] - start;
            if (num_tiles(length) != tiles) continue;
            for (int kv_head = 0; kv_head < p.num_kv_heads; ++kv_head) {
                const int parts = split(tasks + n, start, length, kv_head, p.window, limit);
                for (int part = 0; part < parts && parts > 1; ++part) {
                    BackwardTask& task = tasks[n + part];
                    const int first_key = first_key_tile(task.first_tile, p.window);
                    task.partial = partial_sums;
                    const int64_t keys = smaller(length, task.end_tile * kTile) - first_key * kTile;
                    partial_sums += 2 * keys * layout.padded;
                }
                n += parts;
            }
        }

    Scratch count{nullptr};
    BackwardScratch<W>(count, layout, most_tiles);
    const size_t per_thread = count.used;
    char* memory = (char*)allocate_scratch(per_thread * max_threads() + size_t(partial_sums) * sizeof(float));
    if (!memory) return free(tasks);
    float* partials = (float*)(memory + per_thread * max_threads());

#pragma omp parallel
    {
        Scratch pieces{memory + per_thread * thread_index()};
        BackwardScratch<W> scratch(pieces, layout, most_tiles);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_tasks; ++i) backward_task<W, T>(p, tasks[i], layout, scratch, partials);
        for (int64_t i = 0, parts = 1; i < num_tasks; i += parts, parts = 1) {
            if (tasks[i].partial < 0) continue;
            while (i + parts < num_tasks && tasks[i + parts].first_tile > 0) ++parts;
#pragma omp for schedule(static) nowait
            for (int tile = 0; tile < num_tiles(tasks[i].length); ++tile)
                add_partials<W, T>(p, tasks + i, int(parts), tile, layout, partials, scratch.dk, scratch.dv);
        }
    }
    free(memory);
    free(tasks);
}

// ---- entries --------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
using WordsForBF16 = BF16Words;
#else
using WordsForBF16 = F32Words;
#endif

void attention_forward(NybbleAttention* p) {
    p->dtype == NYBBLE_BF16 ? forward<WordsForBF16, bf16>(*p) : forward<F32Words, float>(*p);
}

void attention_backward(NybbleAttention* p) {
    p->dtype == NYBBLE_BF16 ? backward<WordsForBF16, bf16>(*p) : backward<F32Words, float>(*p);
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(attention_forward, (NybbleAttention* p), (p))
NYBBLE_ENTRY(attention_backward, (NybbleAttention* p), (p))
