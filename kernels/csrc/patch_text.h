// Pooling of patch scores on a tile: one image's patches in the rows, texts in the columns. Included after vector.h.
//
// A column is pooled in registers, one vector of columns at a time, down the rows. Softmax, two sweeps: the maximum;
// then the sums of the exponentials relative to it and of their products with the scores.
#ifndef CLLIP_PATCH_TEXT_H
#define CLLIP_PATCH_TEXT_H

#include "kernels.h"
#include "vector.h"

namespace {

constexpr int64_t PATCHES_APART = 32;  // summed apart before they join the column's total: bounds the rounding

// body(patch) for those in [from, to) that are not padding.
template <class Body>
CLLIP_INLINE void each_patch(int64_t from, int64_t to, const uint8_t* valid, Body&& body) {
    for (int64_t p = from; p < to; ++p) {
        if (!valid || valid[p]) body(p);
    }
}

void max_pool(const cllip::Tile& tile, const uint8_t* valid, float* pooled, const cllip::Numbers& places) {
    each_vector(tile.columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        Floats top = all(-INF);
        Ints best{}, broken{};
        each_patch(0, tile.rows, valid, [&](int64_t p) __attribute__((always_inline)) {
            const Floats score = load(tile.data + p * tile.stride + j, count, -INF);
            best = score > top ? Ints{} + (int32_t)p : best;  // among equals the first one stays
            top = larger(top, score);
            broken |= score != score;
        });
        store(pooled + j, broken ? all(__builtin_nanf("")) : top, count);
        const Ints place = broken ? Ints{} : (int32_t)tile.rows - best;
        for (int64_t lane = 0; lane < count; ++lane) cllip::put(places, j + lane, place[lane]);
    });
}

void softmax_pool(const cllip::Tile& tile, const uint8_t* valid, float temperature, float* pooled, float* lse) {
    const float sharpness = 1 / temperature;
    each_vector(tile.columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        const auto score = [&](int64_t p) __attribute__((always_inline)) {
            return load(tile.data + p * tile.stride + j, count, -INF);
        };
        Floats top = all(-INF), total = all(0.0f), weighted = all(0.0f);
        each_patch(0, tile.rows, valid, [&](int64_t p) __attribute__((always_inline)) { top = larger(top, score(p)); });
        for (int64_t from = 0; from < tile.rows; from += PATCHES_APART) {
            const int64_t to = from + PATCHES_APART < tile.rows ? from + PATCHES_APART : tile.rows;
            Floats run = all(0.0f), run_weighted = all(0.0f);
            each_patch(from, to, valid, [&](int64_t p) __attribute__((always_inline)) {
                const Floats e = exp((score(p) - top) * sharpness);
                run += e;
                run_weighted += e * score(p);
            });
            total += run;
            weighted += run_weighted;
        }
        store(pooled + j, weighted / total, count);
        const Floats scaled = top / temperature;
        for (int64_t lane = 0; lane < count; ++lane) lse[j + lane] = __builtin_logf(total[lane]) + scaled[lane];
    });
}

// The tile becomes the gradient of sum gradient · pooled. A quotient in the exponent, rounded as it is in `lse`: where
// one patch has all the weight, it is 1 to the last bit, however large the two.
void softmax_pool_backward(const cllip::Tile& tile, const uint8_t* valid, float temperature, const float* pooled,
                           const float* lse, const float* gradient) {
    const float sharpness = 1 / temperature;
    for (int64_t p = 0; p < tile.rows; ++p) {
        float* row = tile.data + p * tile.stride;
        if (valid && !valid[p]) {
            for (int64_t j = 0; j < tile.columns; ++j) row[j] = 0;
            continue;
        }
        each_vector(tile.columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
            const Floats score = load(row + j, count, 0);
            const Floats weight = exp(score / temperature - load(lse + j, count, 0));
            const Floats slope = (score - load(pooled + j, count, 0)) * sharpness + 1.0f;
            store(row + j, slope * weight * load(gradient + j, count, 0), count);
        });
    }
}

// to [size] += factor · from.
void add_scaled(const float* from, float factor, int64_t size, float* to) {
    each_vector(size, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        store(to + j, load(to + j, count, 0) + factor * load(from + j, count, 0), count);
    });
}

}  // namespace
#endif
