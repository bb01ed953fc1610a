// SwiGLU (Shazeer 2020, arXiv 2002.05202): act = silu(gate) * up, and its backward; fp32 inside, one rounding out.
//
//     s = sigmoid(gate):   dgate = dact * up * s * (1 + gate * (1 - s)),   dup = dact * gate * s
//
// Rows may lie apart (gate and up are often halves of one buffer), and every output may be any of the inputs.
#include "swiglu.h"

#include "dispatch.h"

namespace nybble::NYBBLE_ISA {

template <typename T>
static void forward_rows(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t rows,
                         int64_t width, T* act, int64_t act_stride) {
#pragma omp parallel for schedule(static) if (rows * width > 16384)
    for (int64_t row = 0; row < rows; ++row)
        swiglu_row(gate + row * gate_stride, up + row * up_stride, width, act + row * act_stride);
}

template <typename T>
static void backward_rows(const T* dact, int64_t dact_stride, const T* gate, int64_t gate_stride, const T* up,
                          int64_t up_stride, int64_t rows, int64_t width, T* dgate, int64_t dgate_stride, T* dup,
                          int64_t dup_stride, T* act, int64_t act_stride) {
#pragma omp parallel for schedule(static) if (rows * width > 16384)
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < width; i += kLanes) {
            const int64_t left = width - i;
            const F32 d = load_up_to(dact + row * dact_stride + i, left);
            const F32 g = load_up_to(gate + row * gate_stride + i, left);
            const F32 u = load_up_to(up + row * up_stride + i, left);
            const F32 s = sigmoid(g), silu = g * s;
            store_up_to(dgate + row * dgate_stride + i, d * u * fma(silu, 1.0f - s, s), left);
            store_up_to(dup + row * dup_stride + i, d * silu, left);
            if (act) store_up_to(act + row * act_stride + i, silu * u, left);
        }
    }
}

void swiglu(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int dtype, int64_t rows,
            int64_t width, void* act, int64_t act_stride) {
#define RUN(T) forward_rows((const T*)gate, gate_stride, (const T*)up, up_stride, rows, width, (T*)act, act_stride)
    if (dtype == NYBBLE_F32) RUN(float);
    if (dtype == NYBBLE_BF16) RUN(bf16);
#undef RUN
}

// `act`, which a recomputing backward needs again, may be null.
void swiglu_backward(const void* dact, int64_t dact_stride, const void* gate, int64_t gate_stride, const void* up,
                     int64_t up_stride, int dtype, int64_t rows, int64_t width, void* dgate, int64_t dgate_stride,
                     void* dup, int64_t dup_stride, void* act, int64_t act_stride) {
#define RUN(T)                                                                                                  \
    backward_rows((const T*)dact, dact_stride, (const T*)gate, gate_stride, (const T*)up, up_stride, rows, width, \
                  (T*)dgate, dgate_stride, (T*)dup, dup_stride, (T*)act, act_stride)
    if (dtype == NYBBLE_F32) RUN(float);
    if (dtype == NYBBLE_BF16) RUN(bf16);
#undef RUN
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(swiglu,
             (const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int dtype, int64_t rows,
              int64_t width, void* act, int64_t act_stride),
             (gate, gate_stride, up, up_stride, dtype, rows, width, act, act_stride))

NYBBLE_ENTRY(swiglu_backward,
             (const void* dact, int64_t dact_stride, const void* gate, int64_t gate_stride, const void* up,
              int64_t up_stride, int dtype, int64_t rows, int64_t width, void* dgate, int64_t dgate_stride, void* dup,
              int64_t dup_stride, void* act, int64_t act_stride),
             (dact, dact_stride, gate, gate_stride, up, up_stride, dtype, rows, width, dgate, dgate_stride, dup,
              dup_stride, act, act_stride))
