// Vectors of CLLIP_LANES floats by the compilers' vector extension, and the elementary functions on them.
//
// Each instruction set compiles this header in its own file with its own flags. Everything is in an unnamed namespace
// and uses nothing from the standard library: an inline function shared between those files could end up compiled for
// an instruction set that the CPU at hand does not have.
#ifndef CLLIP_VECTOR_H
#define CLLIP_VECTOR_H

#include <stdint.h>

#define CLLIP_INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t LANES = CLLIP_LANES;
typedef float Floats __attribute__((vector_size(4 * CLLIP_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * CLLIP_LANES)));

constexpr float INF = __builtin_inff();

CLLIP_INLINE Floats all(float value) { return value - Floats{}; }

// `count` of LANES elements at `from`; lanes beyond have `fill`.
CLLIP_INLINE Floats load(const float* from, int64_t count, float fill) {
    if (count == LANES) {
        Floats whole;
        __builtin_memcpy(&whole, from, sizeof whole);
        return whole;
    }
    Floats part = all(fill);
    for (int64_t lane = 0; lane < count; ++lane) part[lane] = from[lane];
    return part;
}

CLLIP_INLINE void store(float* to, Floats value, int64_t count) {
    if (count == LANES) {
        __builtin_memcpy(to, &value, sizeof value);
        return;
    }
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = value[lane];
}

// body(j, LANES) for each whole vector of `size` elements, then body(j, rest).
template <class Body>
CLLIP_INLINE void each_vector(int64_t size, Body&& body) {
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) body(j, LANES);
    if (j < size) body(j, size - j);
}

// The larger of each pair; `a` where `b` is NaN.
CLLIP_INLINE Floats larger(Floats a, Floats b) { return b > a ? b : a; }

CLLIP_INLINE float largest(Floats value) {
    float result = value[0];
    for (int64_t lane = 1; lane < LANES; ++lane) result = value[lane] > result ? value[lane] : result;
    return result;
}

CLLIP_INLINE double sum(Floats value) {
    double result = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) result += value[lane];
    return result;
}

// e^x, at most 1.1 ulp off for -87.3 <= x <= 88.3; 0 below (also where the result would be subnormal), +inf above;
// NaN stays NaN. x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts whose first is exact in n · part;
// e^r = 1 + r + r² q(r), q fitted for the least relative error (3e-9).
CLLIP_INLINE Floats exp(Floats x) {
    const Floats shift = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer, kept in the low bits
    const Floats shifted = x * 1.44269504f + shift;
    const Floats n = shifted - shift;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats q = r * 0.00138145988f + 0.00836871658f;
    q = q * r + 0.041668389f;
    q = q * r + 0.166665211f;
    q = q * r + 0.49999994f;
    const Floats power = (Floats)(((Ints)shifted << 23) + 0x3f800000);
    const Floats result = (q * (r * r) + r + 1.0f) * power;
    return x < -87.33f ? all(0.0f) : (x > 88.37f ? all(INF) : result);
}

// log(1 + y) for 0 <= y <= 1, at most 2 ulp off: 2 atanh(z) with z = y / (2 + y), a polynomial in z².
CLLIP_INLINE Floats log1p(Floats y) {
    const Floats z = y / (y + 2.0f);
    const Floats w = z * z;
    Floats p = w * 0.140059933f + 0.140009031f;
    p = p * w + 0.200107634f;
    p = p * w + 0.333332092f;
    const Floats twice = z + z;
    return twice * (p * w) + twice;
}

}  // namespace
#endif
