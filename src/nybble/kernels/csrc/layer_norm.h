// One row of LayerNorm's forward: what layer_norm.cpp and decode.cpp share.
#pragma once

#include "vec.h"

namespace nybble::NYBBLE_ISA {

// v in the first `left` lanes, zero in the others.
inline F32 keep_up_to(F32 v, int64_t left) {
    if (left >= kLanes) return v;
    for (int64_t i = left; i < kLanes; ++i) v[i] = 0.0f;
    return v;
}

// to = (from - mean) * rstd * weight + bias for `width` elements; `stats` gets mean and rstd. `bias` may be null, `to`
// may be `from`.
template <typename T, typename W>
inline void layer_norm_row(const T* from, const W* weight, const W* bias, float eps, int64_t width, T* to,
                           float* stats) {
    F32 total = {};
    for (int64_t i = 0; i < width; i += kLanes) total += load_up_to(from + i, width - i);
    const float mean = sum(total) / float(width);
    F32 squares = {};
    for (int64_t i = 0; i < width; i += kLanes) {
        const F32 v = keep_up_to(load_up_to(from + i, width - i) - mean, width - i);
        squares = fma(v, v, squares);
    }
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / float(width) + eps);
    for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t left = width - i;
        F32 v = (load_up_to(from + i, left) - mean) * rstd * load_up_to(weight + i, left);
        if (bias) v += load_up_to(bias + i, left);
        store_up_to(to + i, v, left);
    }
    stats[0] = mean, stats[1] = rstd;
}

}  // namespace nybble::NYBBLE_ISA
