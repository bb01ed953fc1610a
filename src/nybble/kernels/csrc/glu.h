// Activations of a row, gated and not: what glu.cpp and decode.cpp share.
#pragma once

#include "vec.h"

namespace nybble::NYBBLE_ISA {

// Which of them; backends/cpp/decode.py holds the same numbers.
enum Gate : int64_t { GATE_SILU = 0, GATE_GELU = 1, GELU = 2 };

// Kept to where 1 + e^-v is finite; beyond, sigmoid(v) is less than 1e-37.
inline F32 sigmoid(F32 v) { return reciprocal(1.0f + exp(min(splat(87.0f), -v))); }

// Both activations are g * sigmoid(argument(g)), with the slope s + g s (1 - s) * argument'(g) for s = sigmoid(..).
struct Silu {
    static F32 argument(F32 g) { return g; }
    static F32 argument_slope(F32) { return splat(1.0f); }
};

// GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415) by its tanh approximation: (1 + tanh(z)) / 2 = sigmoid(2 z) for
// z = sqrt(2 / pi) (g + 0.044715 g^3). Beyond 16 the sigmoid is 0 or 1 in fp32, and g^3 might not be finite.
struct Gelu {
    static constexpr float kTwice = 1.59576912f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
    static F32 near(F32 g) { return max(splat(-16.0f), min(splat(16.0f), g)); }
    static F32 argument(F32 g) {
        const F32 v = near(g);
        return v * kTwice * fma(v * v, splat(kCubic), splat(1.0f));
    }
    static F32 argument_slope(F32 g) {
        const F32 v = near(g);
        return kTwice * fma(v * v, splat(3.0f * kCubic), splat(1.0f));
    }
};

// act = activation(gate) * up for `width` elements; act may be gate or up.
template <class A, typename T>
inline void glu_row(const T* gate, const T* up, int64_t width, T* act) {
    for (int64_t i = 0; i < width; i += kLanes) {
        const F32 g = load_up_to(gate + i, width - i), u = load_up_to(up + i, width - i);
        store_up_to(act + i, g * sigmoid(A::argument(g)) * u, width - i);
    }
}

// act = activation(x) for `width` elements; act may be x.
template <class A, typename T>
inline void activate_row(const T* x, int64_t width, T* act) {
    for (int64_t i = 0; i < width; i += kLanes) {
        const F32 v = load_up_to(x + i, width - i);
        store_up_to(act + i, v * sigmoid(A::argument(v)), width - i);
    }
}

}  // namespace nybble::NYBBLE_ISA
