// Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in place, in Hugging Face's half-rotation layout:
// with a = x[i] and b = x[i + R/2] for i < R/2, (a, b) -> (a cos - b sin, b cos + a sin); elements from R on stay.
// The backward is the transposed rotation, (a, b) -> (a cos + b sin, b cos - a sin), whatever cos and sin hold.
#include "rope.h"

#include "dispatch.h"

namespace nybble::NYBBLE_ISA {

template <typename T>
static void rotate(T* x, int64_t tokens, int64_t stride, int64_t heads, int64_t head_dim, const float* cos,
                   const float* sin, int64_t half, float direction) {
#pragma omp parallel for schedule(static) if (tokens * heads * head_dim > 16384)
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t head = 0; head < heads; ++head)
            rotate_head(x + token * stride + head * head_dim, cos + token * half, sin + token * half, half, direction);
    }
}

// x [tokens, heads, head_dim], tokens `stride` elements apart; cos, sin [tokens, half].
void rope(void* x, int dtype, int64_t tokens, int64_t stride, int64_t heads, int64_t head_dim, const float* cos,
          const float* sin, int64_t half, int backward) {
    const float direction = backward ? -1.0f : 1.0f;
    if (dtype == NYBBLE_F32) rotate((float*)x, tokens, stride, heads, head_dim, cos, sin, half, direction);
    if (dtype == NYBBLE_BF16) rotate((bf16*)x, tokens, stride, heads, head_dim, cos, sin, half, direction);
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(rope,
             (void* x, int dtype, int64_t tokens, int64_t stride, int64_t heads, int64_t head_dim, const float* cos,
              const float* sin, int64_t half, int backward),
             (x, dtype, tokens, stride, heads, head_dim, cos, sin, half, backward))
