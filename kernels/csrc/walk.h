// How a block is cut and worked through: panels of columns, in them groups of strips of rows. For each group the strips'
// scores are computed and handed to an operation; if gradients are wanted, the two products that consume what the
// operation left in the tiles follow while it is in the caches. What is added to what, and in which order, depends on the
// number of threads (a group has so many strips for each) but not on which of them was faster.
#ifndef CLLIP_WALK_H
#define CLLIP_WALK_H

#include <cstdlib>
#include <cstring>

#include "kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace cllip {

constexpr int64_t PACKED = 1 << 18;      // numbers in a packed panel of columns, at most: 1 MiB
constexpr int64_t MOST_COLUMNS = 384;    // of a panel
constexpr int64_t LEAST_COLUMNS = 128;
constexpr int64_t STRIPS_PER_THREAD = 4;  // in a group, so that threads end together
constexpr int64_t STRIPS_WORTH_A_THREAD = 2;

// Floats at an address that whole vectors like, freed at the end of the scope; `data` is null if there was no memory.
// Aligned by hand: glibc's aligned_alloc does not find the room again that an equal block has left.
struct Buffer {
    explicit Buffer(int64_t size)
        : room(std::malloc(size * sizeof(float) + ALIGNMENT)),
          data(room ? reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room) / ALIGNMENT + 1) * ALIGNMENT)
                    : nullptr) {}
    ~Buffer() { std::free(room); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    static constexpr uintptr_t ALIGNMENT = 64;
    void* room;
    float* data;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t rounded_up(int64_t a, int64_t b) { return divided_up(a, b) * b; }

// Number of the calling thread in its team.
inline int64_t this_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <class T>
T* moved(T* pointer, int64_t by) {
    return pointer ? pointer + by : nullptr;
}

// The exclusions of the part of a block that begins at (row, column).
inline cllip_exclusions part_of(const cllip_exclusions& whole, int64_t row, int64_t column) {
    cllip_exclusions part = whole;
    part.row_texts = moved(whole.row_texts, row * whole.row_text_stride);
    part.row_ids = moved(whole.row_ids, row);
    part.column_ids = moved(whole.column_ids, column);
    part.row_valid = moved(whole.row_valid, row);
    part.column_valid = moved(whole.column_valid, column);
    part.positive_row -= row;
    part.positive_column -= column;
    return part;
}

// One strip of scores of a block, as an operation sees it.
struct Strip {
    Tile tile;
    float* by_row;  // second tile, with `apart`; else null
    cllip_exclusions excluded;
    int64_t row, column;  // of the tile's corner in the block
    int64_t slot;         // number in its group
};

struct Cut {
    int64_t columns, strips, stride;  // of a panel; in a group; of the tiles

    Cut(const Kernels& on, const cllip_block& block, int threads) {
        const int64_t most = smaller(MOST_COLUMNS, larger(LEAST_COLUMNS, PACKED / larger(1, block.width)));
        const int64_t panels = larger(1, divided_up(block.column_count, most));  // of equal size, no small rest
        columns = rounded_up(divided_up(block.column_count, panels), on.panel);
        strips = smaller(STRIPS_PER_THREAD * threads, divided_up(block.row_count, STRIP));
        stride = columns + 16;  // rows of a tile begin in different sets of the caches
    }
};

inline int threads_for(const cllip_block& block, int threads) {
    return static_cast<int>(larger(1, smaller(threads, divided_up(block.row_count, STRIP * STRIPS_WORTH_A_THREAD))));
}

// operate(strip) for each strip, by several threads at once; join(strips of the group, column, columns) after each group.
// With block.d_rows or block.d_columns, the tiles are then multiplied into them; `apart`: `by_row` into d_rows.
template <class Operate, class Join>
int walk(const Kernels& on, const cllip_block& block, const Cut& cut, int threads, bool apart, Operate&& operate,
         Join&& join) {
    const int64_t width = block.width, tile = STRIP * cut.stride, padded = rounded_up(width, on.panel);
    const int64_t group_rows = cut.strips * STRIP;
    const bool filtered = block.excluded.row_texts;
    const Buffer tiles((apart ? 2 : 1) * cut.strips * tile), scores_side(rounded_up(cut.columns, on.panel) * width);
    const Buffer columns_side(block.d_rows ? cut.columns * padded : 0);
    const Buffer rows_side(block.d_columns ? group_rows * padded : 0);
    const Buffer cosines(filtered ? threads * tile : 0), norms(filtered ? 2 * cut.columns : 0);
    if (!tiles.data || !scores_side.data || !columns_side.data || !rows_side.data || !cosines.data || !norms.data) {
        return CLLIP_OUT_OF_MEMORY;
    }
    float* by_rows = apart ? tiles.data + cut.strips * tile : tiles.data;

#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    for (int64_t column = 0; column < block.column_count; column += cut.columns) {
        const int64_t columns = smaller(cut.columns, block.column_count - column);
        const float* panel = block.columns + column * block.column_stride;
#ifdef _OPENMP
#pragma omp for schedule(dynamic) nowait
#endif
        for (int64_t j = 0; j < columns; j += on.panel) {
            const float* from = panel + j * block.column_stride;
            const int64_t count = smaller(on.panel, columns - j);
            on.pack_transposed(from, block.column_stride, count, width, scores_side.data + j * width);
            if (filtered) {
                float* of_these = norms.data + j;
                on.lengths(from, block.column_stride, count, width, block.excluded.screen, of_these,
                           of_these + cut.columns);
            }
        }
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (int64_t d = 0; d < (block.d_rows ? width : 0); d += on.panel) {
            on.pack(panel + d, block.column_stride, columns, smaller(on.panel, width - d),
                    columns_side.data + d * columns);
        }
        for (int64_t first = 0; first < block.row_count; first += group_rows) {
            const int64_t rows = smaller(group_rows, block.row_count - first), strips = divided_up(rows, STRIP);
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
            for (int64_t slot = 0; slot < strips; ++slot) {
                const int64_t row = first + slot * STRIP, height = smaller(STRIP, block.row_count - row);
                Strip strip{{tiles.data + slot * tile, height, columns, cut.stride},
                            apart ? by_rows + slot * tile : nullptr,
                            part_of(block.excluded, row, column),
                            row,
                            column,
                            slot};
                on.product(block.rows + row * block.row_stride, block.row_stride, width, scores_side.data, block.scale,
                           strip.tile);
                if (filtered) {
                    on.filter(strip.tile, strip.excluded,
                              {panel, block.column_stride, scores_side.data, norms.data, norms.data + cut.columns},
                              width, cosines.data + this_thread() * tile);
                }
                operate(strip);
                for (int64_t d = 0; d < (block.d_columns ? width : 0); d += on.panel) {
                    // The strip's rows of each panel; a panel holds the rows of the whole group.
                    on.pack(block.rows + row * block.row_stride + d, block.row_stride, height,
                            smaller(on.panel, width - d), rows_side.data + d * rows + slot * STRIP * on.panel);
                }
            }
#ifdef _OPENMP
#pragma omp single
#endif
            join(strips, column, columns);
            if (!block.d_rows && !block.d_columns) continue;
            const int64_t by_row = block.d_rows ? strips : 0;
            const int64_t by_column = block.d_columns ? divided_up(columns, STRIP) : 0;
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
            for (int64_t task = 0; task < by_row + by_column; ++task) {
                if (task < by_row) {
                    const int64_t row = first + task * STRIP, height = smaller(STRIP, block.row_count - row);
                    on.add_product(by_rows + task * tile, cut.stride, columns, columns_side.data,
                                   {block.d_rows + row * width, height, width, width});
                } else {
                    const int64_t from = (task - by_row) * STRIP, size = smaller(STRIP, columns - from);
                    on.add_transposed_product(tiles.data + from, cut.stride, rows, rows_side.data,
                                              {block.d_columns + (column + from) * width, size, width, width});
                }
            }
        }
    }
    return CLLIP_OK;
}

}  // namespace cllip
#endif
