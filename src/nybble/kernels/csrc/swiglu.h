// SwiGLU of a row: what swiglu.cpp and decode.cpp share.
#pragma once

#include "vec.h"

namespace nybble::NYBBLE_ISA {

// Kept to where 1 + e^-v is finite; beyond, sigmoid(v) is less than 1e-37.
inline F32 sigmoid(F32 v) { return reciprocal(1.0f + exp(min(splat(87.0f), -v))); }

// act = silu(gate) * up for `width` elements; act may be gate or up.
template <typename T>
inline void swiglu_row(const T* gate, const T* up, int64_t width, T* act) {
    for (int64_t i = 0; i < width; i += kLanes) {
        const F32 g = load_up_to(gate + i, width - i), u = load_up_to(up + i, width - i);
        store_up_to(act + i, g * sigmoid(g) * u, width - i);
    }
}

}  // namespace nybble::NYBBLE_ISA
