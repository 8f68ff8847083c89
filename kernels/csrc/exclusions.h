// Pairs of a tile that are excluded by ids and padding, row by row while the row is in the nearest cache. Included after
// vector.h.
#ifndef CLLIP_EXCLUSIONS_H
#define CLLIP_EXCLUSIONS_H

#include "kernels.h"
#include "vector.h"

namespace {

CLLIP_INLINE bool is_valid(const cllip_exclusions& excluded, int64_t row, int64_t column) {
    return (!excluded.row_valid || excluded.row_valid[row]) && (!excluded.column_valid || excluded.column_valid[column]);
}

// Sets the scores of row i that ids and padding exclude to -inf.
inline void exclude(const cllip::Tile& tile, const cllip_exclusions& excluded, int64_t i) {
    float* __restrict row = tile.data + i * tile.stride;
    const int64_t columns = tile.columns;
    if (excluded.row_ids) {
        const int64_t positive = cllip::positive_column(excluded, tile, i);
        const float kept = positive < 0 ? 0 : row[positive];
        const int64_t* __restrict ids = excluded.column_ids;
        const int64_t id = excluded.row_ids[i];
        for (int64_t j = 0; j < columns; ++j) row[j] = ids[j] == id ? -INF : row[j];
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
