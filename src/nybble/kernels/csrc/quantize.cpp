// fp32, bf16 or fp16 to four, three or two bits, and block scales to eight: the bits of nybble/formats/{blockwise,double_quant}.py.
//
// Each block is read twice, for its scale and for its indices; the second time it is in the first-level cache. The
// nearest of 16 levels is the number of midpoints below x / scale: with AVX-512 a binary search whose four probes are
// permutes of one register, else a count over all fifteen. Floor for 4096 x 11008 from bf16: 90 MB read, 23 MB written.
#include "dispatch.h"
#include "four_bit.h"

namespace nybble::NYBBLE_ISA {

// v rounded to an integer, half to even, for |v| < 2^22.
static F32 round_even(F32 v) { return (v + 12582912.0f) - 12582912.0f; }

// Indices (0..15 in each lane) to bytes, the even element in the high nibble; writes ceil(count / 2) bytes.
static void pack(I32 index, int64_t count, uint8_t* out) {
    uint8_t bytes[kLanes / 2];
#if defined(__AVX512F__)
    const __m512i pair = (__m512i)index;  // 64 bits: even index below, odd index above
    const __m512i byte = _mm512_or_si512(_mm512_slli_epi64(pair, 4), _mm512_srli_epi64(pair, 32));
    _mm_storel_epi64((__m128i*)bytes, _mm512_cvtepi64_epi8(byte));
#else
    for (int i = 0; i < kLanes / 2; ++i) bytes[i] = uint8_t(index[2 * i] << 4 | index[2 * i + 1]);
#endif
    if (count >= kLanes) {
        memcpy(out, bytes, sizeof bytes);
    } else {
        memcpy(out, bytes, size_t(count + 1) / 2);
    }
}

// Indices of `bits` 3 or 2 to the planes of a block (nybble/formats/quantized_tensor.py): the low two bits four to a byte,
// the third bits eight to a byte behind them. `at` is the first element's place in the block, `count` the block's length.
static void pack_planes(I32 index, int bits, int64_t at, int64_t count, uint8_t* block) {
    typedef uint8_t U8 __attribute__((vector_size(kLanes)));
    const int64_t valid = count - at < kLanes ? count - at : kLanes;
    const U8 lanes = __builtin_convertvector(index, U8);
    uint64_t words[kLanes / 8] = {};  // a lane in each byte, zero beyond the end
    memcpy(words, &lanes, size_t(valid));
    uint8_t low[kLanes / 4], high[kLanes / 8];
    for (int i = 0; i < kLanes / 8; ++i) {
        uint64_t x = words[i] & 0x0303030303030303;
        x = (x | x >> 6) & 0x000F000F000F000F;
        x = (x | x >> 12) & 0x000000FF000000FF;
        x = x | x >> 24;
        low[2 * i] = uint8_t(x);
        low[2 * i + 1] = uint8_t(x >> 8);
        high[i] = uint8_t((words[i] >> 2 & 0x0101010101010101) * 0x0102040810204080 >> 56);
    }
    memcpy(block + at / 4, low, size_t(valid + 3) / 4);
    if (bits == 3) memcpy(block + (count + 3) / 4 + at / 8, high, size_t(valid + 7) / 8);
}

// The bits of the largest |x|: as integers NaN > infinity > every finite value, so that neither is lost.
template <typename T>
static uint32_t largest_magnitude(const T* x, int64_t count) {
    I32 top = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const I32 magnitude = (I32)load_up_to(x + i, count - i) & 0x7FFFFFFF;
        top = magnitude > top ? magnitude : top;
    }
#if defined(__AVX512F__)
    return uint32_t(_mm512_reduce_max_epi32((__m512i)top));
#else
    int32_t result = 0;
    for (int i = 0; i < kLanes; ++i) result = top[i] > result ? top[i] : result;
    return uint32_t(result);
#endif
}

template <typename T>
static void quantize_symmetric(const T* x, int64_t count, bool whole, const Levels& levels, uint8_t* packed,
                               float* scale) {
    const float largest = float_of(largest_magnitude(x, count)), divisor = largest < kMinScale ? kMinScale : largest;
    *scale = whole ? largest : divisor;
    const F32 reciprocal = splat(1.0f / divisor);
    for (int64_t i = 0; i < count; i += kLanes) {
        const F32 v = load_up_to(x + i, count - i);
        pack(levels.nearest(whole ? v * reciprocal : v / divisor), count - i, packed + i / 2);
    }
}

// nf3, nf2: the scale is the value of largest magnitude, sign included; of two such, the positive one.
template <typename T>
static void quantize_signed(const T* x, int64_t count, int bits, const Levels& levels, uint8_t* block, float* scale) {
    const float magnitude = float_of(largest_magnitude(x, count));
    F32 high = {};
    for (int64_t i = 0; i < count; i += kLanes) high = max(load_up_to(x + i, count - i), high);
    const float sign = largest(high) == magnitude ? 1.0f : -1.0f;
    *scale = sign * magnitude;
    const F32 reciprocal = splat(1.0f / (sign * (magnitude < kMinScale ? kMinScale : magnitude)));
    for (int64_t i = 0; i < count; i += kLanes)
        pack_planes(levels.nearest(load_up_to(x + i, count - i) * reciprocal), bits, i, count, block);
}

