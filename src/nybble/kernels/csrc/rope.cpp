// Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in place: with a = x[i] and b = x[i + R/2] for i < R/2,
// or with neighbours, a = x[2 i] and b = x[2 i + 1], (a, b) -> (a cos - b sin, b cos + a sin); elements from R on stay.
// The backward is the transposed rotation, (a, b) -> (a cos + b sin, b cos - a sin), whatever cos and sin hold.
#include "rope.h"

#include "dispatch.h"

namespace nybble::NYBBLE_ISA {

template <typename T, void (*kTurn)(T*, const float*, const float*, int64_t, float)>
static void rotate(T* x, int64_t tokens, int64_t stride, int64_t heads, int64_t head_dim, const float* cos,
                   const float* sin, int64_t half, float direction) {
#pragma omp parallel for schedule(static) if (tokens * heads * head_dim > 16384)
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t head = 0; head < heads; ++head)
            kTurn(x + token * stride + head * head_dim, cos + token * half, sin + token * half, half, direction);
    }
}

// x [tokens, heads, head_dim], tokens `stride` elements apart; cos, sin [tokens, half].
void rope(void* x, int dtype, int64_t tokens, int64_t stride, int64_t heads, int64_t head_dim, const float* cos,
          const float* sin, int64_t half, int neighbours, int backward) {
    const float direction = backward ? -1.0f : 1.0f;
#define RUN(T, turn) rotate<T, turn<T>>((T*)x, tokens, stride, heads, head_dim, cos, sin, half, direction)
    if (dtype == NYBBLE_F32 && !neighbours) RUN(float, rotate_head);
    if (dtype == NYBBLE_F32 && neighbours) RUN(float, rotate_neighbours);
    if (dtype == NYBBLE_BF16 && !neighbours) RUN(bf16, rotate_head);
    if (dtype == NYBBLE_BF16 && neighbours) RUN(bf16, rotate_neighbours);
#undef RUN
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(rope,
             (void* x, int dtype, int64_t tokens, int64_t stride, int64_t heads, int64_t head_dim, const float* cos,
              const float* sin, int64_t half, int neighbours, int backward),
             (x, dtype, tokens, stride, heads, head_dim, cos, sin, half, neighbours, backward))
