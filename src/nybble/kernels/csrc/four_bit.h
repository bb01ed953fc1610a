// What the kernels on four-, three- and two-bit matrices share: the scales as the C ABI passes them, the
// nearest level, the nearest 8-bit code of a scale, and the lookup of indices.
// The layout is that of nybble/formats/quantized_tensor.py.
#pragma once

#include "vec.h"

namespace nybble::NYBBLE_ISA {

static constexpr float kMinScale = 1e-38f;  // scales below it count as it in divisions, as in bitsandbytes

struct Scales {
    const float* absmax;         // [B], or null when double-quantised:
    const uint8_t* codes;        // [B]
    const float* code_values;    // [256]
    const float* absmax2;        // [ceil(B / 256)]
    const float* offset;         // [1]
    const uint8_t* zero_points;  // [B], or null

    // Two roundings, never fused: the same bits as the plain PyTorch form.
    float scale(int64_t block) const {
        return absmax ? absmax[block] : code_values[codes[block]] * absmax2[block / 256] + *offset;
    }

    float zero_point(int64_t block) const { return zero_points ? float(zero_points[block]) : 0.0f; }

    // Those of `count` blocks in a row, with no test inside the loop.
    void scales(int64_t block, int64_t count, float* out) const {
        if (absmax) {
            memcpy(out, absmax + block, size_t(count) * sizeof(float));
            return;
        }
        for (const int64_t end = block + count; block < end;) {
            const int64_t stop = end < (block / 256 + 1) * 256 ? end : (block / 256 + 1) * 256;
            const float multiplier = absmax2[block / 256], shift = *offset;
            for (; block < stop; ++block) *out++ = code_values[codes[block]] * multiplier + shift;
        }
    }

    // The 16 values of a block, (codebook - zero point) * scale, each rounded once to T.
    template <typename T>
    void table(int64_t block, const float* codebook, T* values) const {
        const F32 multiplier = splat(scale(block)), zero = splat(zero_point(block));
        for (int i = 0; i < 16; i += kLanes) store_exact(values + i, (load(codebook + i) - zero) * multiplier);
    }
};

// table[index] in each lane, of a table of 16.
inline I32 pick(const int32_t* table, I32 index) {
#if defined(__AVX512F__)
    return (I32)_mm512_permutexvar_epi32((__m512i)index, _mm512_loadu_si512(table));
#else
    I32 value;
    for (int i = 0; i < kLanes; ++i) value[i] = table[index[i]];
    return value;
#endif
}
inline F32 pick(const float* table, I32 index) {
#if defined(__AVX512F__)
    return (F32)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#else
    F32 value;
    for (int i = 0; i < kLanes; ++i) value[i] = table[index[i]];
    return value;
#endif
}

// A format's levels, ascending: midpoints between neighbours, and the index that each level is stored as. At most 16.
struct Levels {
    Levels(const float* midpoints, const uint8_t* order, int count = 16) {
        for (int i = 0; i < 16; ++i) {
            midpoint[i] = i < count - 1 ? midpoints[i] : __builtin_inff();
            stored[i] = i < count ? order[i] : 0;
        }
    }

    // How many levels lie below the one nearest to each lane; a midpoint itself goes to the lower level.
    I32 position(F32 v) const {
#if defined(__AVX512F__)
        const __m512 s = (__m512)v, all = _mm512_loadu_ps(midpoint);
        __m512i below = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(s, _mm512_set1_ps(midpoint[7]), _CMP_GT_OQ), 8);
        for (int step = 4; step; step /= 2) {
            const __m512 probe = _mm512_permutexvar_ps(_mm512_add_epi32(below, _mm512_set1_epi32(step - 1)), all);
            const __mmask16 above = _mm512_cmp_ps_mask(s, probe, _CMP_GT_OQ);
            below = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(step));
        }
        return (I32)below;
#else
        I32 below = {};
        for (int i = 0; i < 15; ++i) below -= (I32)(v > midpoint[i]);  // a true lane is -1
        return below;
#endif
    }

    // The stored index of the level nearest to each lane.
    I32 nearest(F32 v) const { return pick(stored, position(v)); }

    float midpoint[16];
    int32_t stored[16];
};

// The 8-bit codes of double quantisation. `midpoint` holds 255 values and a last infinity; `first_code[b]` is the code of
// the least value whose bits begin with b (15 bits): from there the nearest code is at most a few steps up.
struct Codes {
    const float* midpoint;
    const uint8_t* first_code;

