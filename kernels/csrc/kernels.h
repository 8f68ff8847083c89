// What each instruction set's file offers to walk.h: serial work on one strip of scores, in the caches.
#ifndef CLLIP_KERNELS_H
#define CLLIP_KERNELS_H

#include "cllip_native.h"

namespace cllip {

constexpr int64_t STRIP = 96;  // rows of a tile, at most: a multiple of the rows that a product takes at a time

// Scores [rows, columns], row-major with `stride` elements from row to row.
struct Tile {
    float* data;
    int64_t rows, columns, stride;
};

// Column of row i's positive in the tile, or -1. (Static: no code is shared between the instruction sets' files.)
static inline int64_t positive_column(const cllip_exclusions& excluded, const Tile& tile, int64_t i) {
    const int64_t t = i - excluded.positive_row, column = excluded.positive_column + t;
    return t >= 0 && t < excluded.positive_length && column >= 0 && column < tile.columns ? column : -1;
}

struct InfoNceGradient {
    const float *row_max, *row_factor, *column_max, *column_factor;
    float reference;
    bool shared;
    float* by_row;  // room for the rows' term, shaped and strided like the tile; null: both terms in the tile
};

struct FilterColumns {
    const float* texts;
    int64_t stride;
    const float* packed;  // transposed
    const float *norms, *rests;
};

// Integers of 1, 2 or 4 bytes.
struct Numbers {
    void* data;
    int bytes;
};

static inline void put(const Numbers& numbers, int64_t at, int32_t value) {
    if (numbers.bytes == 1) static_cast<uint8_t*>(numbers.data)[at] = static_cast<uint8_t>(value);
    else if (numbers.bytes == 2) static_cast<int16_t*>(numbers.data)[at] = static_cast<int16_t>(value);
    else static_cast<int32_t*>(numbers.data)[at] = value;
}

static inline int64_t get(const Numbers& numbers, int64_t at) {
    return numbers.bytes == 1   ? static_cast<const uint8_t*>(numbers.data)[at]
           : numbers.bytes == 2 ? static_cast<const int16_t*>(numbers.data)[at]
                                : static_cast<const int32_t*>(numbers.data)[at];
}

struct Kernels {
    int64_t panel;  // columns of a right-hand side that lie together: its packed form is [columns / panel, depth, panel]

    // Packed forms of a [rows, width] matrix: as transposed right-hand side (depth: width; columns: rows), and as it is.
    void (*pack_transposed)(const float* from, int64_t stride, int64_t rows, int64_t width, float* to);
    void (*pack)(const float* from, int64_t stride, int64_t rows, int64_t width, float* to);

    // tile = alpha · left · right; left [tile.rows, depth], right packed.
    void (*product)(const float* left, int64_t stride, int64_t depth, const float* right, float alpha, const Tile& tile);
    // to += left · right;  to += leftᵀ · right, left [depth, to.rows].
    void (*add_product)(const float* left, int64_t stride, int64_t depth, const float* right, const Tile& to);
    void (*add_transposed_product)(const float* left, int64_t stride, int64_t depth, const float* right, const Tile& to);

    // norms [rows] of whole texts, never 0; rests [rows] of what lies beyond their first `screen` numbers.
    void (*lengths)(const float* texts, int64_t stride, int64_t rows, int64_t width, int64_t screen, float* norms,
                    float* rests);
    // Scores of conflicting texts become -inf.
    void (*filter)(const Tile& tile, const cllip_exclusions&, const FilterColumns&, int64_t width, float* room);

    // Excluded scores become -inf, apart from conflicts. row_max, row_total [rows], column_max, column_total, scratch
    // [columns]: set to the statistics of this tile.
    void (*info_nce_forward)(const Tile&, const cllip_exclusions&, float* row_max, float* row_total, float* column_max,
                             float* column_total, float* scratch);
    // (maximum, total) [size] are joined by the others.
    void (*merge)(float* maximum, float* total, const float* other_maximum, const float* other_total, int64_t size);
    // The tile becomes the gradient apart from the positives' weights; row_part [columns] is added to, or null.
    void (*info_nce_backward)(const Tile&, const cllip_exclusions&, const InfoNceGradient&, float* row_part);
    // Returns the loss.
    double (*sigmoid_forward)(const Tile&, const cllip_exclusions&, float bias);
    // Also: the tile becomes the gradient, and `total` its sum.
    double (*sigmoid_backward)(const Tile&, const cllip_exclusions&, float bias, double* total);

    // Pool the rows of each column, an image's patches (valid [rows], null: all), see cllip_max_pool, cllip_softmax_pool.
    void (*max_pool)(const Tile&, const uint8_t* valid, float* pooled, const Numbers& places);
    void (*softmax_pool)(const Tile&, const uint8_t* valid, float temperature, float* pooled, float* lse);
    // The tile becomes the gradient of sum gradient · pooled.
    void (*softmax_pool_backward)(const Tile&, const uint8_t* valid, float temperature, const float* pooled,
                                  const float* lse, const float* gradient);
    // to [size] += factor · from.
    void (*add_scaled)(const float* from, float factor, int64_t size, float* to);

    void (*apply)(float* values, int64_t size, int function);
};

extern const Kernels portable;
extern const Kernels avx2;
extern const Kernels avx512;

}  // namespace cllip
#endif
