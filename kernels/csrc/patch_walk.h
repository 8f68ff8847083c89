// How patch scores are cut and worked through: panels of texts, in them image after image; a tile is an image's patches
// × a panel. Its scores are computed and handed to an operation; if gradients are wanted, the two products that consume
// what the operation left in the tile follow at once. An image has one thread, and so have its rows of d_patches. For
// d_texts the images go in as many runs as there are threads; each sums its part apart, and these are joined in order.
#ifndef CLLIP_PATCH_WALK_H
#define CLLIP_PATCH_WALK_H

#include "walk.h"

namespace cllip {

constexpr int64_t TILE = 1 << 17;  // scores in a tile, at most (unless one panel of a product has more): 512 KiB
constexpr int64_t TEXTS_AT_A_TIME = 64;

inline const float* patch_at(const cllip_patches& given, int64_t image, int64_t patch) {
    return given.patches + image * given.image_stride + patch * given.patch_stride;
}

inline int threads_for(const cllip_patches& given, int threads) {
    const int64_t worth = divided_up(given.image_count * given.patch_count, STRIP * STRIPS_WORTH_A_THREAD);
    return static_cast<int>(larger(1, smaller(threads, smaller(worth, given.image_count))));
}

inline int64_t texts_in_panel(const Kernels& on, const cllip_patches& given) {
    const int64_t packed = smaller(MOST_COLUMNS, larger(LEAST_COLUMNS, PACKED / larger(1, given.width)));
    const int64_t most = larger(on.panel, smaller(packed, TILE / larger(1, given.patch_count)) / on.panel * on.panel);
    const int64_t panels = larger(1, divided_up(given.text_count, most));  // of equal size, no small rest
    return rounded_up(divided_up(given.text_count, panels), on.panel);
}

// operate(tile, image, column): once for each image and panel, by several threads at once. With given.d_patches or
// given.d_texts, the tiles are then multiplied into them.
template <class Operate>
int walk_patches(const Kernels& on, const cllip_patches& given, int threads, Operate&& operate) {
    threads = threads_for(given, threads);
    const int64_t width = given.width, patches = given.patch_count, most = texts_in_panel(on, given);
    const int64_t stride = most + 16, tile = patches * stride, sums = most * width;  // see Cut::stride
    const int64_t runs = given.d_texts ? threads : given.image_count;
    const Buffer tiles(threads * tile), scores_side(most * width);
    const Buffer texts_side(given.d_patches ? most * rounded_up(width, on.panel) : 0);
    const Buffer patches_side(given.d_texts ? threads * patches * on.panel : 0);
    const Buffer partial(given.d_texts ? (runs - 1) * sums : 0);  // of all runs but the first
    if (!tiles.data || !scores_side.data || !texts_side.data || !patches_side.data || !partial.data) {
        return CLLIP_OUT_OF_MEMORY;
    }

#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    for (int64_t column = 0; column < given.text_count; column += most) {
        const int64_t columns = smaller(most, given.text_count - column);
        const float* panel = given.texts + column * given.text_stride;
#ifdef _OPENMP
#pragma omp for schedule(dynamic) nowait
#endif
        for (int64_t j = 0; j < columns; j += on.panel) {
            on.pack_transposed(panel + j * given.text_stride, given.text_stride, smaller(on.panel, columns - j), width,
                               scores_side.data + j * width);
        }
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (int64_t d = 0; d < (given.d_patches ? width : 0); d += on.panel) {
            on.pack(panel + d, given.text_stride, columns, smaller(on.panel, width - d),
                    texts_side.data + d * columns);
        }
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (int64_t run = 0; run < runs; ++run) {
            const Tile scores{tiles.data + this_thread() * tile, patches, columns, stride};
            float* packed = patches_side.data + this_thread() * patches * on.panel;
            float* d_texts = run ? partial.data + (run - 1) * sums : moved(given.d_texts, column * width);
            if (given.d_texts && run) std::memset(d_texts, 0, columns * width * sizeof(float));
            const int64_t end = given.image_count * (run + 1) / runs;
            for (int64_t image = given.image_count * run / runs; image < end; ++image) {
                const float* rows = patch_at(given, image, 0);
                on.product(rows, given.patch_stride, width, scores_side.data, 1, scores);
                operate(scores, image, column);
                if (given.d_patches) {
                    on.add_product(scores.data, stride, columns, texts_side.data,
                                   {given.d_patches + image * patches * width, patches, width, width});
                }
                for (int64_t d = 0; d < (given.d_texts ? width : 0); d += on.panel) {
                    const int64_t size = smaller(on.panel, width - d);
                    on.pack(rows + d, given.patch_stride, patches, size, packed);
                    on.add_transposed_product(scores.data, stride, patches, packed,
                                              {d_texts + d, columns, size, width});
                }
            }
        }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t j = 0; j < (given.d_texts ? columns : 0); ++j) {
            for (int64_t run = 1; run < runs; ++run) {
                on.add_scaled(partial.data + (run - 1) * sums + j * width, 1, width,
                              given.d_texts + (column + j) * width);
            }
        }
    }
    return CLLIP_OK;
}

// Sums of rows, without a product: each pair's gradient joins its best patch and its text. An image's patches have one
// thread, which takes the texts in their order; a few texts have one, which takes the images in theirs.
inline void scatter_to_best(const Kernels& on, const cllip_patches& given, const Numbers& places, int64_t place_stride,
                            const float* gradient, int64_t gradient_stride, int threads) {
    threads = threads_for(given, threads);
    const int64_t width = given.width, patches = given.patch_count;
    const int64_t few = larger(1, smaller(TEXTS_AT_A_TIME, divided_up(given.text_count, threads)));
    const int64_t by_image = given.d_patches ? given.image_count : 0;
    const int64_t by_text = given.d_texts ? divided_up(given.text_count, few) : 0;
    const auto best = [&](int64_t image, int64_t text) {
        // No patch is the best of NaN: its gradient is NaN wherever it goes.
        return smaller(patches - get(places, image * place_stride + text), patches - 1);
    };
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic)
#endif
    for (int64_t task = 0; task < by_image + by_text; ++task) {
        const bool to_patches = task < by_image;
        const int64_t first_image = to_patches ? task : 0, end_image = to_patches ? task + 1 : given.image_count;
        const int64_t first_text = to_patches ? 0 : (task - by_image) * few;
        const int64_t end_text = to_patches ? given.text_count : smaller(given.text_count, first_text + few);
        for (int64_t i = first_image; i < end_image; ++i) {
            for (int64_t j = first_text; j < end_text; ++j) {
                const int64_t p = best(i, j);
                const float factor = gradient[i * gradient_stride + j];
                if (to_patches) {
                    on.add_scaled(given.texts + j * given.text_stride, factor, width,
                                  given.d_patches + (i * patches + p) * width);
                } else {
                    on.add_scaled(patch_at(given, i, p), factor, width, given.d_texts + j * width);
                }
            }
        }
    }
}

}  // namespace cllip
#endif
