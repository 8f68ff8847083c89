// Matrix products on blocks that lie in the caches, serial. Included after vector.h.
//
// The right-hand side is packed into panels of PANEL columns, [columns / PANEL, depth, PANEL] with zeros beyond the last
// column; ROWS rows of the left-hand side times one panel are summed in registers over the whole depth.
#ifndef CLLIP_PRODUCT_H
#define CLLIP_PRODUCT_H

#include "kernels.h"
#include "vector.h"

namespace {

using cllip::Tile;

constexpr int PANEL_VECTORS = 2;
constexpr int64_t PANEL = PANEL_VECTORS * LANES;
constexpr int ROWS = CLLIP_ROWS;  // ROWS * PANEL_VECTORS sums, PANEL_VECTORS + 1 operands: what the registers hold

// to [R, columns <= PANEL] = or += alpha · left · panel. Element (r, p) of left is at left[r * step + p], or at
// left[r + p * step] if it is transposed.
template <int R, bool TRANSPOSED, bool ADD>
void multiply(const float* left, int64_t step, int64_t depth, const float* panel, float alpha, float* to,
              int64_t stride, int64_t columns) {
    Floats sums[R][PANEL_VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; ++v) sums[r][v] = Floats{};
    }
    // Three base addresses, from which the processor's addressing reaches four rows each.
    const float *left0 = left, *left4 = left + 4 * step, *left8 = left + 8 * step;
    for (int64_t p = 0; p < depth; ++p) {
        Floats right[PANEL_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; ++v) right[v] = load(panel + v * LANES, LANES, 0);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const float value = TRANSPOSED ? left0[r] : (r < 4 ? left0 : r < 8 ? left4 : left8)[r % 4 * step];
#pragma GCC unroll 2
            for (int v = 0; v < PANEL_VECTORS; ++v) sums[r][v] += value * right[v];
        }
        panel += PANEL;
        if (TRANSPOSED) {
            left0 += step;
        } else {
            ++left0, ++left4, ++left8;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            const int64_t rest = columns - v * LANES, count = rest < LANES ? rest : LANES;
            if (count <= 0) continue;
            float* at = to + r * stride + v * LANES;
            store(at, ADD ? load(at, count, 0) + alpha * sums[r][v] : alpha * sums[r][v], count);
        }
    }
}

// All rows of `to`, panel by panel; panels lie `panel_step` elements apart.
template <bool TRANSPOSED, bool ADD>
void multiply_all(const float* left, int64_t step, int64_t depth, const float* right, int64_t panel_step, float alpha,
                  const Tile& to) {
    const int64_t row_step = TRANSPOSED ? 1 : step;
    for (int64_t j = 0; j < to.columns; j += PANEL, right += panel_step) {
        const int64_t columns = to.columns - j < PANEL ? to.columns - j : PANEL;
        int64_t i = 0;
        const auto run = [&](auto kernel, int64_t rows) {
            for (; i + rows <= to.rows; i += rows) {
                kernel(left + i * row_step, step, depth, right, alpha, to.data + i * to.stride + j, to.stride, columns);
            }
        };
        run(multiply<ROWS, TRANSPOSED, ADD>, ROWS);
        run(multiply<ROWS / 3, TRANSPOSED, ADD>, ROWS / 3);
        run(multiply<1, TRANSPOSED, ADD>, 1);
    }
}

void product(const float* left, int64_t stride, int64_t depth, const float* right, float alpha, const Tile& tile) {
    multiply_all<false, false>(left, stride, depth, right, depth * PANEL, alpha, tile);
}

void add_product(const float* left, int64_t stride, int64_t depth, const float* right, const Tile& to) {
    multiply_all<false, true>(left, stride, depth, right, depth * PANEL, 1, to);
}

void add_transposed_product(const float* left, int64_t stride, int64_t depth, const float* right, const Tile& to) {
    multiply_all<true, true>(left, stride, depth, right, depth * PANEL, 1, to);
}

void pack_transposed(const float* from, int64_t stride, int64_t rows, int64_t width, float* to) {
    for (int64_t i = 0; i < rows; i += PANEL, to += width * PANEL) {
        for (int64_t r = 0; r < PANEL; ++r) {
            const float* row = from + (i + r) * stride;
            for (int64_t p = 0; p < width; ++p) to[p * PANEL + r] = i + r < rows ? row[p] : 0;
        }
    }
}

void pack(const float* from, int64_t stride, int64_t rows, int64_t width, float* to) {
    for (int64_t j = 0; j < width; j += PANEL) {
        const int64_t columns = width - j < PANEL ? width - j : PANEL;
        for (int64_t i = 0; i < rows; ++i, to += PANEL) {
            const float* row = from + i * stride + j;
            for (int64_t c = 0; c < columns; ++c) to[c] = row[c];
            for (int64_t c = columns; c < PANEL; ++c) to[c] = 0;
        }
    }
}

}  // namespace
#endif
