// Scales and levels that lose least: the inner loops of nybble/calibration.
//
// Both kernels give the same bytes on every instruction set. `search_scales` sums in a fixed order, sixteen partial sums
// folded in halves, whatever the width of a register; `assign_columns` adds nothing across lanes. Nothing is fused.
#include "dispatch.h"
#include "four_bit.h"

namespace nybble::NYBBLE_ISA {

static constexpr int kSums = 16, kParts = kSums / kLanes;
static constexpr int kRefits = 2;  // least-squares fits of the scale from each starting point

struct Sum {
    F32 part[kParts] = {};

    float total() const {
        float lane[kSums];
        for (int p = 0; p < kParts; ++p) store(lane + p * kLanes, part[p]);
        for (int width = kSums / 2; width; width /= 2)
            for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
        return lane[0];
    }
};

// One block: its weights, how much an error in each of them counts, and the format's levels.
struct Block {
    const float* weight;
    const float* importance;
    int64_t count;
    const Levels& levels;
    const float* values;  // of the levels, ascending

    F32 level(F32 v) const { return pick(values, levels.position(v)); }

    // The scale that fits the levels chosen under `scale` best: sum h w c / sum h c^2; 0 where there is none.
    float refit(float scale) const {
        const float inverse = 1.0f / scale;
        Sum cross, square;
        for (int64_t i = 0; i < count; i += kSums)
            for (int p = 0; p < kParts; ++p) {
                const int64_t at = i + p * kLanes, left = count - at;
                if (left <= 0) continue;
                const F32 w = load_up_to(weight + at, left), c = level(w * inverse);
                const F32 weighted = load_up_to(importance + at, left) * c;
                cross.part[p] += weighted * w;
                square.part[p] += weighted * c;
            }
        const float divisor = square.total();
        return divisor > 0.0f ? cross.total() / divisor : 0.0f;
    }

    // sum h (w - scale c)^2 with the nearest levels.
    float error(float scale) const {
        const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
        Sum sum;
        for (int64_t i = 0; i < count; i += kSums)
            for (int p = 0; p < kParts; ++p) {
                const int64_t at = i + p * kLanes, left = count - at;
                if (left <= 0) continue;
                const F32 w = load_up_to(weight + at, left), lost = w - level(w * inverse) * scale;
                sum.part[p] += load_up_to(importance + at, left) * lost * lost;
            }
        return sum.total();
    }
};

// Where a scale may lie: anywhere, or on the 256 values `code_values * step + offset` of its double-quantisation block.
struct Grid {
    const float* step;  // [blocks], or null
    float offset;
    const float* code_values;
    Codes codes;

