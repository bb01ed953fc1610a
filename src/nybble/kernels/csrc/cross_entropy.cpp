// Softmax cross-entropy of rows of logits: the loss of each row, and its gradient in place of the logits.
//
//     loss = log sum exp(x) - x[target]        gradient = (softmax(x) - onehot(target)) * gradient_scale
//
// Rows whose target is negative are not supervised: loss 0, gradient 0. A row is read for its largest value, then for
// the exponentials, kept in fp32 while their sum is not known; at 49,152 logits both stay in the second-level cache.
#include <cstdlib>

#include "dispatch.h"
#include "threads.h"
#include "vec.h"

namespace nybble::NYBBLE_ISA {

// One row; `exponentials` has room for `width` values and is overwritten. Returns the loss.
template <typename T>
static float one_row(T* x, int64_t target, int64_t width, float gradient_scale, float* exponentials) {
    const int64_t whole = width - width % kLanes;
    F32 tops = splat(-__builtin_inff());
    for (int64_t i = 0; i < whole; i += kLanes) tops = max(load(x + i), tops);
    float top = largest(tops);
    for (int64_t i = whole; i < width; ++i) top = to_float(x[i]) > top ? to_float(x[i]) : top;

    F32 sums = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
        const F32 e = exp(load(x + i) - top);
        store(exponentials + i, e);
        sums += e;
    }
    float total = sum(sums);
    if (whole < width) {
        store(exponentials + whole, exp(load(x + whole, int(width - whole)) - top), int(width - whole));
        for (int64_t i = whole; i < width; ++i) total += exponentials[i];
    }

    // Relative to the largest logit: far from zero, log sum exp(x) itself has lost its last digits.
    const float loss = __builtin_logf(total) - (to_float(x[target]) - top), multiplier = gradient_scale / total;
    for (int64_t i = 0; i < width; i += kLanes)
        store_up_to(x + i, load_up_to(exponentials + i, width - i) * multiplier, width - i);
    from_float((exponentials[target] / total - 1.0f) * gradient_scale, x + target);
    return loss;
}

template <typename T>
static void rows_in_place(T* logits, int64_t stride, const int64_t* targets, int64_t rows, int64_t width,
                          float gradient_scale, float* losses) {
    const int64_t per_thread = (width + 15) / 16 * 16;
    float* memory = (float*)allocate_scratch(size_t(max_threads() * per_thread) * sizeof(float));
    if (!memory) return;
#pragma omp parallel if (rows * width > 16384)
    {
        float* exponentials = memory + thread_index() * per_thread;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            T* x = logits + row * stride;
            if (targets[row] >= 0) {
                losses[row] = one_row(x, targets[row], width, gradient_scale, exponentials);
            } else {
                losses[row] = 0.0f;
                memset(x, 0, size_t(width) * sizeof(T));
            }
        }
    }
    free(memory);
}

void cross_entropy(void* logits, int64_t stride, int dtype, const int64_t* targets, int64_t rows, int64_t width,
                   float gradient_scale, float* losses) {
    if (dtype == NYBBLE_F32) rows_in_place((float*)logits, stride, targets, rows, width, gradient_scale, losses);
    if (dtype == NYBBLE_BF16) rows_in_place((bf16*)logits, stride, targets, rows, width, gradient_scale, losses);
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(cross_entropy,
             (void* logits, int64_t stride, int dtype, const int64_t* targets, int64_t rows, int64_t width,
              float gradient_scale, float* losses),
             (logits, stride, dtype, targets, rows, width, gradient_scale, losses))
