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
// A soft cap on the scores is applied to a tile where it is made, and its slope to dS; without one, nothing is asked.
// On the diagonal only the lanes that see a key are computed, at the grain of one vector.
//
// Tasks write disjoint results and each sums in a fixed order, so results do not depend on the number of threads.
// Forward: (document, key head, tile of queries). Backward: (document, key head), which owns dk and dv of that head and
// dq of its query heads; costly documents are split by ranges of queries, whose dk and dv are then summed in order.
//
// Left out: dropout, attention biases, queries that are not also keys (decoding has its own kernel).
#include <cstdlib>
#include <cstring>

#include "attention_tiles.h"

namespace nybble::NYBBLE_ISA {

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

// A soft cap c on scores that are still to be multiplied by `scale`: x -> (c / scale) tanh(x scale / c).
struct Softcap {
    float inner, outer;  // scale / c, c / scale

    explicit Softcap(const NybbleAttention& p) : inner(p.scale / p.softcap), outer(p.softcap / p.scale) {}
};

// scores[key][query], masked, and their maximum by query.
template <bool kCapped, class W>
void score_tile(ForwardScratch<W>& s, const float* q_lanes, const Layout<W>& layout, const Mask& mask, int keys,
                int groups, const Softcap& cap) {
    multiply_scores(s.scores, s.k, q_lanes, layout, mask, keys, groups);
    for (int i = 0; i < kTile; i += kLanes) store(s.tile_maximum + i, splat(kMasked));
    for (int key = 0; key < keys; key += kStep)
        by_width(mask.first_group(key), groups, [&](auto width, int g) __attribute__((always_inline)) {
            constexpr int N = decltype(width)::value, M = rows_at_once<N>();
            for (int row = key; row < key + kStep; row += M) {
                F32 sum[M][N] = {};
                block_of_scores(sum, s.scores, s.k, q_lanes, layout, row, g);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) {
                    F32 best = load(s.tile_maximum + (g + n) * kLanes);
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        if constexpr (kCapped) sum[m][n] = tanh(sum[m][n] * cap.inner) * cap.outer;
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
    const int rows = smaller(kTile, task.length - task.tile * kTile), groups = groups_of(rows);
    const float scale = p.scale;
    const Softcap cap(p);
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
            const float* q_lanes = s.q_lanes + h * layout.row_tile;
            if (p.softcap > 0.0f) {
                score_tile<true>(s, q_lanes, layout, mask, keys, groups, cap);
            } else {
                score_tile<false>(s, q_lanes, layout, mask, keys, groups, cap);
            }
            softmax_tile(s, s.maximum + h * kTile, s.sum + h * kTile, mask, keys, groups, scale);
            const int together = mask.diagonal ? kGrain / kLanes : groups;
            for (int g = 0; g < groups; g += together)
                accumulate<W, true>(out, kTile, s.v_columns, kTile / W::kPack, s.weights, kTile, layout.padded, g,
                                    g + together, mask.end_key(g, keys) / W::kPack, s.factor);
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
        const AmxScope amx;
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
    float *products, *dproducts;                            // what matrix tiles multiply: S and dP, [key][query]

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
        products = s.take<float>(kAmx ? kTile * kTile : 0);
        dproducts = s.take<float>(kAmx ? kTile * kTile : 0);
    }
};

// P and dS of one tile; the vectors of queries that see no key of a row are left unwritten.
template <bool kCapped, class W>
void dscore_tile(BackwardScratch<W>& s, const float* k, const float* v, const Layout<W>& layout, const Mask& mask,
                 int keys, int groups, float scale, const Softcap& cap) {
    auto *weights = (typename W::Element*)s.weights, *dscores = (typename W::Element*)s.dscores;
    multiply_scores(s.products, k, s.q_lanes, layout, mask, keys, groups);
    multiply_scores(s.dproducts, v, s.dout_lanes, layout, mask, keys, groups);
    for (int key = 0; key < keys; key += kStep)
        by_width(mask.first_group(key), groups, [&](auto width, int g) __attribute__((always_inline)) {
            constexpr int N = decltype(width)::value, M = rows_at_once<N>();
            for (int row = key; row < key + kStep; row += M) {
                F32 weight[M][N] = {}, dweight[M][N] = {};
                [[maybe_unused]] F32 slope[M][N];  // of the soft cap
                block_of_scores(weight, s.products, k, s.q_lanes, layout, row, g);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        const int lane = (g + n) * kLanes;
                        if constexpr (kCapped) {
                            const F32 capped = tanh(weight[m][n] * cap.inner);
                            slope[m][n] = 1.0f - capped * capped;
                            weight[m][n] = capped * cap.outer;
                        }
                        if (mask.partial) weight[m][n] = mask.apply(weight[m][n], row + m, g + n);
                        weight[m][n] = exp_below_0(fma(weight[m][n], splat(scale), -load(s.lse + lane)));
                        store(weights + (row + m) * kTile + lane, weight[m][n]);
                    }
                block_of_scores(dweight, s.dproducts, v, s.dout_lanes, layout, row, g);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
                    for (int m = 0; m < M; m += 2) {
                        const int lane = (g + n) * kLanes;
                        const F32 delta = load(s.delta + lane);
                        F32 even = weight[m][n] * (dweight[m][n] - delta);
                        F32 odd = weight[m + 1][n] * (dweight[m + 1][n] - delta);
                        if constexpr (kCapped) even *= slope[m][n], odd *= slope[m + 1][n];
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
    const int rows = smaller(kTile, task.length - tile * kTile), groups = groups_of(rows);
    const int64_t column = int64_t(head) * layout.dim;
    const T* dout = (const T*)p.dout + first_row * p.dout_stride + column;
    const T* out = (const T*)p.out + first_row * p.out_stride + column;
    const float* lse = p.lse + head * p.num_tokens + first_row;
    const Softcap cap(p);

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
        if (p.softcap > 0.0f) {
            dscore_tile<true>(s, s.k + packed, s.v + packed, layout, mask, keys, groups, p.scale, cap);
        } else {
            dscore_tile<false>(s, s.k + packed, s.v + packed, layout, mask, keys, groups, p.scale, cap);
        }
        // Rows of keys sum over the queries that see them, vectors of queries over the keys that they see.
        const int rows_together = mask.diagonal ? kGrain : keys, words = kTile / W::kPack;
        for (int key = 0; key < keys; key += rows_together) {
            const int first = mask.first_group(key) * kLanes / W::kPack, count = groups * kLanes / W::kPack - first;
            const int end = smaller(rows_together, keys - key);
            accumulate<W>(dv + key * layout.padded, layout.padded, s.weights + key * words + first, words,
                          dout_pairs + first * layout.padded, layout.padded, end, 0, layout.padded / kLanes, count);
            accumulate<W>(dk + key * layout.padded, layout.padded, s.dscores + key * words + first, words,
                          q_pairs + first * layout.padded, layout.padded, end, 0, layout.padded / kLanes, count);
        }
        const int together = mask.diagonal ? kGrain / kLanes : groups;
        for (int g = 0; g < groups; g += together)
            accumulate<W>(s.dq, kTile, s.k_columns + packed, words, s.dscores_paired, kTile, layout.padded, g,
                          g + together, mask.end_key(g, keys) / W::kPack);
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
        const AmxScope amx;
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

#if defined(__AMX_BF16__)
}  // namespace nybble::NYBBLE_ISA
namespace nybble::avx512bf16 {
void attention_forward(NybbleAttention* p);
void attention_backward(NybbleAttention* p);
}  // namespace nybble::avx512bf16
namespace nybble::NYBBLE_ISA {

// Matrix tiles multiply bf16 alone.
void attention_forward(NybbleAttention* p) {
    p->dtype == NYBBLE_BF16 ? forward<BF16Words, bf16>(*p) : avx512bf16::attention_forward(p);
}

void attention_backward(NybbleAttention* p) {
    p->dtype == NYBBLE_BF16 ? backward<BF16Words, bf16>(*p) : avx512bf16::attention_backward(p);
}
#else
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
#endif

}  // namespace nybble::NYBBLE_ISA

NYBBLE_AMX_ENTRY(attention_forward, (NybbleAttention* p), (p))
NYBBLE_AMX_ENTRY(attention_backward, (NybbleAttention* p), (p))
