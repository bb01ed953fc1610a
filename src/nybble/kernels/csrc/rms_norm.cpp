// RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) over rows, forward and backward; fp32 inside, one rounding out.
//
//     rstd = 1 / sqrt(mean(x^2) + eps)        y = x * rstd * (weight + weight_offset)
//     with g = dy * (weight + weight_offset) and n = x * rstd:   dx = rstd * (g - n * mean(g * n)),   dw = sum dy * n
//
// A row is (outer, inner): x + outer * stride + inner * width, so that the heads inside a fused q/k/v buffer are rows
// too. Each row is read twice, the second time from the cache: memory sets the pace.
#include "rms_norm.h"

#include "dispatch.h"

namespace nybble::NYBBLE_ISA {

template <typename T, typename W>
static void forward_rows(const T* x, int64_t x_stride, const W* weight, float weight_offset, float eps, int64_t outer,
                         int64_t inner, int64_t width, T* y, int64_t y_stride, float* rstd) {
#pragma omp parallel for schedule(static) if (outer * inner * width > 16384)
    for (int64_t row = 0; row < outer * inner; ++row) {
        const int64_t offset = row % inner * width;
        rstd[row] = rms_norm_row(x + row / inner * x_stride + offset, weight, weight_offset, eps, width,
                                 y + row / inner * y_stride + offset);
    }
}

template <typename T, typename W>
static void backward_rows(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const W* weight,
                          float weight_offset, const float* rstd, int64_t outer, int64_t inner, int64_t width, T* dx,
                          int64_t dx_stride, int accumulate) {
#pragma omp parallel for schedule(static) if (outer * inner * width > 16384)
    for (int64_t row = 0; row < outer * inner; ++row) {
        const int64_t offset = row % inner * width;
        const T *g = dy + row / inner * dy_stride + offset, *from = x + row / inner * x_stride + offset;
        T* to = dx + row / inner * dx_stride + offset;
        F32 products = {};
        for (int64_t i = 0; i < width; i += kLanes) {
            const F32 gain = load_up_to(weight + i, width - i) + weight_offset;
            products = fma(load_up_to(g + i, width - i) * gain, load_up_to(from + i, width - i), products);
        }
        const float r = rstd[row], mean = sum(products) * r / float(width);  // of g * n
        for (int64_t i = 0; i < width; i += kLanes) {
            const F32 gain = load_up_to(weight + i, width - i) + weight_offset;
            const F32 n = load_up_to(from + i, width - i) * r;
            F32 result = (load_up_to(g + i, width - i) * gain - n * mean) * r;
            if (accumulate) result += load_up_to(to + i, width - i);
            store_up_to(to + i, result, width - i);
        }
    }
}

// x and y share one type, the weight has its own; y may be x.
void rms_norm(const void* x, int64_t x_stride, int dtype, const void* weight, int weight_dtype, float weight_offset,
              float eps, int64_t outer, int64_t inner, int64_t width, void* y, int64_t y_stride, float* rstd) {
#define RUN(T, W) \
    forward_rows((const T*)x, x_stride, (const W*)weight, weight_offset, eps, outer, inner, width, (T*)y, y_stride, rstd)
    NYBBLE_OF_TWO_TYPES(dtype, weight_dtype, RUN)
#undef RUN
}

// dx may be dy, or, where `accumulate` is set, hold a gradient that is added to.
void rms_norm_backward(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, int dtype,
                       const void* weight, int weight_dtype, float weight_offset, const float* rstd, int64_t outer,
                       int64_t inner, int64_t width, void* dx, int64_t dx_stride, int accumulate) {
#define RUN(T, W)                                                                                                 \
    backward_rows((const T*)dy, dy_stride, (const T*)x, x_stride, (const W*)weight, weight_offset, rstd, outer, \
                  inner, width, (T*)dx, dx_stride, accumulate)
    NYBBLE_OF_TWO_TYPES(dtype, weight_dtype, RUN)
#undef RUN
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(rms_norm,
             (const void* x, int64_t x_stride, int dtype, const void* weight, int weight_dtype, float weight_offset,
              float eps, int64_t outer, int64_t inner, int64_t width, void* y, int64_t y_stride, float* rstd),
             (x, x_stride, dtype, weight, weight_dtype, weight_offset, eps, outer, inner, width, y, y_stride, rstd))

NYBBLE_ENTRY(rms_norm_backward,
             (const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, int dtype, const void* weight,
              int weight_dtype, float weight_offset, const float* rstd, int64_t outer, int64_t inner, int64_t width,
              void* dx, int64_t dx_stride, int accumulate),
             (dy, dy_stride, x, x_stride, dtype, weight, weight_dtype, weight_offset, rstd, outer, inner, width, dx,
              dx_stride, accumulate))
