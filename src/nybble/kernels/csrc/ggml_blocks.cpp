// ggml's blocks, as GGUF files hold them, to fp32, bf16 or fp16: the values that llama.cpp computes with, rounded once
// to the output type. Their layout is written down in nybble/formats/ggml_blocks.py.
//
// A block's codes become bytes first, its scales fp32; then every type is `code * scale - minimum` over parts of 16 or
// 32 codes. Floor for Q4_K to bf16: 0.56 bytes read and 2 written an element.
#include "dispatch.h"
#include "vec.h"

namespace nybble::NYBBLE_ISA {

enum BlockType : int { Q4_0, Q8_0, IQ4_NL, Q4_K, Q5_K, Q6_K, IQ4_XS };  // in the order of formats/ggml_blocks.py

static constexpr int8_t kCentred[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
static constexpr int8_t kNonLinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

inline float half_at(const uint8_t* bytes) {
    fp16 half;
    memcpy(&half, bytes, sizeof half);
    return to_float(half);
}

// out[i] = codes[i] * scale - minimum, two roundings, for `count` codes, a multiple of 16.
template <typename T>
inline void scaled(const int8_t* codes, int count, float scale, float minimum, T* out) {
    typedef int8_t I8 __attribute__((vector_size(kLanes)));
    const F32 by = splat(scale), less = splat(minimum);
    for (int i = 0; i < count; i += kLanes) {
        I8 bytes;
        memcpy(&bytes, codes + i, sizeof bytes);
        const F32 code = __builtin_convertvector(__builtin_convertvector(bytes, I32), F32);
        store_exact(out + i, code * by - less);
    }
}

// The low nibbles of `count` bytes, then the high ones.
inline void nibbles(const uint8_t* bytes, int count, int8_t* codes) {
    for (int i = 0; i < count; ++i) codes[i] = int8_t(bytes[i] & 15);
    for (int i = 0; i < count; ++i) codes[count + i] = int8_t(bytes[i] >> 4);
}

// table[nibble] of 16 bytes' low nibbles, then of their high ones.
inline void look_up(const int8_t* table, const uint8_t* bytes, int8_t* codes) {
#if defined(__AVX2__)
    const __m128i values = _mm_loadu_si128((const __m128i*)table), low = _mm_set1_epi8(15);
    const __m128i pairs = _mm_loadu_si128((const __m128i*)bytes);
    _mm_storeu_si128((__m128i*)codes, _mm_shuffle_epi8(values, _mm_and_si128(pairs, low)));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
    _mm_storeu_si128((__m128i*)(codes + 16), _mm_shuffle_epi8(values, high));
#else
    for (int i = 0; i < 16; ++i) codes[i] = table[bytes[i] & 15];
    for (int i = 0; i < 16; ++i) codes[16 + i] = table[bytes[i] >> 4];
#endif
}

// Six bits of scale and six of minimum for part `part` of eight, of the twelve bytes that K blocks keep them in.
inline void six_bits(const uint8_t* packed, int part, int* scale, int* minimum) {
    if (part < 4) {
        *scale = packed[part] & 63;
        *minimum = packed[part + 4] & 63;
    } else {
        *scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6) << 4;
        *minimum = packed[part + 4] >> 4 | (packed[part] >> 6) << 4;
    }
}

template <typename T>
inline void four_or_five_bits(const uint8_t* block, const uint8_t* fifth, const uint8_t* fours, T* out) {
    int8_t codes[256];
    for (int pair = 0; pair < 4; ++pair) {
        int8_t* own = codes + 64 * pair;
        nibbles(fours + 32 * pair, 32, own);
        for (int half = 0; fifth && half < 2; ++half)
            for (int i = 0; i < 32; ++i) own[32 * half + i] += int8_t((fifth[i] >> (2 * pair + half) & 1) << 4);
    }
    const float by = half_at(block), less = half_at(block + 2);
    for (int part = 0; part < 8; ++part) {
        int scale, minimum;
        six_bits(block + 4, part, &scale, &minimum);
        scaled(codes + 32 * part, 32, by * float(scale), less * float(minimum), out + 32 * part);
    }
}

template <typename T>
inline void six_bit_codes(const uint8_t* block, T* out) {
    const uint8_t *low = block, *high = block + 128;
    int8_t codes[256];
    for (int half = 0; half < 2; ++half, low += 64, high += 32) {
        int8_t* own = codes + 128 * half;
        nibbles(low, 64, own);
        for (int quarter = 0; quarter < 4; ++quarter)
            for (int i = 0; i < 32; ++i)
                own[32 * quarter + i] = int8_t((own[32 * quarter + i] | (high[i] >> 2 * quarter & 3) << 4) - 32);
    }
    const int8_t* scales = (const int8_t*)block + 192;
    const float by = half_at(block + 208);
    for (int part = 0; part < 16; ++part)
        scaled(codes + 16 * part, 16, by * float(scales[part]), 0.0f, out + 16 * part);
}

template <typename T>
inline void non_linear_parts(const uint8_t* block, T* out) {
    const float by = half_at(block);
    const int upper = block[2] | block[3] << 8;
    for (int part = 0; part < 8; ++part) {
        const int lower = block[4 + part / 2] >> (4 * (part % 2)) & 15;
        int8_t codes[32];
        look_up(kNonLinear, block + 8 + 16 * part, codes);
        scaled(codes, 32, by * float((lower | (upper >> 2 * part & 3) << 4) - 32), 0.0f, out + 32 * part);
    }
}

template <typename T>
inline void widen(BlockType type, const uint8_t* block, T* out) {
    int8_t codes[32];
    switch (type) {
        case Q4_0:
            look_up(kCentred, block + 2, codes);
            return scaled(codes, 32, half_at(block), 0.0f, out);
        case Q8_0: return scaled((const int8_t*)block + 2, 32, half_at(block), 0.0f, out);
        case IQ4_NL:
            look_up(kNonLinear, block + 2, codes);
            return scaled(codes, 32, half_at(block), 0.0f, out);
        case Q4_K: return four_or_five_bits(block, nullptr, block + 16, out);
        case Q5_K: return four_or_five_bits(block, block + 16, block + 48, out);
        case Q6_K: return six_bit_codes(block, out);
        case IQ4_XS: return non_linear_parts(block, out);
    }
}

template <typename T>
static void widen_all(const uint8_t* packed, BlockType type, int64_t numel, int64_t block_size, int64_t block_bytes,
                      T* out) {
    const int64_t blocks = numel / block_size, turn = 16384 / block_size;
#pragma omp parallel for schedule(static) if (blocks > turn)
    for (int64_t begin = 0; begin < blocks; begin += turn) {
        const int64_t end = begin + turn < blocks ? begin + turn : blocks;
        for (int64_t block = begin; block < end; ++block)
            widen(type, packed + block * block_bytes, out + block * block_size);
    }
}

void dequantize_blocks(const uint8_t* packed, int type, int64_t numel, int64_t block_size, int64_t block_bytes,
                       int dtype, void* out) {
    const BlockType own = BlockType(type);
    switch (dtype) {
        case NYBBLE_F32: return widen_all(packed, own, numel, block_size, block_bytes, (float*)out);
        case NYBBLE_BF16: return widen_all(packed, own, numel, block_size, block_bytes, (bf16*)out);
        case NYBBLE_F16: return widen_all(packed, own, numel, block_size, block_bytes, (fp16*)out);
    }
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(dequantize_blocks,
             (const uint8_t* packed, int type, int64_t numel, int64_t block_size, int64_t block_bytes, int dtype,
              void* out),
             (packed, type, numel, block_size, block_bytes, dtype, out))
