// All decoder layers and the head for up to 8 rows, each the next token of a text: one call and one parallel region.
//
//     heads = qkv(norm(x))          head norms, rope, keys and values into the cache
//     x += o(attention)             each row over the columns of its text, up to its own
//     x += down(silu(gate) * up)    gate, up = gate_up(norm(x))
//     logits = head(norm(x))
//
// and what else a layer may have or lack: RMSNorm, LayerNorm or none of them; a norm of what is added to x, a factor on
// it; gelu in place of silu, a gate or none; a soft cap on the scores; the MLP beside attention, on the same rows; keys
// and values of a layer before it, or values that are its keys; what it makes of an input of its own; a factor on x.
//
// A product reads each weight once for all rows, so memory sets the pace as long as nothing else does: with a parallel
// region for each product of a small model, threads spent as long at the regions' ends as on the weights. Here all
// threads walk through the layers together and meet at barriers. Between products all rows are fp32, and only keys and
// values are rounded, to the cache's type; four-bit products run in that type (gemv.h), dense ones and adapters in fp32.
//
// The structs below are filled by backends/cpp/decode.py, once a model but for Step.
#include "dispatch.h"
#include "gemv.h"
#include "glu.h"
#include "layer_norm.h"
#include "rms_norm.h"
#include "rope.h"
#include "threads.h"

namespace nybble::NYBBLE_ISA {

// A frozen weight [out_features, in], packed or dense, with what is added to its product.
struct Linear {
    int64_t out_features;
    PackedMatrix packed;  // where packed.packed is not null, else
    const void* dense;
    int64_t dense_dtype;
    const float* bias;  // [out_features], or null
    int64_t rank;       // of its adapter, 0 without one
    const float* b;     // [rank, out_features]
};

// Linears that read the same rows, their results side by side.
struct Projection {
    int64_t in, num_linears, ranks;
    const Linear* linears;
    const float* a;  // [ranks, in], scaled
};

struct Norm {
    const float *weight, *bias;  // null: no norm, no bias
    int64_t width, centred;      // centred: LayerNorm, else RMSNorm
    int64_t by_head;             // each head has a weight of its own, [heads, width]
    float eps;

    Norm of_head(int64_t head) const {
        Norm own = *this;
        if (by_head) own.weight += head * width;
        return own;
    }

    void row(const float* from, float* to) const {
        float stats[2];
        if (centred) {
            layer_norm_row(from, weight, bias, eps, width, to, stats);
        } else {
            rms_norm_row(from, weight, 0.0f, eps, width, to);
        }
    }
};

struct Layer {
    Projection qkv, o, gate_up, down;
    Projection input_gate, input_project;  // of an input of its own, where input_gate.in is not 0
    Norm input_norm, mlp_norm, q_norm, k_norm, v_norm, attention_output_norm, mlp_output_norm, own_norm;
    int64_t heads, kv_heads, head_dim, window;  // window 0: all columns
    int64_t rope, query_rope, neighbours;       // which of a step's angles, -1 none; who is turned with whom
    int64_t gate, parallel;                     // a Gate; the MLP reads what attention does
    int64_t reads_keys, values_are_keys;        // of another layer: no keys; no values: they are the keys, not normed
    float scale, softcap, residual, factor;     // softcap 0: none; the factors on what is added to x, and on x

    int64_t computed() const { return heads + (reads_keys ? 0 : values_are_keys ? kv_heads : 2 * kv_heads); }
};

struct Angles {
    const float *cos, *sin;  // [rows, half]
    int64_t half;
};

struct Head {
    Norm norm;
    Projection projection;
};

struct Step {
    int64_t rows;
    float* x;                                // [rows, hidden], overwritten
    const Angles* angles;                    // [kinds]
    void* const* cache;                      // [layers], each [2, texts, kv_heads, capacity, head_dim]
    int64_t cache_dtype, texts, capacity;
    const float* inputs;                     // [rows, layers, width] of the layers' own, or null
    int64_t layers;
    const int64_t *text, *column, *start;    // [rows]: a row's text, its column, and its text's first column
    float* logits;                           // [rows, vocabulary]
};

// Which part of the work a thread of the parallel region does.
struct Team {
    int64_t thread, threads;

