// Symmetric InfoNCE on a tile. Included after vector.h.
//
// Forward, two sweeps: maxima of rows and columns; then the sums of exponentials. If all maxima lie close enough to
// each other, one exponential e^(s - reference) serves the row and the column, exact to fp32's rounding: a row's or
// column's own maximum is at least e^-DEPTH there, what underflows is below e^-87, and sums of less than 2^26 terms up
// to e^HEIGHT stay finite. Otherwise two exponentials a score, each relative to its own maximum.
#ifndef CLLIP_INFO_NCE_H
#define CLLIP_INFO_NCE_H

#include "exclusions.h"
#include "kernels.h"
#include "vector.h"

namespace {

constexpr float HEIGHT = 70, DEPTH = 59;
constexpr float EMPTY = -1e30f;     // stands for the maximum of nothing; finite, so that EMPTY - EMPTY is 0
constexpr int64_t RUN = 1024;       // columns summed in fp32 before they go to a double
constexpr int64_t ROWS_APART = 32;  // rows summed apart before they join the columns' totals: bounds the rounding

void merge(float* maximum, float* total, const float* other_maximum, const float* other_total, int64_t size) {
    each_vector(size, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        const Floats sum = load(total + j, count, 0), other_sum = load(other_total + j, count, 0);
        const Floats top = sum == 0.0f ? all(EMPTY) : load(maximum + j, count, 0);
        const Floats other_top = other_sum == 0.0f ? all(EMPTY) : load(other_maximum + j, count, 0);
        const Floats both = larger(top, other_top);
        store(total + j, sum * exp(top - both) + other_sum * exp(other_top - both), count);
        store(maximum + j, both == EMPTY ? all(0.0f) : both, count);
    });
}

// Statistics relative to `reference` -> relative to their own maxima (reference where there is none, as with NaN).
void rebase(float* maximum, float* total, float reference, int64_t size) {
    each_vector(size, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        const Floats top = load(maximum + j, count, -INF);
        const Floats base = top == -INF ? all(reference) : top;
        store(total + j, load(total + j, count, 0) * exp(reference - base), count);
        store(maximum + j, base, count);
    });
}

// Maxima of the rows and columns, -inf where all is excluded. Returns the reference for one exponential, or NaN.
float find_maxima(const Tile& tile, const cllip_exclusions& excluded, float* row_max, float* column_max) {
    for (int64_t j = 0; j < tile.columns; ++j) column_max[j] = -INF;
    float low = INF, high = -INF;
    for (int64_t i = 0; i < tile.rows; ++i) {
        exclude(tile, excluded, i);
        const float* row = tile.data + i * tile.stride;
        Floats top = all(-INF);
        each_vector(tile.columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
            const Floats score = load(row + j, count, -INF);
            top = larger(top, score);
            store(column_max + j, larger(load(column_max + j, count, -INF), score), count);
        });
        row_max[i] = largest(top);
        if (row_max[i] > -INF && row_max[i] < low) low = row_max[i];
        if (row_max[i] > high) high = row_max[i];
    }
    for (int64_t j = 0; j < tile.columns; ++j) {
        if (column_max[j] > -INF && column_max[j] < low) low = column_max[j];
    }
    if (high == -INF) return 0;  // nothing but excluded pairs, or NaN
    if (!(high - low <= HEIGHT + DEPTH)) return __builtin_nanf("");
    // The whole number closest to 0: subtracting it loses no bit of a score that is larger.
    if (high > HEIGHT) return __builtin_ceilf(high - HEIGHT);
    return low < -DEPTH ? __builtin_floorf(low + DEPTH) : 0;
}

// Sums of one row, and of its scores into the columns' `part`. Shared: relative to `reference`.
template <bool SHARED>
CLLIP_INLINE float add_row(const float* row, int64_t columns, float reference, const float* column_max, float* part) {
    double total = 0;
    for (int64_t from = 0; from < columns; from += RUN) {
        const int64_t size = columns - from < RUN ? columns - from : RUN;
        Floats run = all(0);
        each_vector(size, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
            const int64_t j = from + k;
            const Floats score = load(row + j, count, -INF);
            const Floats by_row = exp(score - reference);
            run += by_row;
            const Floats by_column = SHARED ? by_row : exp(score - load(column_max + j, count, 0));
            store(part + j, load(part + j, count, 0) + by_column, count);
        });
        total += sum(run);
    }
    return (float)total;
}

void info_nce_forward(const Tile& tile, const cllip_exclusions& excluded, 
                      float* row_max, float* row_total, float* column_max, float* column_total, float* scratch) {
    const int64_t columns = tile.columns;
    const float reference = find_maxima(tile, excluded, row_max, column_max);
    const bool shared = reference == reference;
    if (!shared) {
        for (int64_t i = 0; i < tile.rows; ++i) row_max[i] = row_max[i] == -INF ? 0 : row_max[i];
        for (int64_t j = 0; j < columns; ++j) column_max[j] = column_max[j] == -INF ? 0 : column_max[j];
    }
    for (int64_t j = 0; j < columns; ++j) column_total[j] = scratch[j] = 0;
    for (int64_t i = 0; i < tile.rows; ++i) {
        const float* row = tile.data + i * tile.stride;
        row_total[i] = shared ? add_row<true>(row, columns, reference, column_max, scratch)
                              : add_row<false>(row, columns, row_max[i], column_max, scratch);
        if (i % ROWS_APART == ROWS_APART - 1 || i == tile.rows - 1) {
            for (int64_t j = 0; j < columns; ++j) {
                column_total[j] += scratch[j];
                scratch[j] = 0;
            }
        }
    }
    if (shared) {
        rebase(row_max, row_total, reference, tile.rows);
        rebase(column_max, column_total, reference, columns);
    }
}

void info_nce_backward(const Tile& tile, const cllip_exclusions& excluded, 
                       const cllip::InfoNceGradient& given, float* row_part) {
    const float *column_max = given.column_max, *column_factor = given.column_factor;
    for (int64_t i = 0; i < tile.rows; ++i) {
        exclude(tile, excluded, i);
        float* row = tile.data + i * tile.stride;
        const float factor = given.row_factor[i], reference = given.reference;
        if (given.shared) {
            each_vector(tile.columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
                const Floats e = exp(load(row + j, count, -INF) - reference);
                store(row + j, e * (load(column_factor + j, count, 0) + factor), count);
            });
            continue;
        }
        const float row_max = given.row_max[i];
        float* by_row = given.by_row ? given.by_row + i * tile.stride : nullptr;
        each_vector(tile.columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
            const Floats score = load(row + j, count, -INF);
            const Floats rows_term = exp(score - row_max) * factor;
            const Floats columns_term = exp(score - load(column_max + j, count, 0)) * load(column_factor + j, count, 0);
            if (row_part) {
                const Floats product = score == -INF ? all(0.0f) : rows_term * score;
                store(row_part + j, load(row_part + j, count, 0) + product, count);
            }
            if (by_row) store(by_row + j, rows_term, count);
            store(row + j, by_row ? columns_term : rows_term + columns_term, count);
        });
    }
}

}  // namespace
#endif
