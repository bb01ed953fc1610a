// y = x W^T for a few rows of x, straight from the packed weight: what generation needs. fp32 accumulation.
//
// With AVX-512 a row of W is read 64 bytes, 128 weights, at a time, as 16 dwords of 8 nibbles. Shifting right by 4k
// puts nibble k of every dword where vpermps looks for it, so 16 weights cost one shift, one lookup and one
// multiply-add; x is put into the matching order once. With AVX512-BF16 and a bf16 x the same is done on 32 words of
// 4 nibbles, with vpermw and vdpbf16ps, at half the operations, and a codebook rounded to bf16. Lane l of a sum belongs
// to weights 8l..8l+7 of the 128 in either case, hence to one block, and is multiplied by that block's scale. Other
// instruction sets, and rows that do not hold whole blocks, look each piece of a block up into a buffer and multiply
// from there. Floor: packed bytes and scales, read once.
//
// The codebook comes multiplied by a factor that the results are divided by in the end: the caller chooses one for
// which the 16 values hardly change when rounded to bf16 (kernels/block_cpu.py).
#include <cstdlib>

#include "dispatch.h"
#include "four_bit.h"

namespace nybble::NYBBLE_ISA {

static constexpr int kRowsAtOnce = 8;  // of x

// W row by row, each piece of a block looked up into a buffer of fp32 values.
template <typename T>
static void any_shape(const T* x, int64_t rows, int64_t in, int64_t out_features, const uint8_t* packed,
                      const Scales& scales, const float* codebook, float factor, int64_t block_size, T* y) {
#pragma omp parallel for schedule(static) if (in * out_features > 16384)
    for (int64_t out = 0; out < out_features; ++out) {
        F32 sums[kRowsAtOnce] = {};
        int64_t at = out * in;  // in the flattened weight
        const int64_t end = at + in;
        while (at < end) {
            const int64_t block_end = (at / block_size + 1) * block_size;
            int64_t stop = block_end < end ? block_end : end;
            stop = stop < at + 256 ? stop : at + 256;
            float values[16], w[256 + 1];
            scales.table(at / block_size, codebook, values);
            // A piece may begin at a low nibble: look it up from the high one before it.
            const int64_t odd = at & 1, count = stop - at;
            lookup(values, packed + at / 2, w, count + odd);
            const int64_t column = at - out * in;
            for (int64_t row = 0; row < rows; ++row) {
                for (int64_t i = 0; i < count; i += kLanes) {
                    sums[row] = fma(load_up_to(x + row * in + column + i, count - i),
                                    load_up_to(w + odd + i, count - i), sums[row]);
                }
            }
            at = stop;
        }
        for (int64_t row = 0; row < rows; ++row) from_float(sum(sums[row]) / factor, y + row * out_features + out);
    }
}

#if defined(__AVX512F__)

static constexpr int64_t kChunk = 128;  // weights in 64 bytes

// Part k of a chunk is nibble k of each of its words of kParts nibbles: weight kParts * position + (k ^ 1), since the
// high nibble of a byte comes first.
struct Fp32Lookup {
    typedef float Element;
    static constexpr int kParts = 8;
    __m512 codebook;

    explicit Fp32Lookup(const float* values) : codebook(_mm512_loadu_ps(values)) {}
    __m512 part(__m512i nibbles, int k) const {  // the lookup takes the low four bits of each dword
        return _mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, unsigned(4 * k)), codebook);
    }
    static __m512 multiply_add(__m512 weights, const float* x, __m512 sums) {
        return _mm512_fmadd_ps(weights, _mm512_loadu_ps(x), sums);
    }
};

#if defined(__AVX512BF16__)
struct Bf16Lookup {
    typedef bf16 Element;
    static constexpr int kParts = 4;
    __m512i codebook;  // twice: the lookup takes five bits of each word, of which one belongs to the next nibble

    explicit Bf16Lookup(const float* values)
        : codebook(_mm512_broadcast_i64x4(narrow_exact(load(values)))) {}
    __m512i part(__m512i nibbles, int k) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, unsigned(4 * k)), codebook);
    }
    static __m512 multiply_add(__m512i weights, const bf16* x, __m512 sums) {
        return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(x));
    }
};
#endif

