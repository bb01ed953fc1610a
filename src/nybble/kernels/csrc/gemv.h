// Rows of a packed matrix times a few rows of x: what gemv.cpp and decode.cpp share. fp32 accumulation.
//
// With AVX-512 a row of W is read 64 bytes, 128 weights, at a time, as 16 dwords of 8 nibbles. Shifting right by 4k
// puts nibble k of every dword where vpermps looks for it, so 16 weights cost one shift, one lookup and one
// multiply-add; x is put into the matching order once. With AVX512-BF16 and bf16 products the same is done on 32 words
// of 4 nibbles, with vpermw and vdpbf16ps, at half the operations, and a codebook rounded to bf16. Lane l of a sum
// belongs to weights 8l..8l+7 of the 128 in either case, hence to one block, and is multiplied by that block's scale.
// Other instruction sets, and rows that do not hold whole blocks, look each piece of a block up into a buffer and
// multiply from there. Floor: packed bytes and scales, read once.
//
// The codebook comes multiplied by a factor that the results are divided by in the end: the caller chooses one for
// which the 16 values hardly change when rounded to bf16 (backends/cpp/four_bit.py).
#pragma once

#include <cstdlib>

#include "four_bit.h"

namespace nybble::NYBBLE_ISA {

static constexpr int kRowsAtOnce = 8;  // of x

// W [out_features, in], row-major; `codebook` is the format's times `factor`, which is 1 where there are zero points.
struct PackedMatrix {
    int64_t in, block_size;
    const uint8_t* packed;
    Scales scales;
    const float* codebook;
    float factor;

    bool has_whole_blocks() const { return in % block_size == 0; }
};

// Row `out` of W against rows of x, each piece of a block looked up into a buffer of fp32 values.
template <typename T>
inline void multiply_any_shape(const PackedMatrix& w, int64_t out, const T* x, int64_t rows, float* result) {
    F32 sums[kRowsAtOnce] = {};
    int64_t at = out * w.in;  // in the flattened weight
    const int64_t end = at + w.in;
    while (at < end) {
        const int64_t block_end = (at / w.block_size + 1) * w.block_size;
        int64_t stop = block_end < end ? block_end : end;
        stop = stop < at + 256 ? stop : at + 256;
        float values[16], piece[256 + 1];
        w.scales.table(at / w.block_size, w.codebook, values);
        // A piece may begin at a low nibble: look it up from the high one before it.
        const int64_t odd = at & 1, count = stop - at;
        lookup(values, w.packed + at / 2, piece, count + odd);
        const int64_t column = at - out * w.in;
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < count; i += kLanes) {
                sums[row] = fma(load_up_to(x + row * w.in + column + i, count - i),
                                load_up_to(piece + odd + i, count - i), sums[row]);
            }
        }
        at = stop;
    }
    for (int64_t row = 0; row < rows; ++row) result[row] = sum(sums[row]) / w.factor;
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

template <typename T> struct LookupFor { typedef Fp32Lookup Type; };
#if defined(__AVX512BF16__)
template <> struct LookupFor<bf16> { typedef Bf16Lookup Type; };
#endif

// Every stride-th of the values, 16 of them.
inline F32 every(int stride, const float* values) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (F32)_mm512_i32gather_ps(_mm512_mullo_epi32(lane, _mm512_set1_epi32(stride)), values, sizeof(float));
}

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

// Which scale of a row each lane of a chunk takes: four in sight at most, blocks being 32, 64, 128, ... long.
struct ScaleLanes {
    int log2_block_size;
    __m512i lane;

    explicit ScaleLanes(int64_t block_size) : log2_block_size(__builtin_ctzll(uint64_t(block_size))) {
        const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
        lane = _mm512_srli_epi32(first, unsigned(log2_block_size));
    }
    __m512 spread(const float* row, int64_t chunk) const {
        const __m128 four = _mm_loadu_ps(row + (chunk * kChunk >> log2_block_size));
        return _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(four));
    }
};

#endif

// Up to kRowsAtOnce rows of x [rows, in] as products in T (bf16 or float) want them.
//
// With AVX-512: in the order of the parts, [rows, chunks, 128], zero beyond `in`. Then, for zero points, what each
// lane's eight elements add up to, [rows, chunks, 16]. They lie in memory of the caller's, `bytes` long, and are put
// there piece by piece, in any order, on any threads, before the first product.
template <typename T, typename X>
struct FewRows {
    const X* x;
    int64_t rows, in;

#if defined(__AVX512F__)
    typedef typename LookupFor<T>::Type Lookup;
    typedef typename Lookup::Element Element;
    int64_t chunks;
    Element* elements;
    float* lane_sums;

