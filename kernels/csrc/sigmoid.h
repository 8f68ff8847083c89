// Pairwise sigmoid loss on a tile. Included after vector.h.
//
// With u = -z l: loss softplus(u) = max(u, 0) + log(1 + e^-|u|), gradient sigmoid(u) = 1 / (1 + e^-u). Every pair is
// taken as a negative (u = s + bias); a row's positive is set to -inf, which has neither, and added on its own.
#ifndef CLLIP_SIGMOID_H
#define CLLIP_SIGMOID_H

#include "exclusions.h"
#include "kernels.h"
#include "vector.h"

namespace {

// softplus(u), and sigmoid(u) from the same exponential.
CLLIP_INLINE Floats softplus(Floats u, Floats& gradient) {
    const Floats zero = all(0.0f);
    const Floats e = exp(u > zero ? -u : u);  // NaN stays NaN
    gradient = (u > zero ? all(1.0f) : e) / (e + 1.0f);
    return (u > zero ? u : zero) + log1p(e);
}

// Excludes row i's pairs and takes its positive out. Returns its column or -1; `u` becomes the positive's -l.
CLLIP_INLINE int64_t take_positive(const cllip::Tile& tile, const cllip_exclusions& excluded, int64_t i, float bias,
                                   float& u) {
    exclude(tile, excluded, i);
    const int64_t positive = cllip::positive_column(excluded, tile, i);
    if (positive < 0 || !is_valid(excluded, i, positive)) return -1;
    float& score = tile.data[i * tile.stride + positive];
    u = -(score + bias);
    score = -INF;
    return positive;
}

// The tile's loss. GRADIENT: the tile becomes the gradient, and `total` its sum.
template <bool GRADIENT>
double sigmoid_loss(const cllip::Tile& tile, const cllip_exclusions& excluded, float bias, double* total) {
    double loss = 0;
    if (GRADIENT) *total = 0;
    for (int64_t i = 0; i < tile.rows; ++i) {
        float u = 0;
        const int64_t positive = take_positive(tile, excluded, i, bias, u);
        float* row = tile.data + i * tile.stride;
        Floats losses = all(0.0f), gradients = all(0.0f), gradient;
        each_vector(tile.columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
            losses += softplus(load(row + j, count, -INF) + bias, gradient);
            if (GRADIENT) {
                gradients += gradient;
                store(row + j, gradient, count);
            }
        });
        if (positive >= 0) {
            loss += softplus(all(u), gradient)[0];
            if (GRADIENT) *total += row[positive] = -gradient[0];
        }
        loss += sum(losses);
        if (GRADIENT) *total += sum(gradients);
    }
    return loss;
}

double sigmoid_forward(const cllip::Tile& tile, const cllip_exclusions& excluded, float bias) {
    return sigmoid_loss<false>(tile, excluded, bias, nullptr);
}

double sigmoid_backward(const cllip::Tile& tile, const cllip_exclusions& excluded, float bias, double* total) {
    return sigmoid_loss<true>(tile, excluded, bias, total);
}

}  // namespace
#endif
