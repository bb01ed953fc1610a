// One row of RMSNorm's forward: what rms_norm.cpp and decode.cpp share.
#pragma once

#include "vec.h"

namespace nybble::NYBBLE_ISA {

// to = from * rstd * (weight + weight_offset) for `width` elements; returns rstd. `to` may be `from`.
template <typename T, typename W>
inline float rms_norm_row(const T* from, const W* weight, float weight_offset, float eps, int64_t width, T* to) {
    F32 squares = {};
    for (int64_t i = 0; i < width; i += kLanes) {
        const F32 v = load_up_to(from + i, width - i);
        squares = fma(v, v, squares);
    }
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / float(width) + eps);
    for (int64_t i = 0; i < width; i += kLanes) {
        const F32 gain = load_up_to(weight + i, width - i) + weight_offset;
        store_up_to(to + i, load_up_to(from + i, width - i) * rstd * gain, width - i);
    }
    return rstd;
}

}  // namespace nybble::NYBBLE_ISA
