// One AdamW step (Loshchilov and Hutter 2019, arXiv 1711.05101) over flat fp32 buffers, as torch.optim.AdamW does it:
//
//     p *= 1 - lr * weight_decay;   m += (1 - beta1) (g - m);   v = beta2 v + (1 - beta2) g^2
//     p -= step_size * m / (sqrt(v) / root_correction + eps)
//
// with g the gradient times `gradient_scale`, step_size = lr / (1 - beta1^t), root_correction = sqrt(1 - beta2^t).
// Every element goes through the same vector operations wherever it lies, so that splitting a buffer into pages or
// among threads changes no bit. 16 bytes read and 12 written an element: memory sets the pace.
//
// `adamw_8bit` keeps m and v as codes of the dynamic map with a scale for each 256 elements (arXiv 2110.02861; see
// kernels/ops/optimizer.py): a block is widened, updated as above, and rounded to the nearest codes of its new scales.
#include "dispatch.h"
#include "vec.h"

namespace nybble::NYBBLE_ISA {

namespace {

constexpr int kBlock = 256;
constexpr int kSignedZero = 127;     // the signed map's code for 0
constexpr float kTiniest = 1e-38f;  // smaller scales count as it when dividing

inline F32 gather(const float* table, I32 index) {
#if defined(__AVX512F__)
    return (F32)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
    return (F32)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    F32 values;
    for (int lane = 0; lane < kLanes; lane++) values[lane] = table[index[lane]];
    return values;
#endif
}

// The number of the 255 ascending midpoints that are below x: the nearest code.
inline I32 nearest(const float* midpoints, F32 x) {
    I32 code = {};
    for (int step = 128; step; step >>= 1) code += (I32)(gather(midpoints, code + (step - 1)) < x) & step;
    return code;
}

inline void store_codes(uint8_t* codes, I32 values, int count) {
    for (int lane = 0; lane < (count < kLanes ? count : kLanes); lane++) codes[lane] = uint8_t(values[lane]);
}

}  // namespace

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

void adamw_8bit(float* parameter, const float* gradient, uint8_t* first_codes, uint8_t* second_codes,
                float* first_scales, float* second_scales, const float* signed_map, const float* signed_midpoints,
                const float* unsigned_map, const float* unsigned_midpoints, int64_t count, float decay,
                float one_minus_beta1, float beta2, float one_minus_beta2, float step_size, float root_correction,
                float eps, float gradient_scale) {
    const int64_t blocks = (count + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) if (blocks > 64)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * kBlock;
        const int size = int(count - start < kBlock ? count - start : kBlock);
        alignas(64) float first[kBlock] = {}, second[kBlock] = {};
        for (int i = 0; i < size; i++) {
            first[i] = signed_map[first_codes[start + i]] * first_scales[block];
            second[i] = unsigned_map[second_codes[start + i]] * second_scales[block];
        }
        F32 most_first = {}, most_second = {};
        for (int i = 0; i < size; i += kLanes) {
            const F32 g = load_up_to(gradient + start + i, size - i) * gradient_scale;
            const F32 m_before = load(first + i);
            const F32 m = fma(g - m_before, splat(one_minus_beta1), m_before);
            const F32 v = fma(g * one_minus_beta2, g, load(second + i) * beta2);
            const F32 denominator = sqrt(v) / root_correction + eps;
            const F32 p = load_up_to(parameter + start + i, size - i) * decay - m / denominator * step_size;
            store_up_to(parameter + start + i, p, size - i);
            store(first + i, m);
            store(second + i, v);
            most_first = max(most_first, abs(m));
            most_second = max(most_second, v);
        }
        first_scales[block] = largest(most_first);
        second_scales[block] = largest(most_second);
        const float first_scale = first_scales[block] > kTiniest ? first_scales[block] : kTiniest;
        const float second_scale = second_scales[block] > kTiniest ? second_scales[block] : kTiniest;
        for (int i = 0; i < size; i += kLanes) {
            const F32 m = load(first + i);
            const I32 code = nearest(signed_midpoints, m / first_scale);
            const I32 lower = (I32)(code == splat(kSignedZero)) & (I32)(m < 0.0f);  // -1 where so
            store_codes(first_codes + start + i, code + lower, size - i);
            store_codes(second_codes + start + i, nearest(unsigned_midpoints, load(second + i) / second_scale), size - i);
        }
    }
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(adamw_8bit,
             (float* parameter, const float* gradient, uint8_t* first_codes, uint8_t* second_codes,
              float* first_scales, float* second_scales, const float* signed_map, const float* signed_midpoints,
              const float* unsigned_map, const float* unsigned_midpoints, int64_t count, float decay,
              float one_minus_beta1, float beta2, float one_minus_beta2, float step_size, float root_correction,
              float eps, float gradient_scale),
             (parameter, gradient, first_codes, second_codes, first_scales, second_scales, signed_map,
              signed_midpoints, unsigned_map, unsigned_midpoints, count, decay, one_minus_beta1, beta2,
              one_minus_beta2, step_size, root_correction, eps, gradient_scale))
NYBBLE_ENTRY(adamw,
             (float* parameter, const float* gradient, float* first_moment, float* second_moment, int64_t count,
              float decay, float one_minus_beta1, float beta2, float one_minus_beta2, float step_size,
              float root_correction, float eps, float gradient_scale),
             (parameter, gradient, first_moment, second_moment, count, decay, one_minus_beta1, beta2, one_minus_beta2,
              step_size, root_correction, eps, gradient_scale))
