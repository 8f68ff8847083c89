// Pairwise sigmoid loss on the rows [first, last) of a tile. Included after vector.h.
//
// With u = -z l: loss softplus(u) = max(u, 0) + log(1 + e^-|u|), gradient sigmoid(u) = 1 / (1 + e^-u). Every pair is
// taken as a negative (u = s + bias); a row's positive is set to -inf, which has neither, and added on its own.
#ifndef CLLIP_SIGMOID_H
#define CLLIP_SIGMOID_H

#include "exclusions.h"
#include "vector.h"

namespace {

CLLIP_INLINE Floats softplus(Floats u) {
    const Floats zero = all(0.0f);
    const Floats below = u > zero ? -u : u;  // NaN stays NaN
    return (u > zero ? u : zero) + log1p(exp(below));
}

CLLIP_INLINE Floats sigmoid(Floats u) { return 1.0f / (exp(-u) + 1.0f); }

// Excludes row i's pairs and takes its positive out. Returns its column or -1; `u` becomes the positive's -l.
CLLIP_INLINE int64_t take_positive(const cllip_tile& tile, const cllip_exclusions& excluded, int64_t i, float bias,
                                   float& u) {
    exclude(tile, excluded, i);
    const int64_t positive = positive_of(excluded, tile, i);
    if (positive < 0 || !is_valid(excluded, i, positive)) return -1;
    float& score = tile.data[i * tile.stride + positive];
    u = -(score + bias);
    score = -INF;
    return positive;
}

double sigmoid_forward(const cllip_tile& tile, const cllip_exclusions& excluded, int64_t first, int64_t last,
                       float bias) {
    double total = 0;
    for (int64_t i = first; i < last; ++i) {
        float u = 0;
        if (take_positive(tile, excluded, i, bias, u) >= 0) total += softplus(all(u))[0];
        const float* row = tile.data + i * tile.stride;
        Floats run = all(0.0f);
        each_vector(tile.columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
            run += softplus(load(row + j, count, -INF) + bias);
        });
        total += sum(run);
    }
    return total;
}

double sigmoid_backward(const cllip_tile& tile, const cllip_exclusions& excluded, int64_t first, int64_t last,
                        float bias) {
    double total = 0;
    for (int64_t i = first; i < last; ++i) {
        float u = 0;
        const int64_t positive = take_positive(tile, excluded, i, bias, u);
        float* row = tile.data + i * tile.stride;
        Floats run = all(0.0f);
        each_vector(tile.columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
            const Floats gradient = sigmoid(load(row + j, count, -INF) + bias);
            run += gradient;
            store(row + j, gradient, count);
        });
        total += sum(run);
        if (positive >= 0) {
            row[positive] = -sigmoid(all(u))[0];
            total += row[positive];
        }
    }
    return total;
}

}  // namespace
#endif
