// Four, three or two bits to fp32, bf16 or fp16, the scales decoded on the way.
//
// A block's 64 or more elements take at most 16 values: (codebook - zero point) * scale, each rounded once to the output
// type. So those are computed first and the rest is a lookup of indices in a 16-entry table that fits one register
// (vpermw, vpermps, pshufb); a table of 8 or 4 values is padded. Floor for 4096 x 11008 to bf16: 23 MB read, 90 MB written; 22 vector operations per 64
// elements, a fifth of the time the memory takes.
#include "dispatch.h"
#include "four_bit.h"

namespace nybble::NYBBLE_ISA {

template <typename T>
static void dequantize_to(const uint8_t* packed, const Scales& scales, const float* codebook, int bits, int64_t numel,
                          int64_t block_size, T* out) {
    const int64_t blocks = (numel + block_size - 1) / block_size, turn = blocks_per_turn(block_size);
#pragma omp parallel for schedule(static) if (blocks > turn)
    for (int64_t begin = 0; begin < blocks; begin += turn) {
        const int64_t end = begin + turn < blocks ? begin + turn : blocks;
        for (int64_t block = begin; block < end; ++block) {
            T table[16];
            scales.table(block, codebook, table);
            const int64_t start = block * block_size;
            const int64_t count = numel - start < block_size ? numel - start : block_size;
            const uint8_t* bytes = block_bytes(packed, block, block_size, bits);
            if (bits == 4) {
                lookup(table, bytes, out + start, count);
            } else {
                lookup_planes(table, bytes, bits, out + start, count);
            }
        }
    }
}

void dequantize(const uint8_t* packed, const float* absmax, const uint8_t* codes, const float* code_values,
                const float* absmax2, const float* offset, const uint8_t* zero_points, const float* codebook, int bits,
                int64_t numel, int64_t block_size, int dtype, void* out) {
    const Scales scales{absmax, codes, code_values, absmax2, offset, zero_points};
    switch (dtype) {
        case NYBBLE_F32: return dequantize_to(packed, scales, codebook, bits, numel, block_size, (float*)out);
        case NYBBLE_BF16: return dequantize_to(packed, scales, codebook, bits, numel, block_size, (bf16*)out);
        case NYBBLE_F16: return dequantize_to(packed, scales, codebook, bits, numel, block_size, (fp16*)out);
    }
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(dequantize,
             (const uint8_t* packed, const float* absmax, const uint8_t* codes, const float* code_values,
              const float* absmax2, const float* offset, const uint8_t* zero_points, const float* codebook, int bits,
              int64_t numel, int64_t block_size, int dtype, void* out),
             (packed, absmax, codes, code_values, absmax2, offset, zero_points, codebook, bits, numel, block_size,
              dtype, out))