    int64_t begin(int64_t count) const { return count * thread / threads; }
    int64_t end(int64_t count) const { return count * (thread + 1) / threads; }
    void meet() const {
#pragma omp barrier
    }
};

// Buffers that the threads share, in one piece of memory.
struct Buffers {
    float *normed, *heads, *mixed, *gate_up, *act, *low_rank;  // [rows, ...]
    float* scores;                                             // [threads, columns]
    void* arranged;                                            // of FewRows
    int64_t columns;
};

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t width_of(const Projection& p) {
    int64_t width = 0;
    for (int64_t i = 0; i < p.num_linears; ++i) width += p.linears[i].out_features;
    return width;
}

// ---- products ------------------------------------------------------------------------------------------------------

// Rows first .. first + count - 1 of a dense W against kRows rows of x; result [kRows, kLanes]. One row after the other,
// since memory gives one stream twice as fast as four.
template <typename W, int kRows>
static void dense_rows(const W* w, int64_t in, int64_t first, int64_t count, const float* x, float* result) {
    const int64_t whole = in - in % kLanes;
    for (int64_t out = 0; out < count; ++out) {
        const W* row = w + (first + out) * in;
        F32 sums[kRows] = {};
        for (int64_t i = 0; i < whole; i += kLanes) {
            const F32 weights = load(row + i);
            for (int r = 0; r < kRows; ++r) sums[r] = fma(weights, load(x + r * in + i), sums[r]);
        }
        for (int r = 0; whole < in && r < kRows; ++r)
            sums[r] = fma(load(row + whole, int(in - whole)), load(x + r * in + whole, int(in - whole)), sums[r]);
        for (int r = 0; r < kRows; ++r) result[r * kLanes + out] = sum(sums[r]);
    }
}

template <typename W>
static void dense_rows(const void* w, int64_t in, int64_t first, int64_t count, const float* x, int64_t rows,
                       float* result) {
    static constexpr decltype(&dense_rows<W, 1>) kByRows[kRowsAtOnce] = {
        dense_rows<W, 1>, dense_rows<W, 2>, dense_rows<W, 3>, dense_rows<W, 4>,
        dense_rows<W, 5>, dense_rows<W, 6>, dense_rows<W, 7>, dense_rows<W, 8>};
    kByRows[rows - 1]((const W*)w, in, first, count, x, result);
}

static void dense_rows(int64_t dtype, const void* w, int64_t in, int64_t first, int64_t count, const float* x,
                       int64_t rows, float* result) {
    if (dtype == NYBBLE_F32) dense_rows<float>(w, in, first, count, x, rows, result);
    if (dtype == NYBBLE_BF16) dense_rows<bf16>(w, in, first, count, x, rows, result);
    if (dtype == NYBBLE_F16) dense_rows<fp16>(w, in, first, count, x, rows, result);
}

// z = x A^T of all adapters, [rows, ranks].
static void low_rank(const Team& team, const Projection& p, const float* x, int64_t rows, float* z) {
    constexpr int64_t kUnit = 4;
    const int64_t units = (p.ranks + kUnit - 1) / kUnit;
    for (int64_t unit = team.begin(units); unit < team.end(units); ++unit) {
        const int64_t first = unit * kUnit, count = p.ranks - first < kUnit ? p.ranks - first : kUnit;
        float result[kRowsAtOnce * kLanes];
        dense_rows<float>(p.a, p.in, first, count, x, rows, result);
        for (int64_t row = 0; row < rows; ++row)
            memcpy(z + row * p.ranks + first, result + row * kLanes, size_t(count) * sizeof(float));
    }
}

// What is written of a product: y = product + bias + z B^T, or where it is added y += factor times that.
struct Output {
    float* y;
    int64_t stride, rows;
    bool add;
    float factor;
    const float* z;  // [rows, z_stride]
    int64_t z_stride;

