// One head of a rotary position embedding: what rope.cpp and decode.cpp share.
#pragma once

#include "vec.h"

namespace nybble::NYBBLE_ISA {

// (a, b) -> (a cos - b sin, b cos + a sin) for a = x[i], b = x[i + half], i < half; `direction` -1 turns backwards.
template <typename T>
inline void rotate_head(T* x, const float* cos, const float* sin, int64_t half, float direction) {
    T* second = x + half;
    for (int64_t i = 0; i < half; i += kLanes) {
        const F32 cosine = load_up_to(cos + i, half - i), sine = load_up_to(sin + i, half - i) * direction;
        const F32 a = load_up_to(x + i, half - i), b = load_up_to(second + i, half - i);
        store_up_to(x + i, fma(a, cosine, -(b * sine)), half - i);
        store_up_to(second + i, fma(b, cosine, a * sine), half - i);
    }
}

}  // namespace nybble::NYBBLE_ISA
