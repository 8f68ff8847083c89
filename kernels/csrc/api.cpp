// The C interface: choice of the instruction set, split of the rows over threads, reductions in a fixed order.
#include <cstdlib>

#include "epilogues.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// A thread gets at least this many scores, so that starting it pays.
constexpr int64_t SCORES_PER_THREAD = 1 << 15;

const cllip::Epilogues* epilogues_of(int instruction_set) {
    if (instruction_set < 0 || instruction_set > CLLIP_AVX512 || !(cllip_instruction_sets() >> instruction_set & 1)) {
        return nullptr;
    }
#ifdef CLLIP_X86
    if (instruction_set == CLLIP_AVX512) return &cllip::avx512;
    if (instruction_set == CLLIP_AVX2) return &cllip::avx2;
#endif
    return &cllip::portable;
}

int64_t parts_of(const cllip_tile& tile, int threads) {
    int64_t parts = tile.rows * tile.columns / SCORES_PER_THREAD;
    if (parts > threads) parts = threads;
    if (parts > tile.rows) parts = tile.rows;
    return parts < 1 ? 1 : parts;
}

// work(part, first row, last row) for `parts` runs of rows, one thread each.
template <class Work>
void split(const cllip_tile& tile, int64_t parts, Work&& work) {
    const auto run = [&](int64_t part) { work(part, tile.rows * part / parts, tile.rows * (part + 1) / parts); };
    if (parts == 1) {
        run(0);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(parts))
#endif
    for (int64_t part = 0; part < parts; ++part) run(part);
}

// Floats that are freed at the end of the scope; `data` is null if there was no memory.
struct Floats {
    explicit Floats(int64_t size) : data(static_cast<float*>(std::calloc(size > 0 ? size : 1, sizeof(float)))) {}
    ~Floats() { std::free(data); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
    float* data;
};

template <class Work>
int summed(const cllip_tile& tile, int threads, double* result, Work&& work) {
    const int64_t parts = parts_of(tile, threads);
    double* sums = static_cast<double*>(std::calloc(parts, sizeof(double)));
    if (!sums) return CLLIP_OUT_OF_MEMORY;
    split(tile, parts, [&](int64_t part, int64_t first, int64_t last) { sums[part] = work(first, last); });
    for (int64_t part = 0; part < parts; ++part) *result += sums[part];
    std::free(sums);
    return CLLIP_OK;
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

int cllip_info_nce_forward(const cllip_tile* tile, const cllip_exclusions* excluded, float* row_max, float* row_total,
                           float* column_max, float* column_total, int instruction_set, int threads) {
    const cllip::Epilogues* on = epilogues_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    const int64_t parts = parts_of(*tile, threads), columns = tile->columns;
    const Floats rows(2 * tile->rows), partial(3 * parts * columns);
    if (!rows.data || !partial.data) return CLLIP_OUT_OF_MEMORY;
    float *tile_max = rows.data, *tile_total = rows.data + tile->rows;
    split(*tile, parts, [&](int64_t part, int64_t first, int64_t last) {
        float* own = partial.data + 3 * part * columns;
        on->info_nce_forward(*tile, *excluded, first, last, tile_max, tile_total, own, own + columns, own + 2 * columns);
    });
    on->merge(row_max, row_total, tile_max, tile_total, tile->rows);
    for (int64_t part = 0; part < parts; ++part) {
        const float* own = partial.data + 3 * part * columns;
        on->merge(column_max, column_total, own, own + columns, columns);
    }
    return CLLIP_OK;
}

int cllip_info_nce_backward(const cllip_tile* tile, const cllip_exclusions* excluded, const float* row_max,
                            const float* row_factor, const float* column_max, const float* column_factor,
                            float reference, int shared, float* by_row, float* row_part, int instruction_set,
                            int threads) {
    const cllip::Epilogues* on = epilogues_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    const int64_t parts = parts_of(*tile, threads), columns = tile->columns;
    const Floats partial(row_part ? parts * columns : 0);
    if (!partial.data) return CLLIP_OUT_OF_MEMORY;
    const cllip::InfoNceGradient given{row_max, row_factor, column_max, column_factor, reference, shared != 0, by_row};
    split(*tile, parts, [&](int64_t part, int64_t first, int64_t last) {
        on->info_nce_backward(*tile, *excluded, first, last, given, row_part ? partial.data + part * columns : nullptr);
    });
    for (int64_t part = 0; row_part && part < parts; ++part) {
        for (int64_t j = 0; j < columns; ++j) row_part[j] += partial.data[part * columns + j];
    }
    return CLLIP_OK;
}

int cllip_sigmoid_forward(const cllip_tile* tile, const cllip_exclusions* excluded, float bias, double* loss,
                          int instruction_set, int threads) {
    const cllip::Epilogues* on = epilogues_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    return summed(*tile, threads, loss, [&](int64_t first, int64_t last) {
        return on->sigmoid_forward(*tile, *excluded, first, last, bias);
    });
}

int cllip_sigmoid_backward(const cllip_tile* tile, const cllip_exclusions* excluded, float bias, double* total,
                           int instruction_set, int threads) {
    const cllip::Epilogues* on = epilogues_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    return summed(*tile, threads, total, [&](int64_t first, int64_t last) {
        return on->sigmoid_backward(*tile, *excluded, first, last, bias);
    });
}

int cllip_apply(float* values, int64_t size, int function, int instruction_set) {
    const cllip::Epilogues* on = epilogues_of(instruction_set);
    if (!on) return CLLIP_NO_SUCH_INSTRUCTION_SET;
    on->apply(values, size, function);
    return CLLIP_OK;
}