    void write(const Linear& linear, int64_t first, const float* product) const {
        const int64_t left = linear.out_features - first;
        for (int64_t row = 0; row < rows; ++row) {
            F32 v = load(product + row * kLanes);
            if (linear.bias) v += load_up_to(linear.bias + first, left);
            for (int64_t k = 0; k < linear.rank; ++k)
                v = fma(splat(z[row * z_stride + k]), load_up_to(linear.b + k * linear.out_features + first, left), v);
            float* to = y + row * stride + first;
            if (add) v = fma(v, splat(factor), load_up_to(to, left));
            store_up_to(to, v, left);
        }
    }
};

// Outputs begin .. end - 1 of a linear, in units of kLanes.
template <typename T>
static void multiply(const Linear& linear, const FewRows<T, float>& x, int64_t begin, int64_t end, const Output& out) {
    float result[kRowsAtOnce * kLanes] = {};
    if (linear.packed.packed) {
        PackedProduct<T, float> product(linear.packed, x);
        for (int64_t first = begin; first < end; first += kLanes) {
            for (int64_t i = 0; i < kLanes && first + i < end; ++i) {
                float row[kRowsAtOnce];
                product.row(first + i, row);
                for (int64_t r = 0; r < x.rows; ++r) result[r * kLanes + i] = row[r];
            }
            out.write(linear, first, result);
        }
        return;
    }
    for (int64_t first = begin; first < end; first += kLanes) {
        const int64_t count = end - first < kLanes ? end - first : kLanes;
        dense_rows(linear.dense_dtype, linear.dense, x.in, first, count, x.x, x.rows, result);
        out.write(linear, first, result);
    }
}

// y [rows, Σ out_features] = the projection of x, or += `factor` times it. Ends with a barrier.
template <typename T>
static void project(const Team& team, const Projection& p, const Buffers& buffers, const float* x, int64_t rows,
                    float* y, bool add = false, float factor = 1.0f) {
    const FewRows<T, float> operand(x, rows, p.in, buffers.arranged);
    int64_t units = 0;
    bool packed = false;
    for (int64_t i = 0; i < p.num_linears; ++i) {
        units += (p.linears[i].out_features + kLanes - 1) / kLanes;
        packed |= p.linears[i].packed.packed != nullptr;
    }
    if (packed)
        for (int64_t i = team.begin(operand.pieces()); i < team.end(operand.pieces()); ++i) operand.arrange(i);
    low_rank(team, p, x, rows, buffers.low_rank);
    if (packed || p.ranks) team.meet();

    int64_t before = 0;  // units of the linears before this one
    Output out{y, width_of(p), rows, add, factor, buffers.low_rank, p.ranks};
    for (int64_t i = 0; i < p.num_linears; ++i) {
        const Linear& linear = p.linears[i];
        const int64_t own = (linear.out_features + kLanes - 1) / kLanes;
        const int64_t begin = larger(team.begin(units) - before, 0) * kLanes;
        const int64_t end = (team.end(units) - before) * kLanes;
        if (begin < linear.out_features && end > 0)
            multiply<T>(linear, operand, begin, end < linear.out_features ? end : linear.out_features, out);
        before += own;
        out.y += linear.out_features;
        out.z += linear.rank;
    }
    team.meet();
}

// ---- between the products ------------------------------------------------------------------------------------------

// The normed rows of x, in `room`; x itself where there is no norm.
static const float* norm_rows(const Team& team, const Norm& norm, const float* x, int64_t rows, float* room) {
    if (!norm.weight) return x;
    for (int64_t row = team.begin(rows); row < team.end(rows); ++row)
        norm.row(x + row * norm.width, room + row * norm.width);
    team.meet();
    return room;
}

// The projection of `from`, normed where there is a norm, times `factor` is added to x; `room` is [rows, hidden].
template <typename T>
static void add_projection(const Team& team, const Projection& p, const Norm& norm, float factor,
                           const Buffers& buffers, const float* from, int64_t rows, int64_t hidden, float* room,
                           float* x) {
    if (!norm.weight) return project<T>(team, p, buffers, from, rows, x, true, factor);
    project<T>(team, p, buffers, from, rows, room);
    for (int64_t row = team.begin(rows); row < team.end(rows); ++row) {
        float *added = room + row * hidden, *to = x + row * hidden;
        norm.row(added, added);
        for (int64_t i = 0; i < hidden; i += kLanes) {
            const F32 v = load_up_to(added + i, hidden - i);
            store_up_to(to + i, fma(v, splat(factor), load_up_to(to + i, hidden - i)), hidden - i);
        }
    }
    team.meet();
}

// Where keys (0) or values (1) of a text's head begin in the cache.
template <typename T>
static T* columns_of(const Step& s, const Layer& l, int64_t layer, int values, int64_t text, int64_t head) {
    return (T*)s.cache[layer] + ((values * s.texts + text) * l.kv_heads + head) * s.capacity * l.head_dim;
}

// Norms all queries of a row together, and all keys.
static void norm_heads_together(const Team& team, const Layer& l, int64_t rows, float* heads) {
    for (int64_t row = team.begin(rows); row < team.end(rows); ++row) {
        float* queries = heads + row * (l.heads + 2 * l.kv_heads) * l.head_dim;
        float* keys = queries + l.heads * l.head_dim;
        l.q_norm.row(queries, queries);
        l.k_norm.row(keys, keys);
    }
    team.meet();
}

// One head of keys or values into the cache.
template <typename T>
static void place(const Layer& l, int64_t layer, const Step& s, int64_t row, int64_t kv_head, int values,
                  const float* x) {
    T* to = columns_of<T>(s, l, layer, values, s.text[row], kv_head) + s.column[row] * l.head_dim;
    for (int64_t i = 0; i < l.head_dim; i += kLanes)
        store_up_to(to + i, load_up_to(x + i, l.head_dim - i), l.head_dim - i);
}

// Norms and rotates heads, and puts keys and values into the cache; `room` is [rows, heads, head_dim].
template <typename T>
static void place_heads(const Team& team, const Layer& l, int64_t layer, const Step& s, float* heads, float* room) {
    const int64_t all = l.computed();
    const bool together = l.q_norm.weight && l.q_norm.width == l.heads * l.head_dim && l.heads > 1;
    if (together) norm_heads_together(team, l, s.rows, heads);
    for (int64_t task = team.begin(s.rows * all); task < team.end(s.rows * all); ++task) {
        const int64_t row = task / all, head = task % all, kv_head = (head - l.heads) % l.kv_heads;
        const bool is_query = head < l.heads, is_value = head >= l.heads + l.kv_heads;
        float* x = heads + task * l.head_dim;
        if (is_value || (!is_query && l.values_are_keys)) {
            float* value = is_value ? x : room + (row * l.heads + kv_head) * l.head_dim;
            if (l.v_norm.weight) l.v_norm.row(x, value);
            place<T>(l, layer, s, row, kv_head, 1, l.v_norm.weight ? value : x);
        }
        if (is_value) continue;
        const Norm& norm = is_query ? l.q_norm : l.k_norm;
        if (norm.weight && !together) norm.of_head(is_query ? head : kv_head).row(x, x);
        const int64_t rope = is_query ? l.query_rope : l.rope;
        if (rope >= 0) {
            const Angles& angles = s.angles[rope];
            const float *cos = angles.cos + row * angles.half, *sin = angles.sin + row * angles.half;
            if (l.neighbours) {
                rotate_neighbours(x, cos, sin, angles.half, 1.0f);
            } else {
                rotate_head(x, cos, sin, angles.half, 1.0f);
            }
        }
        if (!is_query) place<T>(l, layer, s, row, kv_head, 0, x);
    }
    team.meet();
}

// out = softmax(scale * q K^T) V for one head over `count` columns; `scores` has room for whole vectors of them.
template <typename T>
static void attend_head(const float* q, const T* keys, const T* values, int64_t count, int64_t head_dim, float scale,
                        float softcap, float* scores, float* out) {
    F32 most = splat(-__builtin_inff());
    for (int64_t column = 0; column < count; column += kLanes) {
        F32 dots = splat(-__builtin_inff());  // beyond the last column: e^-inf = 0
        for (int64_t j = 0; j < kLanes && column + j < count; ++j) {
            const T* key = keys + (column + j) * head_dim;
            F32 products = {};
            for (int64_t i = 0; i < head_dim; i += kLanes)
                products = fma(load_up_to(q + i, head_dim - i), load_up_to(key + i, head_dim - i), products);
            dots[j] = sum(products) * scale;
        }
        if (softcap > 0.0f) {
            const F32 capped = tanh(dots / softcap) * softcap;
            for (int64_t j = 0; j < kLanes && column + j < count; ++j) dots[j] = capped[j];
        }
        store(scores + column, dots);
        most = max(most, dots);
    }
    const F32 shift = splat(largest(most));
    F32 total = {};
    for (int64_t column = 0; column < count; column += kLanes) {
        const F32 weight = exp(load(scores + column) - shift);
        store(scores + column, weight);
        total += weight;
    }
    const float normalizer = 1.0f / sum(total);
    constexpr int64_t kSums = 4;
    for (int64_t first = 0; first < head_dim; first += kSums * kLanes) {
        F32 sums[kSums] = {};
        for (int64_t column = 0; column < count; ++column) {
            const F32 weight = splat(scores[column]);
            const T* value = values + column * head_dim + first;
            for (int64_t j = 0, left = head_dim - first; j < kSums && left > 0; ++j, left -= kLanes)
                sums[j] = fma(weight, load_up_to(value + j * kLanes, left), sums[j]);
        }
        for (int64_t j = 0, left = head_dim - first; j < kSums && left > 0; ++j, left -= kLanes)
            store_up_to(out + first + j * kLanes, sums[j] * normalizer, left);
    }
}

template <typename T>
static void attend(const Team& team, const Layer& l, int64_t layer, const Step& s, const Buffers& buffers) {
    for (int64_t task = team.begin(s.rows * l.heads); task < team.end(s.rows * l.heads); ++task) {
        const int64_t row = task / l.heads, head = task % l.heads, kv_head = head / (l.heads / l.kv_heads);
        const int64_t text = s.text[row], end = s.column[row] + 1;
        const int64_t begin = l.window ? larger(s.start[row], end - l.window) : s.start[row];
        attend_head(buffers.heads + (row * l.computed() + head) * l.head_dim,
                    columns_of<T>(s, l, layer, 0, text, kv_head) + begin * l.head_dim,
                    columns_of<T>(s, l, layer, 1, text, kv_head) + begin * l.head_dim, end - begin, l.head_dim, l.scale,
                    l.softcap, buffers.scores + team.thread * buffers.columns, buffers.mixed + task * l.head_dim);
    }
    team.meet();
}

// act = activation(gate) * up, [rows, f] from [rows, 2 f], or without a gate from [rows, f]; the columns are shared out.
static void activate(const Team& team, int64_t kind, int64_t rows, int64_t width, const float* gate_up, float* act) {
    const int64_t units = (width + kLanes - 1) / kLanes, begin = team.begin(units) * kLanes;
    const int64_t end = team.end(units) * kLanes < width ? team.end(units) * kLanes : width, count = end - begin;
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = gate_up + row * (kind == GELU ? width : 2 * width) + begin;
        float* to = act + row * width + begin;
        if (kind == GATE_SILU) glu_row<Silu>(from, from + width, count, to);
        if (kind == GATE_GELU) glu_row<Gelu>(from, from + width, count, to);
        if (kind == GELU) activate_row<Gelu>(from, count, to);
    }
    team.meet();
}