// x, in the order of the parts: [rows, chunks, 128], zero beyond `in`. Then, for zero points, what each lane's eight
// elements add up to: [rows, chunks, 16].
template <typename Lookup>
struct Arranged {
    typedef typename Lookup::Element Element;
    int64_t chunks;
    Element* elements;
    float* lane_sums;

    template <typename T>
    Arranged(const T* x, int64_t rows, int64_t in) : chunks((in + kChunk - 1) / kChunk) {
        const size_t count = size_t(rows * chunks);
        elements = (Element*)aligned_alloc(64, count * (kChunk * sizeof(Element) + 16 * sizeof(float)));
        lane_sums = (float*)(elements + count * kChunk);
        for (int64_t i = 0; i < int64_t(count); ++i) {
            const int64_t row = i / chunks, start = i % chunks * kChunk;
            float sums[16] = {};
            for (int64_t column = 0; column < kChunk; ++column) {
                const float value = start + column < in ? to_float(x[row * in + start + column]) : 0.0f;
                const int64_t k = column % Lookup::kParts ^ 1, position = column / Lookup::kParts;
                from_float(value, elements + i * kChunk + k * (kChunk / Lookup::kParts) + position);
                sums[column / 8] += value;
            }
            memcpy(lane_sums + 16 * i, sums, sizeof sums);
        }
    }
    Arranged(const Arranged&) = delete;
    ~Arranged() { free(elements); }
};

// The scales and zero points of one row of W, with zeros to read beyond them.
struct RowScales {
    int64_t blocks;
    float *scale, *zero_point;

    explicit RowScales(int64_t blocks) : blocks(blocks) {
        scale = (float*)calloc(size_t(2 * (blocks + 4)), sizeof(float));
        zero_point = scale + blocks + 4;
    }
    RowScales(const RowScales&) = delete;
    ~RowScales() { free(scale); }
    void read(const Scales& from, int64_t row) {
        from.scales(row * blocks, blocks, scale);
        if (from.zero_points)
            for (int64_t i = 0; i < blocks; ++i) zero_point[i] = from.zero_point(row * blocks + i);
    }
};

// Which scale of a row each lane of a chunk takes: four in sight at most, blocks being no shorter than 32.
struct ScaleLanes {
    int64_t block_size;
    __m512i lane;

    explicit ScaleLanes(int64_t block_size) : block_size(block_size) {
        int32_t index[16];
        for (int i = 0; i < 16; ++i) index[i] = int32_t(8 * i / block_size);
        lane = _mm512_loadu_si512(index);
    }
    __m512 spread(const float* row, int64_t chunk) const {
        const __m128 four = _mm_loadu_ps(row + chunk * kChunk / block_size);
        return _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(four));
    }
};

// One row of W against kRows rows of x.
template <typename Lookup, int kRows>
static void one_row(const Lookup& lookup, const Arranged<Lookup>& x, int64_t in, const uint8_t* packed,
                    const RowScales& scales, bool has_zero_points, const ScaleLanes& lanes, float* result) {
    constexpr int kParts = Lookup::kParts, kPart = kChunk / kParts;
    __m512 totals[kRows];
    for (int row = 0; row < kRows; ++row) totals[row] = _mm512_setzero_ps();
    for (int64_t chunk = 0; chunk < x.chunks; ++chunk) {
        const int64_t left = in - chunk * kChunk;
        const __mmask16 mask = left >= kChunk ? 0xFFFF : first(int(left / 8));
        const __m512i nibbles = _mm512_maskz_loadu_epi32(mask, packed + chunk * (kChunk / 2));
        decltype(lookup.part(nibbles, 0)) weights[kParts];
        for (int k = 0; k < kParts; ++k) weights[k] = lookup.part(nibbles, k);
        const __m512 scale = lanes.spread(scales.scale, chunk);
        for (int row = 0; row < kRows; ++row) {
            const int64_t at = row * x.chunks + chunk;
            __m512 products = _mm512_setzero_ps();
            for (int k = 0; k < kParts; ++k)
                products = Lookup::multiply_add(weights[k], x.elements + at * kChunk + k * kPart, products);
            if (has_zero_points)
                products = _mm512_fnmadd_ps(lanes.spread(scales.zero_point, chunk),
                                            _mm512_loadu_ps(x.lane_sums + 16 * at), products);
            totals[row] = _mm512_fmadd_ps(products, scale, totals[row]);
        }
    }
    for (int row = 0; row < kRows; ++row) result[row] = sum((F32)totals[row]);
}