    uint8_t nearest(float v) const {
        int code = first_code[bits_of(v) >> 17];
        while (v > midpoint[code]) ++code;
        return uint8_t(code);
    }
};

// out[i] = table[nibble i] for `count` nibbles, the high one of each byte first.
template <typename T>
inline void lookup_scalar(const T* table, const uint8_t* packed, T* out, int64_t count) {
    for (int64_t i = 0; i + 1 < count; i += 2) {
        out[i] = table[packed[i / 2] >> 4];
        out[i + 1] = table[packed[i / 2] & 15];
    }
    if (count & 1) out[count - 1] = table[packed[count / 2] >> 4];
}

#if defined(__AVX512F__)

// The permutes below use only the low bits of an index, so a nibble needs no masking, only moving into place.
template <typename T>  // bf16, fp16
inline void lookup(const T* table, const uint8_t* packed, T* out, int64_t count) {
    const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)table));  // twice: bit 4 is free
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(packed + i / 2)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, values));
    }
    lookup_scalar(table, packed + i / 2, out + i, count - i);
}

inline void lookup(const float* table, const uint8_t* packed, float* out, int64_t count) {
    const __m512 values = _mm512_loadu_ps(table);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(packed + i / 2)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, values));
    }
    lookup_scalar(table, packed + i / 2, out + i, count - i);
}

#elif defined(__AVX2__)

template <typename T>  // bf16, fp16: low and high bytes are looked up apart
inline void lookup(const T* table, const uint8_t* packed, T* out, int64_t count) {
    const __m128i first = _mm_loadu_si128((const __m128i*)table), second = _mm_loadu_si128((const __m128i*)table + 1);
    const __m128i byte_mask = _mm_set1_epi16(0xFF), nibble_mask = _mm_set1_epi8(15);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(first, byte_mask), _mm_and_si128(second, byte_mask));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m128i byte = _mm_loadu_si128((const __m128i*)(packed + i / 2));
        const __m128i even = _mm_and_si128(_mm_srli_epi16(byte, 4), nibble_mask);
        const __m128i odd = _mm_and_si128(byte, nibble_mask);
        const __m128i index[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
        for (int half = 0; half < 2; ++half) {
            const __m128i l = _mm_shuffle_epi8(low, index[half]), h = _mm_shuffle_epi8(high, index[half]);
            _mm_storeu_si128((__m128i*)(out + i + 16 * half), _mm_unpacklo_epi8(l, h));
            _mm_storeu_si128((__m128i*)(out + i + 16 * half + 8), _mm_unpackhi_epi8(l, h));
        }
    }
    lookup_scalar(table, packed + i / 2, out + i, count - i);
}

inline void lookup(const float* table, const uint8_t* packed, float* out, int64_t count) {
    const __m256 first = _mm256_loadu_ps(table), second = _mm256_loadu_ps(table + 8);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        uint32_t four;
        memcpy(&four, packed + i / 2, 4);
        const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(int(four)));
        const __m256i index = _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
        const __m256 in_second = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 becomes the sign
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, index),
                                                   _mm256_permutevar8x32_ps(second, index), in_second));
    }
    lookup_scalar(table, packed + i / 2, out + i, count - i);
}

#else

template <typename T>
inline void lookup(const T* table, const uint8_t* packed, T* out, int64_t count) {
    lookup_scalar(table, packed, out, count);
}

#endif

// Where a block begins: its number, elements in a whole block, bits of an index.
inline const uint8_t* block_bytes(const uint8_t* packed, int64_t block, int64_t block_size, int bits) {
    return packed + block * (block_size / 8 * bits);
}

// out[i] = table[index i] for the `count` indices of one block of nf2 (`bits` 2) or nf3 (`bits` 3), whose low two bits
// lie four to a byte and whose third bits follow, eight to a byte, the first in the lowest.
template <typename T>
inline void lookup_planes_scalar(const T* table, const uint8_t* low, const uint8_t* high, T* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const int third = high ? (high[i / 8] >> (i % 8) & 1) << 2 : 0;
        out[i] = table[(low[i / 4] >> (i % 4 * 2) & 3) | third];
    }
}

#if defined(__AVX512F__)

