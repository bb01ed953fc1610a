// One AdamW step (Loshchilov and Hutter 2019, arXiv 1711.05101) over flat fp32 buffers, as torch.optim.AdamW does it:
//
//     p *= 1 - lr * weight_decay;   m += (1 - beta1) (g - m);   v = beta2 v + (1 - beta2) g^2
//     p -= step_size * m / (sqrt(v) / root_correction + eps)
//
// with g the gradient times `gradient_scale`, step_size = lr / (1 - beta1^t), root_correction = sqrt(1 - beta2^t).
// Every element goes through the same vector operations wherever it lies, so that splitting a buffer into pages or
// among threads changes no bit. 16 bytes read and 12 written an element: memory sets the pace.
#include "dispatch.h"
#include "vec.h"

namespace nybble::NYBBLE_ISA {

void adamw(float* parameter, const float* gradient, float* first_moment, float* second_moment, int64_t count,
           float decay, float one_minus_beta1, float beta2, float one_minus_beta2, float step_size,
           float root_correction, float eps, float gradient_scale) {
#pragma omp parallel for schedule(static) if (count > 16384)
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t left = count - i;
        const F32 g = load_up_to(gradient + i, left) * gradient_scale;
        const F32 m_before = load_up_to(first_moment + i, left);
        const F32 m = fma(g - m_before, splat(one_minus_beta1), m_before);
        const F32 v = fma(g * one_minus_beta2, g, load_up_to(second_moment + i, left) * beta2);
        const F32 denominator = sqrt(v) / root_correction + eps;
        const F32 p = load_up_to(parameter + i, left) * decay - m / denominator * step_size;
        store_up_to(first_moment + i, m, left);
        store_up_to(second_moment + i, v, left);
        store_up_to(parameter + i, p, left);
    }
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(adamw,
             (float* parameter, const float* gradient, float* first_moment, float* second_moment, int64_t count,
              float decay, float one_minus_beta1, float beta2, float one_minus_beta2, float step_size,
              float root_correction, float eps, float gradient_scale),
             (parameter, gradient, first_moment, second_moment, count, decay, one_minus_beta1, beta2, one_minus_beta2,
              step_size, root_correction, eps, gradient_scale))
