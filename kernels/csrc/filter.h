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

void lengths(const float* texts, int64_t stride, int64_t rows, int64_t width, int64_t screen, float* norms,
             float* rests) {
    for (int64_t i = 0; i < rows; ++i, texts += stride) {
        const float rest = dot(texts + screen, texts + screen, width - screen);
        const float norm = __builtin_sqrtf(dot(texts, texts, screen) + rest);
        norms[i] = norm < 1e-12f ? 1e-12f : norm;
        rests[i] = __builtin_sqrtf(rest);
    }
}

// room: shaped and strided like the tile.
void filter(const Tile& tile, const cllip_exclusions& excluded, const cllip::FilterColumns& columns, int64_t width,
            float* room) {
    const int64_t screen = excluded.screen, panel_step = width * PANEL, stride = excluded.row_text_stride;
    const float *texts = excluded.row_texts, *norms = columns.norms, *rests = columns.rests;
    const Tile cosines{room, tile.rows, tile.columns, tile.stride};
    float row_norms[cllip::STRIP], row_rests[cllip::STRIP];
    lengths(texts, stride, tile.rows, width, screen, row_norms, row_rests);
    multiply_all<false, false>(texts, stride, screen, columns.packed, panel_step, 1, cosines);
    int64_t candidates = 0, in_row[cllip::STRIP];
    for (int64_t i = 0; i < tile.rows; ++i) {
        const float* row = room + i * tile.stride;
        const float norm = row_norms[i] * (excluded.threshold - ROUNDING), rest = row_rests[i];
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
        multiply_all<false, true>(texts + screen, stride, width - screen, columns.packed + screen * PANEL, panel_step, 1,
                                  cosines);
    }
    for (int64_t i = 0; i < tile.rows; ++i) {
        if (!in_row[i]) continue;
        float* __restrict scores = tile.data + i * tile.stride;
        const float *row = room + i * tile.stride, *text = texts + i * stride;
        const float norm = row_norms[i] * (excluded.threshold - ROUNDING), rest = row_rests[i];
        const float limit = row_norms[i] * excluded.threshold;
        const int64_t positive = cllip::positive_column(excluded, tile, i);
        const float kept = positive < 0 ? 0 : scores[positive];
        for (int64_t j = 0; j < tile.columns; ++j) {
            const bool conflict = sparse ? row[j] + rest * rests[j] > norm * norms[j] &&
                                               dot(text, columns.texts + j * columns.stride, width) > limit * norms[j]
                                         : row[j] > limit * norms[j];
            if (conflict) scores[j] = -INF;
        }
        if (positive >= 0) scores[positive] = kept;
    }
}

}  // namespace
#endif
