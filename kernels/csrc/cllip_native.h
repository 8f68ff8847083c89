// C interface of the native CPU kernels: a block of scores (local rows × one chunk's columns), its product, what follows
// it and the products of its gradient, strip by strip in the caches; likewise patch scores, image by image. fp32 only.
// The maths is in the __init__.py of kernels/info_nce, kernels/sigmoid and kernels/patch_text. Loaded by
// kernels/native.py.
#ifndef CLLIP_NATIVE_H
#define CLLIP_NATIVE_H

#include <stdint.h>

#if defined(__GNUC__)
#define CLLIP_EXPORT __attribute__((visibility("default")))
#else
#define CLLIP_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever a signature or structure below changes.
#define CLLIP_ABI_VERSION 4

enum { CLLIP_PORTABLE = 0, CLLIP_AVX2 = 1, CLLIP_AVX512 = 2 };

enum { CLLIP_OK = 0, CLLIP_OUT_OF_MEMORY = 1, CLLIP_NO_SUCH_INSTRUCTION_SET = 2 };

// Pairs that are left out; null pointers: no such test. A pair is left out if its texts' cosine exceeds `threshold` or
//   row_ids[i] == column_ids[j],  unless it is a positive;  or its row or column is not valid.
// Positives are (positive_row + t, positive_column + t) for t < positive_length; parts of the run may lie outside.
typedef struct {
    const float* row_texts;     // [rows, width], row_text_stride elements from row to row; the others are the columns
    int64_t row_text_stride;
    int64_t screen;             // numbers of a text that are multiplied for all pairs, see filter.h
    float threshold;
    const int64_t* row_ids;
    const int64_t* column_ids;
    const uint8_t* row_valid;
    const uint8_t* column_valid;
    int64_t positive_row, positive_column, positive_length;
} cllip_exclusions;

// Scores s[i, j] = scale · rows[i] · columns[j]. Strides count elements from row to row.
typedef struct {
    const float* rows;  // [row_count, width]
    int64_t row_count, row_stride;
    const float* columns;  // [column_count, width]
    int64_t column_count, column_stride;
    int64_t width;
    float scale;
    cllip_exclusions excluded;
    float* d_rows;     // [row_count, width], contiguous: += gradient · columns; null: not wanted
    float* d_columns;  // [column_count, width], contiguous: += gradientᵀ · rows; null: not wanted
} cllip_block;

// Patch scores s[i, p, j] = patches[i, p] · texts[j], pooled over the patches p of each image. Strides count elements.
typedef struct {
    const float* patches;  // [image_count, patch_count, width]
    int64_t image_count, patch_count, image_stride, patch_stride;
    const float* texts;  // [text_count, width]
    int64_t text_count, text_stride;
    int64_t width;
    const uint8_t* patch_valid;  // [image_count, patch_count], contiguous: 0 for padding; null: there is none
    float* d_patches;  // [image_count, patch_count, width], contiguous, is added to; null: not wanted
    float* d_texts;    // [text_count, width], likewise
} cllip_patches;

CLLIP_EXPORT int cllip_abi_version(void);

// Bit k is set if this CPU has instruction set k of the enumeration.
CLLIP_EXPORT int cllip_instruction_sets(void);

// 1 if built with OpenMP, else 0: then `threads` has no effect.
CLLIP_EXPORT int cllip_has_openmp(void);

// Functions below return CLLIP_OK or an error; `threads` >= 1 is a limit. The same input and number of threads give the
// same bits: partial results are combined in the order of the strips, whoever computed them.

// Running statistics: sum of e^s = total · e^maximum of each row and column; total 0: no pair so far.
// positive [row_count]: scores of the positives in this block (-inf for excluded ones).
CLLIP_EXPORT int cllip_info_nce_forward(const cllip_block* block, float* row_max, float* row_total, float* positive,
                                        float* column_max, float* column_total, int instruction_set, int threads);

// With row_values, column_values [3, n] = (maximum, factor, weight), the gradient is
//   shared != 0:  e^(s - reference) (row_factor + column_factor)
//   else:         e^(s - row_max) row_factor + e^(s - column_max) column_factor
// minus row_weight + column_weight at positives. split != 0 (not with `shared`): d_rows takes the rows' term and weight
// only, d_columns the columns'. row_part [columns] or null (not with `shared`): += sum over rows of the rows' part · s.
CLLIP_EXPORT int cllip_info_nce_backward(const cllip_block* block, const float* row_values, const float* column_values,
                                         float reference, int shared, int split, float* row_part, int instruction_set,
                                         int threads);

// loss += sum of softplus(-z l), l = s + bias, z = 1 for positives, else -1.
CLLIP_EXPORT int cllip_sigmoid_forward(const cllip_block* block, float bias, double* loss, int instruction_set,
                                       int threads);

// The same, with the gradient -z sigmoid(-z l); total += its sum.
CLLIP_EXPORT int cllip_sigmoid_backward(const cllip_block* block, float bias, double* loss, double* total,
                                        int instruction_set, int threads);

// Tables [image_count, text_count] below come with the elements from row to row; d_patches and d_texts of forward
// functions are not looked at.

// pooled = max over p; places (of place_bytes 1, 2 or 4 each) = patch_count - (the first best patch), 0 for NaN.
CLLIP_EXPORT int cllip_max_pool(const cllip_patches* given, float* pooled, int64_t pooled_stride, void* places,
                                int64_t place_stride, int place_bytes, int instruction_set, int threads);

// Adds the gradients of sum gradient · pooled.
CLLIP_EXPORT int cllip_max_pool_backward(const cllip_patches* given, const void* places, int64_t place_stride,
                                         int place_bytes, const float* gradient, int64_t gradient_stride,
                                         int instruction_set, int threads);

// lse = log of the sum over p of e^(s / temperature); pooled = sum over p of e^(s / temperature - lse) s.
CLLIP_EXPORT int cllip_softmax_pool(const cllip_patches* given, float temperature, float* pooled, int64_t pooled_stride,
                                    float* lse, int64_t lse_stride, int instruction_set, int threads);

// Adds the gradients of sum gradient · pooled.
CLLIP_EXPORT int cllip_softmax_pool_backward(const cllip_patches* given, float temperature, const float* pooled,
                                             int64_t pooled_stride, const float* lse, int64_t lse_stride,
                                             const float* gradient, int64_t gradient_stride, int instruction_set,
                                             int threads);

// values [size] become e^values (function 0) or log(1 + values) (function 1, for 0 <= values <= 1). For tests.
CLLIP_EXPORT int cllip_apply(float* values, int64_t size, int function, int instruction_set);

#ifdef __cplusplus
}
#endif
#endif
