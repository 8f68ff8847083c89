// C interface of the native CPU kernels: what happens to a tile of scores after its product, in one pass over memory.
// fp32 only. The maths is in kernels/info_nce/__init__.py and kernels/sigmoid/__init__.py. Loaded by kernels/native.py.
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
#define CLLIP_ABI_VERSION 1

enum { CLLIP_PORTABLE = 0, CLLIP_AVX2 = 1, CLLIP_AVX512 = 2 };

enum { CLLIP_OK = 0, CLLIP_OUT_OF_MEMORY = 1, CLLIP_NO_SUCH_INSTRUCTION_SET = 2 };

// Scores [rows, columns], row-major with `stride` elements from row to row. Changed in place.
typedef struct {
    float* data;
    int64_t rows, columns, stride;
} cllip_tile;

// Pairs that are left out; null pointers: no such test. A pair is left out if
//   cosine[i, j] > cosine_limit[j]  or  row_ids[i] == column_ids[j],  unless it is a positive;  or its row or column
//   is not valid. Positives are (positive_row + t, positive_column + t) for t < positive_length, in the tile's own
//   numbering; parts of the run may lie outside of it.
typedef struct {
    const float* cosine;
    int64_t cosine_stride;
    const float* cosine_limit;
    const int64_t* row_ids;
    const int64_t* column_ids;
    const uint8_t* row_valid;
    const uint8_t* column_valid;
    int64_t positive_row, positive_column, positive_length;
} cllip_exclusions;

CLLIP_EXPORT int cllip_abi_version(void);

// Bit k is set if this CPU has instruction set k of the enumeration.
CLLIP_EXPORT int cllip_instruction_sets(void);

// 1 if built with OpenMP, else 0: then `threads` has no effect.
CLLIP_EXPORT int cllip_has_openmp(void);

// Functions below return CLLIP_OK or an error; `threads` >= 1 is a limit. The same input and number of threads give the
// same bits: each thread takes a fixed run of rows, partial results are combined in the threads' order.

// Running statistics: sum of e^s = total · e^maximum of each row and column; total 0: no pair so far.
// Excluded scores of the tile become -inf.
CLLIP_EXPORT int cllip_info_nce_forward(const cllip_tile* tile, const cllip_exclusions* excluded, float* row_max,
                                        float* row_total, float* column_max, float* column_total, int instruction_set,
                                        int threads);

// The tile becomes the gradient, apart from the positives' own part.
//   shared != 0:             e^(s - reference) (row_factor + column_factor)
//   else if by_row is null:  e^(s - row_max) row_factor + e^(s - column_max) column_factor
//   else:                    the two terms apart: the rows' in by_row (shaped and strided like the tile), the
//                            columns' in the tile
// row_part [columns] or null (not with `shared`): += sum over rows of (rows' term) · s, without the positives' own part.
CLLIP_EXPORT int cllip_info_nce_backward(const cllip_tile* tile, const cllip_exclusions* excluded, const float* row_max,
                                         const float* row_factor, const float* column_max, const float* column_factor,
                                         float reference, int shared, float* by_row, float* row_part,
                                         int instruction_set, int threads);

// loss += sum of softplus(-z l), l = s + bias, z = 1 for positives, else -1. The tile is not changed, but excluded
// scores and positives in it are.
CLLIP_EXPORT int cllip_sigmoid_forward(const cllip_tile* tile, const cllip_exclusions* excluded, float bias,
                                       double* loss, int instruction_set, int threads);

// The tile becomes -z sigmoid(-z l); total += its sum.
CLLIP_EXPORT int cllip_sigmoid_backward(const cllip_tile* tile, const cllip_exclusions* excluded, float bias,
                                        double* total, int instruction_set, int threads);

// values [size] become e^values (function 0) or log(1 + values) (function 1, for 0 <= values <= 1). For tests.
CLLIP_EXPORT int cllip_apply(float* values, int64_t size, int function, int instruction_set);

#ifdef __cplusplus
}
#endif
#endif
