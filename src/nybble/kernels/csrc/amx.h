// Products by AMX's matrix tiles: 16 rows of 16 fp32 sums, of 16 rows of 32 bf16 and 16 rows of 16 pairs of bf16.
//
// As in attention_tiles.h a "word" is two bf16 that are neighbours along the summed dimension, so that
//     c[row][lane] += sum_i a[row][i] * b[i][lane]
// takes `a` and `b` from rows of words as they are. Sums are of fp32, in the order of i, whatever the other sizes are.
// The instructions read memory that the compiler does not know they read: hence the barriers.
#pragma once

#include <cstdint>

#include "vec.h"

namespace nybble::NYBBLE_ISA {

#if defined(__AMX_BF16__)

constexpr bool kAmx = true;
constexpr int kAmxSide = 32;   // rows and lanes that are multiplied together: two tiles by two
constexpr int kAmxWords = 16;  // words of a tile's row

// Within its scope the thread that made it may use the tiles, all of full size.
class AmxScope {
public:
    AmxScope() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = 64, config.rows[tile] = 16;
        _tile_loadconfig(&config);
    }
    ~AmxScope() { _tile_release(); }
    AmxScope(const AmxScope&) = delete;
    AmxScope& operator=(const AmxScope&) = delete;
};

// The sums of 32 rows and 32 lanes, over `count` words, a multiple of 16; added to what is in c, or written. Distances
// between rows are in words.
template <bool kAdd>
inline void amx_multiply(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int count) {
    float* lower = c + 16 * ldc;
    asm volatile("" ::: "memory");
    if constexpr (kAdd) {
        _tile_loadd(0, c, ldc * 4);
        _tile_loadd(1, c + 16, ldc * 4);
        _tile_loadd(2, lower, ldc * 4);
        _tile_loadd(3, lower + 16, ldc * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < count; i += kAmxWords) {
        const float* words = b + i * ldb;
        _tile_loadd(4, a + i, lda * 4);
        _tile_loadd(6, words, ldb * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, words + 16, ldb * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * lda + i, lda * 4);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
    _tile_stored(2, lower, ldc * 4);
    _tile_stored(3, lower + 16, ldc * 4);
    asm volatile("" ::: "memory");
}

#else

constexpr bool kAmx = false;
constexpr int kAmxSide = 1;
struct AmxScope {
    AmxScope() {}
};
template <bool kAdd>
inline void amx_multiply(float*, int64_t, const float*, int64_t, const float*, int64_t, int) {}

#endif

}  // namespace nybble::NYBBLE_ISA
