// The C interface: choice of the instruction set, and the operations as the walk runs them.
#include <cstdlib>

#include "patch_walk.h"
#include "walk.h"

using cllip::Buffer;
using cllip::Cut;
using cllip::Kernels;
using cllip::Strip;
using cllip::Tile;

namespace {

const Kernels* kernels_of(int instruction_set) {
    if (instruction_set < 0 || instruction_set > CLLIP_AVX512 || !(cllip_instruction_sets() >> instruction_set & 1)) {
        return nullptr;
    }
#ifdef CLLIP_X86
    if (instruction_set == CLLIP_AVX512) return &cllip::avx512;
    if (instruction_set == CLLIP_AVX2) return &cllip::avx2;
#endif
    return &cllip::portable;
}

// Loss and total of each strip of a group, added in their order.
int sigmoid(const Kernels& on, const cllip_block& block, float bias, double* loss, double* total, int threads) {
    threads = cllip::threads_for(block, threads);
    const Cut cut(on, block, threads);
    double* sums = static_cast<double*>(std::calloc(2 * cut.strips + 1, sizeof(double)));
    if (!sums) return CLLIP_OUT_OF_MEMORY;
    const auto operate = [&](const Strip& strip) {
        double* own = sums + 2 * strip.slot;
        own[0] = total ? on.sigmoid_backward(strip.tile, strip.excluded, bias, own + 1)
                       : on.sigmoid_forward(strip.tile, strip.excluded, bias);
    };
    const auto join = [&](int64_t strips, int64_t, int64_t) {
        for (int64_t slot = 0; slot < strips; ++slot) {
            *loss += sums[2 * slot];
            if (total) *total += sums[2 * slot + 1];
        }
    };
    const int error = cllip::walk(on, block, cut, threads, false, operate, join);
    std::free(sums);
    return error;
}

// Padding of an image's patches.
const uint8_t* valid_of(const cllip_patches& given, int64_t image) {
    return cllip::moved(given.patch_valid, image * given.patch_count);
}

cllip_patches without_gradients(const cllip_patches& given) {
    cllip_patches only = given;
    only.d_patches = only.d_texts = nullptr;
    return only;
}

}  // namespace

int cllip_abi_version(void) { return CLLIP_ABI_VERSION; }

int cllip_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

int cllip_instruction_sets(void) {
    int sets = 1 << CLLIP_PORTABLE;
#ifdef CLLIP_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets |= 1 << CLLIP_AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        sets |= 1 << CLLIP_AVX512;
    }
#endif
    return sets;
}

int cllip_info_nce_forward(const cllip_block* block, float* row_max, float* row_total, float* positive,
                           float* column_max, float* column_total, int instruction_set, int threads) {
    const Kernels* on = kernels_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    threads = cllip::threads_for(*block, threads);
    const Cut cut(*on, *block, threads);
    // A strip's own statistics: of its rows, of its columns, and room.
    const int64_t size = 2 * cllip::STRIP + 3 * cut.columns;
    const Buffer partial(cut.strips * size);
    if (!partial.data) return CLLIP_OUT_OF_MEMORY;
    const auto operate = [&](const Strip& strip) {
        float *own = partial.data + strip.slot * size, *of_columns = own + 2 * cllip::STRIP;
        on->info_nce_forward(strip.tile, strip.excluded, own, own + cllip::STRIP, of_columns, of_columns + cut.columns,
                             of_columns + 2 * cut.columns);
        on->merge(row_max + strip.row, row_total + strip.row, own, own + cllip::STRIP, strip.tile.rows);
        for (int64_t i = 0; i < strip.tile.rows; ++i) {
            const int64_t column = cllip::positive_column(strip.excluded, strip.tile, i);
            if (column >= 0) positive[strip.row + i] = strip.tile.data[i * strip.tile.stride + column];
        }
    };
    const auto join = [&](int64_t strips, int64_t column, int64_t columns) {
        for (int64_t slot = 0; slot < strips; ++slot) {
            const float* own = partial.data + slot * size + 2 * cllip::STRIP;
            on->merge(column_max + column, column_total + column, own, own + cut.columns, columns);
        }
    };
    return cllip::walk(*on, *block, cut, threads, false, operate, join);
}

