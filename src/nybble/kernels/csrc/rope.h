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

// The same with neighbours in place of halves: a = x[2 i], b = x[2 i + 1].
template <typename T>
inline void rotate_neighbours(T* x, const float* cos, const float* sin, int64_t half, float direction) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const F32 cosine = load_up_to(cos + i, half - i), sine = load_up_to(sin + i, half - i) * direction;
        const int64_t left = 2 * (half - i);
        float pairs[2 * kLanes] = {};
        store(pairs, load_up_to(x + 2 * i, left));
        if (left > kLanes) store(pairs + kLanes, load_up_to(x + 2 * i + kLanes, left - kLanes));
        F32 a, b;
        for (int j = 0; j < kLanes; ++j) a[j] = pairs[2 * j], b[j] = pairs[2 * j + 1];
        const F32 first = fma(a, cosine, -(b * sine)), second = fma(b, cosine, a * sine);
        for (int j = 0; j < kLanes; ++j) pairs[2 * j] = first[j], pairs[2 * j + 1] = second[j];
        store_up_to(x + 2 * i, load(pairs), left);
        if (left > kLanes) store_up_to(x + 2 * i + kLanes, load(pairs + kLanes), left - kLanes);
    }
}

}  // namespace nybble::NYBBLE_ISA