template <typename T>
static void quantize_asymmetric(const T* x, int64_t count, uint8_t* packed, float* scale, uint8_t* zero_point) {
    F32 low = {}, high = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const F32 v = load_up_to(x + i, count - i);
        low = min(v, low);
        high = max(v, high);
    }
    if (largest_magnitude(x, count) >= 0x7F800000u) {
        *scale = __builtin_nanf("");
        return;
    }
    *scale = (largest(high) + largest(-low)) / 15.0f;
    const float reciprocal = 1.0f / (*scale < kMinScale ? kMinScale : *scale);
    const F32 bottom = {}, top = splat(15.0f);
    const F32 zero = max(bottom, min(top, round_even(splat(largest(-low) * reciprocal))));
    *zero_point = uint8_t(zero[0]);
    for (int64_t i = 0; i < count; i += kLanes) {
        const F32 v = load_up_to(x + i, count - i);
        const F32 index = max(bottom, min(top, round_even(v * reciprocal) + zero));
        pack(__builtin_convertvector(index, I32), count - i, packed + i / 2);
    }
}

template <typename T>
static void quantize_from(const T* x, int64_t numel, int64_t block_size, const Levels& levels, int bits,
                          uint8_t* packed, float* scales, uint8_t* zero_points) {
    const int64_t blocks = (numel + block_size - 1) / block_size, turn = blocks_per_turn(block_size);
#pragma omp parallel for schedule(static) if (blocks > turn)
    for (int64_t begin = 0; begin < blocks; begin += turn) {
        const int64_t end = begin + turn < blocks ? begin + turn : blocks;
        for (int64_t block = begin; block < end; ++block) {
            const int64_t start = block * block_size;
            const int64_t count = numel - start < block_size ? numel - start : block_size;
            uint8_t* bytes = packed + block * (block_size / 8 * bits);
            if (bits < 4) {
                quantize_signed(x + start, count, bits, levels, bytes, scales + block);
            } else if (zero_points) {
                quantize_asymmetric(x + start, count, bytes, scales + block, zero_points + block);
            } else {
                quantize_symmetric(x + start, count, count == block_size, levels, bytes, scales + block);
            }
        }
    }
}

// Scales that are not finite afterwards mean that weights were not. With `zero_points`: int4_asym.
// midpoints [2^bits - 1], order [2^bits].
void quantize(const void* x, int dtype, int64_t numel, int64_t block_size, int bits, const float* midpoints,
              const uint8_t* order, uint8_t* packed, float* scales, uint8_t* zero_points) {
    const Levels levels(midpoints, order, 1 << bits);
    switch (dtype) {
        case NYBBLE_F32: return quantize_from((const float*)x, numel, block_size, levels, bits, packed, scales, zero_points);
        case NYBBLE_BF16: return quantize_from((const bf16*)x, numel, block_size, levels, bits, packed, scales, zero_points);
        case NYBBLE_F16: return quantize_from((const fp16*)x, numel, block_size, levels, bits, packed, scales, zero_points);
    }
}

// Block scales to 8 bits: codes [count], absmax2 [ceil(count / 256)].
void quantize_scales(const float* scales, int64_t count, float offset, const float* midpoints,
                     const uint8_t* first_code, uint8_t* codes, float* absmax2) {
    const int64_t blocks = (count + 255) / 256;
    const Codes nearest{midpoints, first_code};
#pragma omp parallel for schedule(static) if (blocks > 64)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = 256 * block, stop = count - start < 256 ? count : start + 256;
        float largest = 0.0f;
        for (int64_t i = start; i < stop; ++i) {
            const float magnitude = __builtin_fabsf(scales[i] - offset);
            largest = magnitude > largest ? magnitude : largest;
        }
        absmax2[block] = largest;
        const float reciprocal = 1.0f / (largest < kMinScale ? kMinScale : largest);
        for (int64_t i = start; i < stop; ++i) {
            codes[i] = nearest.nearest((scales[i] - offset) * reciprocal);
        }
    }
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(quantize,
             (const void* x, int dtype, int64_t numel, int64_t block_size, int bits, const float* midpoints,
              const uint8_t* order, uint8_t* packed, float* scales, uint8_t* zero_points),
             (x, dtype, numel, block_size, bits, midpoints, order, packed, scales, zero_points))

NYBBLE_ENTRY(quantize_scales,
             (const float* scales, int64_t count, float offset, const float* midpoints, const uint8_t* first_code,
              uint8_t* codes, float* absmax2),
             (scales, count, offset, midpoints, first_code, codes, absmax2))