int cllip_info_nce_backward(const cllip_block* block, const float* row_values, const float* column_values,
                            float reference, int shared, int split, float* row_part, int instruction_set, int threads) {
    const Kernels* on = kernels_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    threads = cllip::threads_for(*block, threads);
    const Cut cut(*on, *block, threads);
    const Buffer partial(row_part ? cut.strips * cut.columns : 0);
    if (!partial.data) return CLLIP_OUT_OF_MEMORY;
    const int64_t n = block->row_count, m = block->column_count;
    const auto operate = [&](const Strip& strip) {
        const float *of_rows = row_values + strip.row, *of_columns = column_values + strip.column;
        const float *row_weight = of_rows + 2 * n, *column_weight = of_columns + 2 * m;
        float* own = row_part ? partial.data + strip.slot * cut.columns : nullptr;
        for (int64_t j = 0; own && j < strip.tile.columns; ++j) own[j] = 0;
        // Positives' scores are gone afterwards.
        for (int64_t i = 0; own && i < strip.tile.rows; ++i) {
            const int64_t j = cllip::positive_column(strip.excluded, strip.tile, i);
            if (j >= 0) own[j] -= row_weight[i] * strip.tile.data[i * strip.tile.stride + j];
        }
        on->info_nce_backward(strip.tile, strip.excluded,
                              {of_rows, of_rows + n, of_columns, of_columns + m, reference, shared != 0, strip.by_row},
                              own);
        for (int64_t i = 0; i < strip.tile.rows; ++i) {
            const int64_t j = cllip::positive_column(strip.excluded, strip.tile, i), at = i * strip.tile.stride + j;
            if (j < 0) continue;
            if (strip.by_row) {
                strip.by_row[at] -= row_weight[i];
                strip.tile.data[at] -= column_weight[j];
            } else {
                strip.tile.data[at] -= row_weight[i] + column_weight[j];
            }
        }
    };
    const auto join = [&](int64_t strips, int64_t column, int64_t columns) {
        for (int64_t slot = 0; row_part && slot < strips; ++slot) {
            for (int64_t j = 0; j < columns; ++j) row_part[column + j] += partial.data[slot * cut.columns + j];
        }
    };
    return cllip::walk(*on, *block, cut, threads, split != 0, operate, join);
}

int cllip_sigmoid_forward(const cllip_block* block, float bias, double* loss, int instruction_set, int threads) {
    const Kernels* on = kernels_of(instruction_set);
    return on ? sigmoid(*on, *block, bias, loss, nullptr, threads) : CLLIP_NO_SUCH_INSTRUCTION_SET;
}

int cllip_sigmoid_backward(const cllip_block* block, float bias, double* loss, double* total, int instruction_set,
                           int threads) {
    const Kernels* on = kernels_of(instruction_set);
    return on ? sigmoid(*on, *block, bias, loss, total, threads) : CLLIP_NO_SUCH_INSTRUCTION_SET;
}

int cllip_max_pool(const cllip_patches* given, float* pooled, int64_t pooled_stride, void* places, int64_t place_stride,
                   int place_bytes, int instruction_set, int threads) {
    const Kernels* on = kernels_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    const auto operate = [&](const Tile& tile, int64_t image, int64_t column) {
        char* of_tile = static_cast<char*>(places) + (image * place_stride + column) * place_bytes;
        on->max_pool(tile, valid_of(*given, image), pooled + image * pooled_stride + column, {of_tile, place_bytes});
    };
    return cllip::walk_patches(*on, without_gradients(*given), threads, operate);
}

int cllip_max_pool_backward(const cllip_patches* given, const void* places, int64_t place_stride, int place_bytes,
                            const float* gradient, int64_t gradient_stride, int instruction_set, int threads) {
    const Kernels* on = kernels_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    const cllip::Numbers numbers{const_cast<void*>(places), place_bytes};
    cllip::scatter_to_best(*on, *given, numbers, place_stride, gradient, gradient_stride, threads);
    return CLLIP_OK;
}

int cllip_softmax_pool(const cllip_patches* given, float temperature, float* pooled, int64_t pooled_stride, float* lse,
                       int64_t lse_stride, int instruction_set, int threads) {
    const Kernels* on = kernels_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    const auto operate = [&](const Tile& tile, int64_t image, int64_t column) {
        on->softmax_pool(tile, valid_of(*given, image), temperature, pooled + image * pooled_stride + column,
                         lse + image * lse_stride + column);
    };
    return cllip::walk_patches(*on, without_gradients(*given), threads, operate);
}

int cllip_softmax_pool_backward(const cllip_patches* given, float temperature, const float* pooled,
                                int64_t pooled_stride, const float* lse, int64_t lse_stride, const float* gradient,
                                int64_t gradient_stride, int instruction_set, int threads) {
    const Kernels* on = kernels_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    const auto operate = [&](const Tile& tile, int64_t image, int64_t column) {
        on->softmax_pool_backward(tile, valid_of(*given, image), temperature, pooled + image * pooled_stride + column,
                                  lse + image * lse_stride + column, gradient + image * gradient_stride + column);
    };
    return cllip::walk_patches(*on, *given, threads, operate);
}

int cllip_apply(float* values, int64_t size, int function, int instruction_set) {
    const Kernels* on = kernels_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    on->apply(values, size, function);
    return CLLIP_OK;
}
