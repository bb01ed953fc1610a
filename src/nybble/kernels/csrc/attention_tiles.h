// What attention.cpp computes with: tiles of scores and of rows, their words and layouts, and the product of two tiles.
#pragma once

#include <cstring>

#include "amx.h"
#include "attention.h"
#include "dispatch.h"
#include "threads.h"
#include "vec.h"

namespace nybble::NYBBLE_ISA {

constexpr int kTile = 64;                      // queries and keys of a tile
constexpr int kGroups = kTile / kLanes;        // vectors across a tile's queries
constexpr int kGrain = kAmx ? kAmxSide : kLanes;  // queries that see the same keys, as far as it is computed
constexpr int kStep = kAmx ? kAmxSide : 8;     // rows of `a` are padded to a multiple of this
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

// c[row][lane] *= factor[lane], the vectors [first, end).
inline void scale_lanes(float* c, int64_t ldc, int rows, int first, int end, const float* factor) {
    for (int g = first; g < end; ++g) {
        const F32 f = load(factor + g * kLanes);
        for (int row = 0; row < rows; ++row) store(c + row * ldc + g * kLanes, load(c + row * ldc + g * kLanes) * f);
    }
}

// c[row][lane] += sum_i a[row][i] * b[i][lane] in memory, `rows` a multiple of kStep, the vectors [first, end).
// With kScaled, c[row][lane] is first multiplied by factor[lane].
template <class W, bool kScaled = false>
void accumulate(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int rows, int first,
                int end, int count, const float* factor = nullptr) {
    if constexpr (kAmx) {
        if constexpr (kScaled) scale_lanes(c, ldc, rows, first, end, factor);
        for (int row = 0; row < rows; row += kAmxSide)
            for (int lane = first * kLanes; lane < end * kLanes; lane += kAmxSide)
                amx_multiply<true>(c + row * ldc + lane, ldc, a + row * lda, lda, b + lane, ldb, count);
        return;
    }
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
    int first_group(int key) const { return diagonal ? key / kGrain * (kGrain / kLanes) : 0; }

    // Queries of vector `group` see no key of the tile from this one on; `keys` in all.
    int end_key(int group, int keys) const {
        return diagonal ? smaller(keys, (group * kLanes / kGrain + 1) * kGrain) : keys;
    }

    F32 apply(F32 score, int key, int group) const {
        I32 query;
        for (int i = 0; i < kLanes; ++i) query[i] = i;
        const I32 distance = query + (first_query + group * kLanes - first_key - key);
        return (distance >= 0) & (distance < window) ? score : splat(kMasked);
    }
};

// ---- scores ----------------------------------------------------------------------------------------------------------

// Vectors of a tile's queries that are computed where `rows` of them are there.
inline int groups_of(int rows) { return int(round_up(rows, kGrain)) / kLanes; }

// products[key][query] = sum_i rows[key][i] * lanes[i][query] where matrix tiles multiply: all scores that the mask lets
// be seen, before anything is done to them. Without matrix tiles `block_of_scores` multiplies.
template <class W>
void multiply_scores(float* products, const float* rows, const float* lanes, const Layout<W>& layout, const Mask& mask,
                     int keys, int groups) {
    if constexpr (kAmx)
        for (int key = 0; key < keys; key += kAmxSide)
            for (int lane = mask.first_group(key) * kLanes; lane < groups * kLanes; lane += kAmxSide)
                amx_multiply<false>(products + key * kTile + lane, kTile, rows + key * layout.words, layout.words,
                                    lanes + lane, kTile, layout.words);
}

// The scores of keys from `row` on and vectors of queries from `group` on.
template <class W, int M, int N>
inline __attribute__((always_inline)) void block_of_scores(F32 (&sum)[M][N], const float* products, const float* rows,
                                                           const float* lanes, const Layout<W>& layout, int row,
                                                           int group) {
    if constexpr (kAmx) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sum[m][n] = load(products + (row + m) * kTile + (group + n) * kLanes);
    } else {
        multiply<W>(sum, rows + row * layout.words, layout.words, lanes + group * kLanes, kTile, layout.summed);
    }
}

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

}  // namespace nybble::NYBBLE_ISA