// act = activation(gate) * the layer's own inputs, [rows, width]; rows are shared out.
static void activate_inputs(const Team& team, const Layer& l, int64_t layer, const Step& s, const float* gate,
                            float* act) {
    const int64_t width = l.input_project.in;
    for (int64_t row = team.begin(s.rows); row < team.end(s.rows); ++row) {
        const float* given = s.inputs + (row * s.layers + layer) * width;
        if (l.gate == GATE_SILU) glu_row<Silu>(gate + row * width, given, width, act + row * width);
        if (l.gate == GATE_GELU) glu_row<Gelu>(gate + row * width, given, width, act + row * width);
    }
    team.meet();
}

static void multiply_rows(const Team& team, int64_t rows, int64_t hidden, float factor, float* x) {
    for (int64_t row = team.begin(rows); row < team.end(rows); ++row)
        for (int64_t i = 0; i < hidden; i += kLanes) {
            float* to = x + row * hidden + i;
            store_up_to(to, load_up_to(to, hidden - i) * factor, hidden - i);
        }
    team.meet();
}

template <typename T>
static void through_layer(const Team& team, const Layer& l, int64_t layer, const Step& s, const Buffers& b) {
    const int64_t rows = s.rows, hidden = l.qkv.in;
    const float* read = norm_rows(team, l.input_norm, s.x, rows, b.normed);
    project<T>(team, l.qkv, b, read, rows, b.heads);
    if (l.parallel) project<T>(team, l.gate_up, b, norm_rows(team, l.mlp_norm, s.x, rows, b.normed), rows, b.gate_up);
    place_heads<T>(team, l, layer, s, b.heads, b.mixed);
    attend<T>(team, l, layer, s, b);
    add_projection<T>(team, l.o, l.attention_output_norm, l.residual, b, b.mixed, rows, hidden, b.normed, s.x);
    if (!l.parallel) project<T>(team, l.gate_up, b, norm_rows(team, l.mlp_norm, s.x, rows, b.normed), rows, b.gate_up);
    activate(team, l.gate, rows, l.down.in, b.gate_up, b.act);
    add_projection<T>(team, l.down, l.mlp_output_norm, l.residual, b, b.act, rows, hidden, b.normed, s.x);
    if (l.input_gate.in) {
        project<T>(team, l.input_gate, b, s.x, rows, b.gate_up);
        activate_inputs(team, l, layer, s, b.gate_up, b.act);
        add_projection<T>(team, l.input_project, l.own_norm, 1.0f, b, b.act, rows, hidden, b.normed, s.x);
    }
    if (l.factor != 1.0f) multiply_rows(team, rows, hidden, l.factor, s.x);
}

