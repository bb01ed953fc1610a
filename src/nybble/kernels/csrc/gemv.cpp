// y = x W^T for a few rows of x, straight from the packed weight (gemv.h says how).
#include "gemv.h"

#include "dispatch.h"

namespace nybble::NYBBLE_ISA {

template <typename T>
static void few_rows(const PackedMatrix& w, int64_t out_features, const T* x, int64_t rows, T* y) {
    void* memory = allocate_scratch(FewRows<T, T>::bytes(rows, w.in));
    if (!memory) return;
    const FewRows<T, T> operand(x, rows, w.in, memory);
    for (int64_t piece = 0; piece < operand.pieces(); ++piece) operand.arrange(piece);
#pragma omp parallel if (w.in * out_features > 16384)
    {
        PackedProduct<T, T> product(w, operand);
#pragma omp for schedule(static)
        for (int64_t out = 0; out < out_features; ++out) {
            float result[kRowsAtOnce];
            product.row(out, result);
            for (int64_t row = 0; row < rows; ++row) from_float(result[row], y + row * out_features + out);
        }
    }
    free(memory);
}

// x [rows, in], W [out_features, in], y [rows, out_features], all contiguous; x and y of one type.
void gemv(const void* x, int dtype, int64_t rows, int64_t in, int64_t out_features, const uint8_t* packed,
          const float* absmax, const uint8_t* codes, const float* code_values, const float* absmax2,
          const float* offset, const uint8_t* zero_points, const float* codebook, float factor, int64_t block_size,
          void* y) {
    const PackedMatrix w{in, block_size, packed, {absmax, codes, code_values, absmax2, offset, zero_points}, codebook,
                         factor};
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
        const int64_t count = rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce;
#define RUN(T) few_rows(w, out_features, (const T*)x + row * in, count, (T*)y + row * out_features)
        if (dtype == NYBBLE_F32) RUN(float);
        if (dtype == NYBBLE_BF16) RUN(bf16);
#undef RUN
    }
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(gemv,
             (const void* x, int dtype, int64_t rows, int64_t in, int64_t out_features, const uint8_t* packed,
              const float* absmax, const uint8_t* codes, const float* code_values, const float* absmax2,
              const float* offset, const uint8_t* zero_points, const float* codebook, float factor, int64_t block_size,
              void* y),
             (x, dtype, rows, in, out_features, packed, absmax, codes, code_values, absmax2, offset, zero_points,
              codebook, factor, block_size, y))