// Every permute below finds its four values wherever the index's upper bits point, so those need no masking. The third
// bit chooses between two permutes, one of table[0..3] and one of table[4..7].
template <typename T>  // bf16, fp16
inline int64_t lookup_planes_vector(const T* table, const uint8_t* low, const uint8_t* high, T* out, int64_t count) {
    const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)table));
    const __m512i four = _mm512_broadcastq_epi64(_mm512_castsi512_si128(values));
    const __m512i last_four = _mm512_broadcastq_epi64(_mm_srli_si128(_mm512_castsi512_si128(values), 8));
    // Word i takes the 16 bits that hold element i, moved down by 2 (i % 8).
    const __m512i eighth = _mm512_set_epi16(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1,
                                            0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i shift = _mm512_broadcast_i32x4(_mm_set_epi16(14, 12, 10, 8, 6, 4, 2, 0));
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512i words = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)(low + i / 4)));
        const __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi16(eighth, words), shift);
        __m512i value = _mm512_permutexvar_epi16(index, four);
        if (high) {
            uint32_t third;
            memcpy(&third, high + i / 8, 4);
            value = _mm512_mask_permutexvar_epi16(value, third, index, last_four);
        }
        _mm512_storeu_si512(out + i, value);
    }
    return i;
}

inline int64_t lookup_planes_vector(const float* table, const uint8_t* low, const uint8_t* high, float* out,
                                    int64_t count) {
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(table));
    const __m512 last_four = _mm512_broadcast_f32x4(_mm_loadu_ps(table + 4));
    const __m512i shift = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        int32_t bits;
        memcpy(&bits, low + i / 4, 4);
        const __m512i index = _mm512_srlv_epi32(_mm512_set1_epi32(bits), shift);
        __m512 value = _mm512_permutexvar_ps(index, four);
        if (high) {
            uint16_t third;
            memcpy(&third, high + i / 8, 2);
            value = _mm512_mask_permutexvar_ps(value, third, index, last_four);
        }
        _mm512_storeu_ps(out + i, value);
    }
    return i;
}

#else

// Sixteen indices at a time as nibbles of a 64-bit word, the high one of each byte first, which `lookup` then takes.
template <typename T>
inline int64_t lookup_planes_vector(const T* table, const uint8_t* low, const uint8_t* high, T* out, int64_t count) {
    constexpr int kAtOnce = 8;
    int64_t i = 0;
    for (; i + 16 <= count;) {
        uint64_t nibbles[kAtOnce];
        const int64_t words = (count - i) / 16 < kAtOnce ? (count - i) / 16 : kAtOnce;
        for (int64_t k = 0; k < words; ++k) {
            uint32_t bits;
            memcpy(&bits, low + i / 4 + 4 * k, 4);
            uint64_t x = (bits | uint64_t(bits) << 16) & 0x0000FFFF0000FFFF;
            x = (x | x << 8) & 0x00FF00FF00FF00FF;
            x = (x | x << 4) & 0x0F0F0F0F0F0F0F0F;
            nibbles[k] = (x & 0x0303030303030303) << 4 | (x >> 2 & 0x0303030303030303);
        }
        for (int64_t k = 0; high && k < words; ++k) {
            uint16_t third;
            memcpy(&third, high + i / 8 + 2 * k, 2);
            uint64_t x = (third | uint64_t(third) << 24) & 0x000000FF000000FF;
            x = (x | x << 12) & 0x000F000F000F000F;
            x = (x | x << 6) & 0x0303030303030303;
            nibbles[k] |= (x & 0x0101010101010101) << 6 | (x & 0x0202020202020202) << 1;
        }
        lookup(table, (const uint8_t*)nibbles, out + i, 16 * words);
        i += 16 * words;
    }
    return i;
}

#endif

template <typename T>
inline void lookup_planes(const T* table, const uint8_t* block, int bits, T* out, int64_t count) {
    const uint8_t* high = bits == 3 ? block + (count + 3) / 4 : nullptr;
    const int64_t done = lookup_planes_vector(table, block, high, out, count);
    lookup_planes_scalar(table, block + done / 4, high ? high + done / 8 : nullptr, out + done, count - done);
}

// Elements that one turn of a parallel loop handles, in whole blocks; less than one such piece stays on one thread.
inline int64_t blocks_per_turn(int64_t block_size) { return block_size >= 16384 ? 1 : 16384 / block_size; }

}  // namespace nybble::NYBBLE_ISA