// ---- the whole step ------------------------------------------------------------------------------------------------

// Memory for the largest layer, in whole cache lines; a null `memory` only counts.
template <typename T>
static size_t lay_out(Buffers& b, const Layer* layers, int64_t num_layers, const Head& head, const Step& s,
                      int64_t threads, char* memory) {
    int64_t hidden = head.projection.in, heads = 0, mixed = 0, gate_up = 0, act = 0, ranks = head.projection.ranks;
    size_t arranged = FewRows<T, float>::bytes(s.rows, hidden);
    for (int64_t i = 0; i < num_layers; ++i) {
        const Layer& l = layers[i];
        heads = larger(heads, width_of(l.qkv)), mixed = larger(mixed, l.o.in);
        gate_up = larger(gate_up, larger(width_of(l.gate_up), width_of(l.input_gate)));
        act = larger(act, larger(l.down.in, l.input_project.in));
        const Projection* projections[] = {&l.qkv, &l.o, &l.gate_up, &l.down, &l.input_gate, &l.input_project};
        for (const Projection* p : projections) {
            const size_t bytes = FewRows<T, float>::bytes(s.rows, p->in);
            arranged = bytes > arranged ? bytes : arranged;
            ranks = larger(ranks, p->ranks);
        }
    }
    b.columns = (s.capacity + kLanes - 1) / kLanes * kLanes;
    size_t used = 0;
    auto take = [&](size_t bytes) {
        char* at = memory ? memory + used : nullptr;
        used += (bytes + 63) / 64 * 64;
        return at;
    };
    const size_t row = size_t(s.rows) * sizeof(float);
    b.normed = (float*)take(row * size_t(hidden));
    b.heads = (float*)take(row * size_t(heads));
    b.mixed = (float*)take(row * size_t(mixed));
    b.gate_up = (float*)take(row * size_t(gate_up));
    b.act = (float*)take(row * size_t(act));
    b.low_rank = (float*)take(row * size_t(ranks));
    b.scores = (float*)take(size_t(threads * b.columns) * sizeof(float));
    b.arranged = take(arranged);
    return used;
}