    float round(float scale, int64_t block, uint8_t* code) const {
        if (!step) return scale;
        const float divisor = step[block] < kMinScale ? kMinScale : step[block];
        *code = codes.nearest((scale - offset) * (1.0f / divisor));
        return code_values[*code] * step[block] + offset;
    }
};

static bool usable(float scale) { return scale < -kMinScale || scale > kMinScale; }

static void search_block(const Block& block, const Grid& grid, int64_t number, const float* starts, int num_starts,
                         float* scale, uint8_t* code) {
    float largest = 0.0f;
    for (int64_t i = 0; i < block.count; ++i) {
        const float magnitude = __builtin_fabsf(block.weight[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    uint8_t rounded_code = 0;
    *scale = grid.round(largest, number, &rounded_code);
    *code = rounded_code;
    float least = block.error(*scale);
    for (int start = 0; start < num_starts; ++start) {
        float candidate = starts[start] * largest;
        for (int i = 0; i < kRefits && usable(candidate); ++i) candidate = block.refit(candidate);
        if (!usable(candidate)) continue;
        candidate = grid.round(candidate, number, &rounded_code);
        const float error = block.error(candidate);
        if (error < least) {
            least = error;
            *scale = candidate;
            *code = rounded_code;
        }
    }
}

// The importance of element i is importance[i % period]. Writes a scale (and with `step` a code) a block, and indices.
void search_scales(const float* weight, int64_t numel, int64_t block_size, const float* importance, int64_t period,
                   const float* step, float offset, const float* code_values, const float* code_midpoints,
                   const uint8_t* first_code, const float* values, const float* midpoints, const uint8_t* order,
                   int num_levels, const float* starts, int num_starts, float* scales, uint8_t* codes,
                   uint8_t* indices) {
    const Levels levels(midpoints, order, num_levels);
    float sorted[16] = {};
    for (int i = 0; i < num_levels; ++i) sorted[i] = values[order[i]];
    const Grid grid{step, offset, code_values, Codes{code_midpoints, first_code}};
    const int64_t blocks = (numel + block_size - 1) / block_size, turn = blocks_per_turn(block_size);
#pragma omp parallel for schedule(static) if (blocks > turn)
    for (int64_t begin = 0; begin < blocks; begin += turn) {
        float copied[4096];  // importance of a block that wraps around the period
        const int64_t end = begin + turn < blocks ? begin + turn : blocks;
        for (int64_t number = begin; number < end; ++number) {
            const int64_t start = number * block_size, first = start % period;
            const int64_t count = numel - start < block_size ? numel - start : block_size;
            const float* counts = importance + first;
            if (first + count > period) {
                for (int64_t i = 0; i < count; ++i) copied[i] = importance[(first + i) % period];
                counts = copied;
            }
            const Block block{weight + start, counts, count, levels, sorted};
            search_block(block, grid, number, starts, num_starts, scales + number, codes + number);
            const float inverse = scales[number] == 0.0f ? 0.0f : 1.0f / scales[number];
            for (int64_t i = 0; i < count; i += kLanes) {
                const I32 index = levels.nearest(load_up_to(weight + start + i, count - i) * inverse);
                for (int64_t lane = 0; lane < kLanes && i + lane < count; ++lane)
                    indices[start + i + lane] = uint8_t(index[lane]);
            }
        }
    }
}

// For each of `columns` weights' rows side by side: take a level for target[0], spread what that lost over the targets
// below it, go on with target[1] and so forth.
//     lost[j] = target[j] - the level nearest to it, times the scale
//     target[k] -= lost[j] * factors[j][k]   for k > j
void assign_columns(const float* target, int64_t rows, int64_t columns, const float* scales, const float* factors,
                    const float* values, const float* midpoints, const uint8_t* order, int num_levels,
                    uint8_t* indices, float* lost) {
    const Levels levels(midpoints, order, num_levels);
    float sorted[16] = {};
    for (int i = 0; i < num_levels; ++i) sorted[i] = values[order[i]];
#pragma omp parallel for schedule(static) if (columns > 4 * kLanes)
    for (int64_t column = 0; column < columns; column += kLanes) {
        F32 wanted[128];
        const int64_t left = columns - column;
        for (int64_t row = 0; row < rows; ++row) wanted[row] = load_up_to(target + row * columns + column, left);
        const F32 scale = load_up_to(scales + column, left), zero = {};
        const F32 inverse = scale != zero ? 1.0f / scale : zero;
        for (int64_t row = 0; row < rows; ++row) {
            const I32 position = levels.position(wanted[row] * inverse), index = pick(levels.stored, position);
            const F32 error = wanted[row] - pick(sorted, position) * scale;
            const int64_t at = row * columns + column;
            store_up_to(lost + at, error, left);
            for (int64_t lane = 0; lane < kLanes && lane < left; ++lane) indices[at + lane] = uint8_t(index[lane]);
            for (int64_t below = row + 1; below < rows; ++below)
                wanted[below] = wanted[below] - error * factors[row * rows + below];
        }
    }
}

}  // namespace nybble::NYBBLE_ISA

NYBBLE_ENTRY(search_scales,
             (const float* weight, int64_t numel, int64_t block_size, const float* importance, int64_t period,
              const float* step, float offset, const float* code_values, const float* code_midpoints,
              const uint8_t* first_code, const float* values, const float* midpoints, const uint8_t* order,
              int num_levels, const float* starts, int num_starts, float* scales, uint8_t* codes, uint8_t* indices),
             (weight, numel, block_size, importance, period, step, offset, code_values, code_midpoints, first_code,
              values, midpoints, order, num_levels, starts, num_starts, scales, codes, indices))

NYBBLE_ENTRY(assign_columns,
             (const float* target, int64_t rows, int64_t columns, const float* scales, const float* factors,
              const float* values, const float* midpoints, const uint8_t* order, int num_levels, uint8_t* indices,
              float* lost),
             (target, rows, columns, scales, factors, values, midpoints, order, num_levels, indices, lost))
