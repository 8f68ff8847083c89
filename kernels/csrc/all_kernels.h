// All kernels for one instruction set: the including file sets CLLIP_LANES, CLLIP_ROWS and CLLIP_INSTRUCTION_SET.
#include "filter.h"
#include "info_nce.h"
#include "kernels.h"
#include "patch_text.h"
#include "product.h"
#include "sigmoid.h"
#include "vector.h"

namespace {

void apply(float* values, int64_t size, int function) {
    each_vector(size, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        const Floats x = load(values + j, count, 0);
        store(values + j, function == 0 ? exp(x) : log1p(x), count);
    });
}

}  // namespace

const cllip::Kernels cllip::CLLIP_INSTRUCTION_SET = {
    PANEL,
    pack_transposed,
    pack,
    product,
    add_product,
    add_transposed_product,
    lengths,
    filter,
    info_nce_forward,
    merge,
    info_nce_backward,
    sigmoid_forward,
    sigmoid_backward,
    max_pool,
    softmax_pool,
    softmax_pool_backward,
    add_scaled,
    apply,
};