template <typename T>
static void through_all(const Layer* layers, int64_t num_layers, const Head& head, const Step& s) {
    Buffers buffers;
    char* memory = (char*)allocate_scratch(lay_out<T>(buffers, layers, num_layers, head, s, max_threads(), nullptr));
    if (!memory) return;
    lay_out<T>(buffers, layers, num_layers, head, s, max_threads(), memory);
#pragma omp parallel
    {
        const Team team{thread_index(), num_threads()};
        for (int64_t i = 0; i < num_layers; ++i) through_layer<T>(team, layers[i], i, s, buffers);
        const float* normed = norm_rows(team, head.norm, s.x, s.rows, buffers.normed);
        project<T>(team, head.projection, buffers, normed, s.rows, s.logits);
    }
    free(memory);
}

// `layers` Layer[num_layers], of which there may be none, `head` Head, `step` Step of at most 8 rows.
void decode(const void* layers, int64_t num_layers, const void* head, const void* step) {
    const Step& s = *(const Step*)step;
    if (s.cache_dtype == NYBBLE_F32) through_all<float>((const Layer*)layers, num_layers, *(const Head*)head, s);
    if (s.cache_dtype == NYBBLE_BF16) through_all<bf16>((const Layer*)layers, num_layers, *(const Head*)head, s);
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(decode, (const void* layers, int64_t num_layers, const void* head, const void* step),
             (layers, num_layers, head, step))