    static int64_t count_chunks(int64_t in) { return (in + kChunk - 1) / kChunk; }
    static size_t bytes(int64_t rows, int64_t in) {
        return size_t(rows * count_chunks(in)) * (kChunk * sizeof(Element) + 16 * sizeof(float));
    }
    FewRows(const X* x, int64_t rows, int64_t in, void* memory)
        : x(x), rows(rows), in(in), chunks(count_chunks(in)), elements((Element*)memory),
          lane_sums((float*)(elements + rows * chunks * kChunk)) {}

    int64_t pieces() const { return rows * chunks; }
    void arrange(int64_t piece) const {
        const int64_t start = piece % chunks * kChunk;
        const X* from = x + piece / chunks * in + start;
        float values[kChunk] = {};
        for (int64_t i = 0; i < kChunk && start + i < in; i += kLanes) store(values + i, load_up_to(from + i, in - start - i));
        Element* to = elements + piece * kChunk;
        for (int k = 0; k < Lookup::kParts; ++k)
            for (int i = k ^ 1; i < kChunk; i += 16 * Lookup::kParts, to += 16) store(to, every(Lookup::kParts, values + i));
        F32 sums = {};
        for (int i = 0; i < 8; ++i) sums += every(8, values + i);
        store(lane_sums + 16 * piece, sums);
    }
#else
    static size_t bytes(int64_t, int64_t) { return 0; }
    FewRows(const X* x, int64_t rows, int64_t in, void*) : x(x), rows(rows), in(in) {}
    int64_t pieces() const { return 0; }
    void arrange(int64_t) const {}
#endif
};

// Rows of W against all rows of x, one at a time; each thread has its own.
template <typename T, typename X>
struct PackedProduct {
    const PackedMatrix& w;
    const FewRows<T, X>& x;

#if defined(__AVX512F__)
    typedef typename LookupFor<T>::Type Lookup;
    const Lookup lookup;
    const ScaleLanes lanes;
    RowScales scales;

    PackedProduct(const PackedMatrix& w, const FewRows<T, X>& x)
        : w(w), x(x), lookup(w.codebook), lanes(w.block_size), scales(w.in / w.block_size) {}

    void row(int64_t out, float* result) {
        static constexpr decltype(&PackedProduct::template whole_blocks<1>) kByRows[kRowsAtOnce] = {
            &PackedProduct::whole_blocks<1>, &PackedProduct::whole_blocks<2>, &PackedProduct::whole_blocks<3>,
            &PackedProduct::whole_blocks<4>, &PackedProduct::whole_blocks<5>, &PackedProduct::whole_blocks<6>,
            &PackedProduct::whole_blocks<7>, &PackedProduct::whole_blocks<8>};
        if (w.has_whole_blocks()) {
            scales.read(w.scales, out);
            (this->*kByRows[x.rows - 1])(w.packed + out * (w.in / 2), result);
        } else {
            multiply_any_shape(w, out, x.x, x.rows, result);
        }
    }

    template <int kRows>
    void whole_blocks(const uint8_t* packed, float* result) const {
        constexpr int kParts = Lookup::kParts, kPart = kChunk / kParts;
        const int64_t in = w.in, chunks = x.chunks;
        const bool has_zero_points = w.scales.zero_points != nullptr;
        __m512 totals[kRows];
        for (int row = 0; row < kRows; ++row) totals[row] = _mm512_setzero_ps();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t left = in - chunk * kChunk;
            const __mmask16 mask = left >= kChunk ? 0xFFFF : first(int(left / 8));
            const __m512i nibbles = _mm512_maskz_loadu_epi32(mask, packed + chunk * (kChunk / 2));
            decltype(lookup.part(nibbles, 0)) weights[kParts];
            for (int k = 0; k < kParts; ++k) weights[k] = lookup.part(nibbles, k);
            const __m512 scale = lanes.spread(scales.scale, chunk);
            for (int row = 0; row < kRows; ++row) {
                const auto* elements = x.elements + (row * chunks + chunk) * kChunk;
                __m512 products = _mm512_setzero_ps();
                for (int k = 0; k < kParts; ++k)
                    products = Lookup::multiply_add(weights[k], elements + k * kPart, products);
                if (has_zero_points)
                    products = _mm512_fnmadd_ps(lanes.spread(scales.zero_point, chunk),
                                                _mm512_loadu_ps(x.lane_sums + 16 * (row * chunks + chunk)), products);
                totals[row] = _mm512_fmadd_ps(products, scale, totals[row]);
            }
        }
        for (int row = 0; row < kRows; ++row) result[row] = sum((F32)totals[row]) / w.factor;
    }
#else
    PackedProduct(const PackedMatrix& w, const FewRows<T, X>& x) : w(w), x(x) {}
    void row(int64_t out, float* result) { multiply_any_shape(w, out, x.x, x.rows, result); }
#endif
};

}  // namespace nybble::NYBBLE_ISA
