// LayerNorm (Ba, Kiros and Hinton 2016, arXiv 1607.06450) over rows, forward and backward; fp32 inside, one rounding out.
//
//     n = (x - mean(x)) * rstd,   rstd = 1 / sqrt(mean((x - mean(x))^2) + eps)        y = n * weight + bias
//     with g = dy * weight:   dx = rstd * (g - mean(g) - n * mean(g * n))
//
// Rows as in rms_norm.cpp, (outer, inner): x + outer * stride + inner * width.
#include "layer_norm.h"

#include "dispatch.h"

namespace nybble::NYBBLE_ISA {

template <typename T, typename W>
static void forward_rows(const T* x, int64_t x_stride, const W* weight, const W* bias, float eps, int64_t outer,
                         int64_t inner, int64_t width, T* y, int64_t y_stride, float* stats) {
#pragma omp parallel for schedule(static) if (outer * inner * width > 16384)
    for (int64_t row = 0; row < outer * inner; ++row) {
        const int64_t offset = row % inner * width;
        layer_norm_row(x + row / inner * x_stride + offset, weight, bias, eps, width,
                       y + row / inner * y_stride + offset, stats + 2 * row);
    }
}

template <typename T, typename W>
static void backward_rows(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const W* weight,
                          const float* stats, int64_t outer, int64_t inner, int64_t width, T* dx, int64_t dx_stride,
                          int accumulate) {
#pragma omp parallel for schedule(static) if (outer * inner * width > 16384)
    for (int64_t row = 0; row < outer * inner; ++row) {
        const int64_t offset = row % inner * width;
        const T *g = dy + row / inner * dy_stride + offset, *from = x + row / inner * x_stride + offset;
        T* to = dx + row / inner * dx_stride + offset;
        const float mean = stats[2 * row], rstd = stats[2 * row + 1];
        F32 gains = {}, products = {};
        for (int64_t i = 0; i < width; i += kLanes) {
            const int64_t left = width - i;
            const F32 gain = load_up_to(g + i, left) * load_up_to(weight + i, left);  // zero beyond the row
            gains += gain;
            products = fma(gain, (load_up_to(from + i, left) - mean) * rstd, products);
        }
        const float mean_gain = sum(gains) / float(width), mean_product = sum(products) / float(width);
        for (int64_t i = 0; i < width; i += kLanes) {
            const int64_t left = width - i;
            const F32 n = (load_up_to(from + i, left) - mean) * rstd;
            const F32 gain = load_up_to(g + i, left) * load_up_to(weight + i, left);
            F32 result = (gain - mean_gain - n * mean_product) * rstd;
            if (accumulate) result += load_up_to(to + i, left);
            store_up_to(to + i, result, left);
        }
    }
}

// x and y share one type, weight and bias another; bias may be null, y may be x.
void layer_norm(const void* x, int64_t x_stride, int dtype, const void* weight, const void* bias, int weight_dtype,
                float eps, int64_t outer, int64_t inner, int64_t width, void* y, int64_t y_stride, float* stats) {
#define RUN(T, W)                                                                                                  \
    forward_rows((const T*)x, x_stride, (const W*)weight, (const W*)bias, eps, outer, inner, width, (T*)y, y_stride, \
                 stats)
    NYBBLE_OF_TWO_TYPES(dtype, weight_dtype, RUN)
#undef RUN
}

// dx may be dy, or, where `accumulate` is set, hold a gradient that is added to.
void layer_norm_backward(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, int dtype,
                         const void* weight, int weight_dtype, const float* stats, int64_t outer, int64_t inner,
                         int64_t width, void* dx, int64_t dx_stride, int accumulate) {
#define RUN(T, W)                                                                                               \
    backward_rows((const T*)dy, dy_stride, (const T*)x, x_stride, (const W*)weight, stats, outer, inner, width, \
                  (T*)dx, dx_stride, accumulate)
    NYBBLE_OF_TWO_TYPES(dtype, weight_dtype, RUN)
#undef RUN
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(layer_norm,
             (const void* x, int64_t x_stride, int dtype, const void* weight, const void* bias, int weight_dtype,
              float eps, int64_t outer, int64_t inner, int64_t width, void* y, int64_t y_stride, float* stats),
             (x, x_stride, dtype, weight, bias, weight_dtype, eps, outer, inner, width, y, y_stride, stats))

NYBBLE_ENTRY(layer_norm_backward,
             (const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, int dtype, const void* weight,
              int weight_dtype, const float* stats, int64_t outer, int64_t inner, int64_t width, void* dx,
              int64_t dx_stride, int accumulate),
             (dy, dy_stride, x, x_stride, dtype, weight, weight_dtype, stats, outer, inner, width, dx, dx_stride,
              accumulate))
