// The conflict filter on one tile: which pairs of texts have a cosine above the threshold. Included after product.h.
//
// x·y = x'·y' + x"·y" <= x'·y' + |x"| |y"|, where ' are the first `screen` numbers and " the rest. Only pairs whose bound
// exceeds the threshold can conflict. If they are few, their products are finished one by one, else for the whole tile:
// never more than one whole product, a quarter of one where few texts are alike.
#ifndef CLLIP_FILTER_H
#define CLLIP_FILTER_H

#include "exclusions.h"
#include "product.h"
#include "vector.h"

namespace {

constexpr float ROUNDING = 1e-4f;  // a cosine this far below the threshold is still looked at closely
constexpr int64_t SPARSE = 32;     // one candidate in as many pairs, or fewer: they are finished one by one

CLLIP_INLINE float dot(const float* x, const float* y, int64_t width) {
    Floats sums = all(0);
    each_vector(width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        sums += load(x + j, count, 0) * load(y + j, count, 0);
    });
    return (float)sum(sums);
}

void filter(const Tile& tile, const cllip_exclusions& excluded, const float* columns, int64_t column_stride,
            int64_t width, const float* right, float* room) {
    const int64_t screen = excluded.screen, panel_step = width * PANEL;
    const float *norms = excluded.column_norms, *rests = excluded.column_rests;
    const Tile cosines{room, tile.rows, tile.columns, tile.stride};
    multiply_all<false, false>(excluded.row_texts, excluded.row_text_stride, screen, right, panel_step, 1, cosines);
    int64_t candidates = 0, in_row[cllip::STRIP];
    for (int64_t i = 0; i < tile.rows; ++i) {
        const float* row = room + i * tile.stride;
        const float norm = excluded.row_norms[i] * (excluded.threshold - ROUNDING), rest = excluded.row_rests[i];
        Ints found{};
        each_vector(tile.columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
            const Floats bound = load(row + j, count, -INF) + rest * load(rests + j, count, 0);
            found -= bound > norm * load(norms + j, count, 0);
        });
        in_row[i] = 0;
        for (int64_t lane = 0; lane < LANES; ++lane) in_row[i] += found[lane];
        candidates += in_row[i];
    }
    const bool sparse = screen < width && candidates * SPARSE <= tile.rows * tile.columns;
    if (candidates && !sparse && screen < width) {
        multiply_all<false, true>(excluded.row_texts + screen, excluded.row_text_stride, width - screen,
                                  right + screen * PANEL, panel_step, 1, cosines);
    }
    for (int64_t i = 0; i < tile.rows; ++i) {
        if (!in_row[i]) continue;
        float* __restrict scores = tile.data + i * tile.stride;
        const float *row = room + i * tile.stride, *text = excluded.row_texts + i * excluded.row_text_stride;
        const float norm = excluded.row_norms[i] * (excluded.threshold - ROUNDING), rest = excluded.row_rests[i];
        const float limit = excluded.row_norms[i] * excluded.threshold;
        const int64_t positive = cllip::positive_column(excluded, tile, i);
        const float kept = positive < 0 ? 0 : scores[positive];
        for (int64_t j = 0; j < tile.columns; ++j) {
            const bool conflict = sparse ? row[j] + rest * rests[j] > norm * norms[j] &&
                                               dot(text, columns + j * column_stride, width) > limit * norms[j]
                                         : row[j] > limit * norms[j];
            if (conflict) scores[j] = -INF;
        }
        if (positive >= 0) scores[positive] = kept;
    }
}

}  // namespace
#endif
