// SwiGLU and GeGLU (Shazeer 2020, arXiv 2002.05202): act = activation(gate) * up, and its backward; fp32 inside, one
// rounding out. With activation(g) = g * s, s = sigmoid(a(g)):
//
//     dgate = dact * up * (s + gate * s * (1 - s) * a'(gate)),   dup = dact * gate * s
//
// And GELU without a gate: act = activation(x), dx = dact * (s + x * s * (1 - s) * a'(x)).
//
// Rows may lie apart (gate and up are often halves of one buffer), and every output may be any of the inputs.
#include "glu.h"

#include "dispatch.h"

namespace nybble::NYBBLE_ISA {

template <class A, typename T>
static void forward_rows(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t rows,
                         int64_t width, T* act, int64_t act_stride) {
#pragma omp parallel for schedule(static) if (rows * width > 16384)
    for (int64_t row = 0; row < rows; ++row)
        glu_row<A>(gate + row * gate_stride, up + row * up_stride, width, act + row * act_stride);
}

template <class A, typename T>
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
            const F32 s = sigmoid(A::argument(g)), activated = g * s;
            const F32 slope = fma(activated * A::argument_slope(g), 1.0f - s, s);
            store_up_to(dgate + row * dgate_stride + i, d * u * slope, left);
            store_up_to(dup + row * dup_stride + i, d * activated, left);
            if (act) store_up_to(act + row * act_stride + i, activated * u, left);
        }
    }
}

template <typename T>
static void gelu_rows(const T* x, int64_t x_stride, int64_t rows, int64_t width, T* act, int64_t act_stride) {
#pragma omp parallel for schedule(static) if (rows * width > 16384)
    for (int64_t row = 0; row < rows; ++row) activate_row<Gelu>(x + row * x_stride, width, act + row * act_stride);
}

template <typename T>
static void gelu_backward_rows(const T* dact, int64_t dact_stride, const T* x, int64_t x_stride, int64_t rows,
                               int64_t width, T* dx, int64_t dx_stride, T* act, int64_t act_stride) {
#pragma omp parallel for schedule(static) if (rows * width > 16384)
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < width; i += kLanes) {
            const int64_t left = width - i;
            const F32 d = load_up_to(dact + row * dact_stride + i, left);
            const F32 v = load_up_to(x + row * x_stride + i, left);
            const F32 s = sigmoid(Gelu::argument(v)), activated = v * s;
            const F32 slope = fma(activated * Gelu::argument_slope(v), 1.0f - s, s);
            store_up_to(dx + row * dx_stride + i, d * slope, left);
            if (act) store_up_to(act + row * act_stride + i, activated, left);
        }
    }
}

template <class A>
static void forward(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int dtype, int64_t rows,
                    int64_t width, void* act, int64_t act_stride) {
#define RUN(T) \
    forward_rows<A>((const T*)gate, gate_stride, (const T*)up, up_stride, rows, width, (T*)act, act_stride)
    if (dtype == NYBBLE_F32) RUN(float);
    if (dtype == NYBBLE_BF16) RUN(bf16);
#undef RUN
}

// `act`, which a recomputing backward needs again, may be null.
template <class A>
static void backward(const void* dact, int64_t dact_stride, const void* gate, int64_t gate_stride, const void* up,
                     int64_t up_stride, int dtype, int64_t rows, int64_t width, void* dgate, int64_t dgate_stride,
                     void* dup, int64_t dup_stride, void* act, int64_t act_stride) {
#define RUN(T)                                                                                                     \
    backward_rows<A>((const T*)dact, dact_stride, (const T*)gate, gate_stride, (const T*)up, up_stride, rows, width, \
                     (T*)dgate, dgate_stride, (T*)dup, dup_stride, (T*)act, act_stride)
    if (dtype == NYBBLE_F32) RUN(float);
    if (dtype == NYBBLE_BF16) RUN(bf16);
#undef RUN
}

#define FORWARD_PARAMETERS                                                                                          \
    (const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int dtype, int64_t rows, int64_t width, \
     void* act, int64_t act_stride)
#define FORWARD_ARGUMENTS (gate, gate_stride, up, up_stride, dtype, rows, width, act, act_stride)
#define BACKWARD_PARAMETERS                                                                                        \
    (const void* dact, int64_t dact_stride, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, \
     int dtype, int64_t rows, int64_t width, void* dgate, int64_t dgate_stride, void* dup, int64_t dup_stride,        \
     void* act, int64_t act_stride)
#define BACKWARD_ARGUMENTS                                                                                             \
    (dact, dact_stride, gate, gate_stride, up, up_stride, dtype, rows, width, dgate, dgate_stride, dup, dup_stride, act, \
     act_stride)

void swiglu FORWARD_PARAMETERS { forward<Silu> FORWARD_ARGUMENTS; }
void geglu FORWARD_PARAMETERS { forward<Gelu> FORWARD_ARGUMENTS; }
void swiglu_backward BACKWARD_PARAMETERS { backward<Silu> BACKWARD_ARGUMENTS; }
void geglu_backward BACKWARD_PARAMETERS { backward<Gelu> BACKWARD_ARGUMENTS; }

void gelu(const void* x, int64_t x_stride, int dtype, int64_t rows, int64_t width, void* act, int64_t act_stride) {
    if (dtype == NYBBLE_F32) gelu_rows((const float*)x, x_stride, rows, width, (float*)act, act_stride);
    if (dtype == NYBBLE_BF16) gelu_rows((const bf16*)x, x_stride, rows, width, (bf16*)act, act_stride);
}

// `act` may be null, as above.
void gelu_backward(const void* dact, int64_t dact_stride, const void* x, int64_t x_stride, int dtype, int64_t rows,
                   int64_t width, void* dx, int64_t dx_stride, void* act, int64_t act_stride) {
#define RUN(T)                                                                                                     \
    gelu_backward_rows((const T*)dact, dact_stride, (const T*)x, x_stride, rows, width, (T*)dx, dx_stride, (T*)act, \
                       act_stride)
    if (dtype == NYBBLE_F32) RUN(float);
    if (dtype == NYBBLE_BF16) RUN(bf16);
#undef RUN
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(gelu,
             (const void* x, int64_t x_stride, int dtype, int64_t rows, int64_t width, void* act, int64_t act_stride),
             (x, x_stride, dtype, rows, width, act, act_stride))
NYBBLE_ENTRY(gelu_backward,
             (const void* dact, int64_t dact_stride, const void* x, int64_t x_stride, int dtype, int64_t rows,
              int64_t width, void* dx, int64_t dx_stride, void* act, int64_t act_stride),
             (dact, dact_stride, x, x_stride, dtype, rows, width, dx, dx_stride, act, act_stride))
NYBBLE_ENTRY(swiglu, FORWARD_PARAMETERS, FORWARD_ARGUMENTS)
NYBBLE_ENTRY(geglu, FORWARD_PARAMETERS, FORWARD_ARGUMENTS)
NYBBLE_ENTRY(swiglu_backward, BACKWARD_PARAMETERS, BACKWARD_ARGUMENTS)
NYBBLE_ENTRY(geglu_backward, BACKWARD_PARAMETERS, BACKWARD_ARGUMENTS)
