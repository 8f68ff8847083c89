// What each instruction set's file offers to api.cpp: serial work on the rows [first, last) of a tile.
#ifndef CLLIP_EPILOGUES_H
#define CLLIP_EPILOGUES_H

#include "cllip_native.h"

namespace cllip {

struct InfoNceGradient {
    const float *row_max, *row_factor, *column_max, *column_factor;
    float reference;
    bool shared;
    float* by_row;
};

struct Epilogues {
    // row_max, row_total [rows]: set to the statistics of this tile's rows. column_max, column_total, scratch [columns]:
    // set to the statistics of its columns over rows [first, last).
    void (*info_nce_forward)(const cllip_tile&, const cllip_exclusions&, int64_t first, int64_t last, float* row_max,
                             float* row_total, float* column_max, float* column_total, float* scratch);
    // (maximum, total) [size] are joined by the others.
    void (*merge)(float* maximum, float* total, const float* other_maximum, const float* other_total, int64_t size);
    // row_part [columns] is added to, or null.
    void (*info_nce_backward)(const cllip_tile&, const cllip_exclusions&, int64_t first, int64_t last,
                              const InfoNceGradient&, float* row_part);
    double (*sigmoid_forward)(const cllip_tile&, const cllip_exclusions&, int64_t first, int64_t last, float bias);
    double (*sigmoid_backward)(const cllip_tile&, const cllip_exclusions&, int64_t first, int64_t last, float bias);
    void (*apply)(float* values, int64_t size, int function);
};

extern const Epilogues portable;
extern const Epilogues avx2;
extern const Epilogues avx512;

}  // namespace cllip
#endif