template <typename Lookup, typename T>
static void whole_blocks(const T* x, int64_t rows, int64_t in, int64_t out_features, const uint8_t* packed,
                         const Scales& scales, const float* codebook, float factor, int64_t block_size, T* y) {
    static constexpr decltype(&one_row<Lookup, 1>) kByRows[kRowsAtOnce] = {
        one_row<Lookup, 1>, one_row<Lookup, 2>, one_row<Lookup, 3>, one_row<Lookup, 4>,
        one_row<Lookup, 5>, one_row<Lookup, 6>, one_row<Lookup, 7>, one_row<Lookup, 8>};
    const Lookup lookup(codebook);
    const Arranged<Lookup> arranged(x, rows, in);
    const ScaleLanes lanes(block_size);
#pragma omp parallel if (in * out_features > 16384)
    {
        RowScales row_scales(in / block_size);
#pragma omp for schedule(static)
        for (int64_t out = 0; out < out_features; ++out) {
            float result[kRowsAtOnce];
            row_scales.read(scales, out);
            kByRows[rows - 1](lookup, arranged, in, packed + out * (in / 2), row_scales,
                              scales.zero_points != nullptr, lanes, result);
            for (int64_t row = 0; row < rows; ++row) from_float(result[row] / factor, y + row * out_features + out);
        }
    }
}

#if defined(__AVX512BF16__)
template <typename T> struct LookupFor;
template <> struct LookupFor<float> { typedef Fp32Lookup Type; };
template <> struct LookupFor<bf16> { typedef Bf16Lookup Type; };
#else
template <typename T> struct LookupFor { typedef Fp32Lookup Type; };
#endif

#endif

template <typename T>
static void gemv_rows(const T* x, int64_t rows, int64_t in, int64_t out_features, const uint8_t* packed,
                      const Scales& scales, const float* codebook, float factor, int64_t block_size, T* y) {
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
        const int64_t count = rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce;
#if defined(__AVX512F__)
        if (in % block_size == 0) {
            whole_blocks<typename LookupFor<T>::Type>(x + row * in, count, in, out_features, packed, scales, codebook,
                                                      factor, block_size, y + row * out_features);
            continue;
        }
#endif
        any_shape(x + row * in, count, in, out_features, packed, scales, codebook, factor, block_size,
                  y + row * out_features);
    }
}

// x [rows, in], W [out_features, in], y [rows, out_features], all contiguous; x and y of one type.
// `codebook` is the format's times `factor`; with zero points the factor is 1.
void gemv(const void* x, int dtype, int64_t rows, int64_t in, int64_t out_features, const uint8_t* packed,
          const float* absmax, const uint8_t* codes, const float* code_values, const float* absmax2,
          const float* offset, const uint8_t* zero_points, const float* codebook, float factor, int64_t block_size,
          void* y) {
    const Scales scales{absmax, codes, code_values, absmax2, offset, zero_points};
#define RUN(T) gemv_rows((const T*)x, rows, in, out_features, packed, scales, codebook, factor, block_size, (T*)y)
    if (dtype == NYBBLE_F32) RUN(float);
    if (dtype == NYBBLE_BF16) RUN(bf16);
#undef RUN
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(gemv,
             (const void* x, int dtype, int64_t rows, int64_t in, int64_t out_features, const uint8_t* packed,
              const float* absmax, const uint8_t* codes, const float* code_values, const float* absmax2,
              const float* offset, const uint8_t* zero_points, const float* codebook, float factor, int64_t block_size,
          void* y),
             (x, dtype, rows, in, out_features, packed, absmax, codes, code_values, absmax2, offset, zero_points,
              codebook, factor, block_size, y))
