// Excluded pairs of one row of a tile, while the row is in the nearest cache. Included after vector.h.
#ifndef CLLIP_EXCLUSIONS_H
#define CLLIP_EXCLUSIONS_H

#include "cllip_native.h"
#include "vector.h"

namespace {

// Column of row i's positive in the tile, or -1.
CLLIP_INLINE int64_t positive_of(const cllip_exclusions& excluded, const cllip_tile& tile, int64_t i) {
    const int64_t t = i - excluded.positive_row, column = excluded.positive_column + t;
    return t >= 0 && t < excluded.positive_length && column >= 0 && column < tile.columns ? column : -1;
}

CLLIP_INLINE bool is_valid(const cllip_exclusions& excluded, int64_t row, int64_t column) {
    return (!excluded.row_valid || excluded.row_valid[row]) && (!excluded.column_valid || excluded.column_valid[column]);
}

// Sets the excluded scores of row i to -inf.
inline void exclude(const cllip_tile& tile, const cllip_exclusions& excluded, int64_t i) {
    float* __restrict row = tile.data + i * tile.stride;
    const int64_t columns = tile.columns;
    if (excluded.cosine || excluded.row_ids) {
        const int64_t positive = positive_of(excluded, tile, i);
        const float kept = positive < 0 ? 0 : row[positive];
        if (excluded.cosine) {
            const float* __restrict cosine = excluded.cosine + i * excluded.cosine_stride;
            const float* __restrict limit = excluded.cosine_limit;
            for (int64_t j = 0; j < columns; ++j) row[j] = cosine[j] > limit[j] ? -INF : row[j];
        }
        if (excluded.row_ids) {
            const int64_t* __restrict ids = excluded.column_ids;
            const int64_t id = excluded.row_ids[i];
            for (int64_t j = 0; j < columns; ++j) row[j] = ids[j] == id ? -INF : row[j];
        }
        if (positive >= 0) row[positive] = kept;
    }
    if (excluded.column_valid) {
        const uint8_t* __restrict valid = excluded.column_valid;
        for (int64_t j = 0; j < columns; ++j) row[j] = valid[j] ? row[j] : -INF;
    }
    if (excluded.row_valid && !excluded.row_valid[i]) {
        for (int64_t j = 0; j < columns; ++j) row[j] = -INF;
    }
}

}  // namespace
#endif
