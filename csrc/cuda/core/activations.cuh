// The activation policy of csrc/cells on scalars: ex2 and rcp of the special function unit.
#pragma once
#include "../../cells/cells.h"
#include "../prim/math.cuh"

namespace fastrnn::cuda {

// Linear: straight lines in place of the curves, so that saturation hides nothing; for tests.
template <bool Linear>
struct Activations {
  FASTRNN_DEVICE static float sigmoid(float x) {
    if constexpr (Linear) return prim::fma(x, 0.25f, 0.5f);
    return prim::reciprocal_approx(1.f + prim::exp2_approx(-1.4426950408889634f * x));
  }
  // 2 / (1 + e^-2x) - 1 loses relative accuracy near 0, where the series takes over: its next term is below 2^-26 there.
  FASTRNN_DEVICE static float tanh(float x) {
    if constexpr (Linear) return x;
    const float s = x * x;
    float p = prim::fma(s, 0.021869488536155202f, -0.053968253968253971f);
    p = prim::fma(s, p, 0.13333333333333333f);
    p = prim::fma(s, p, -0.33333333333333331f);
    const float near = prim::fma(x * s, p, x);
    const float far =
        prim::fma(2.f, prim::reciprocal_approx(1.f + prim::exp2_approx(-2.8853900817779268f * x)), -1.f);
    return s < 0.0625f ? near : far;
  }
  FASTRNN_DEVICE static float relu(float x) {
    if constexpr (Linear) return x;
    return x < 0.f ? 0.f : x;  // NaN stays
  }
  FASTRNN_DEVICE static float dsigmoid(float s) { return Linear ? 0.25f : s * (1.f - s); }
  FASTRNN_DEVICE static float dtanh(float y) { return Linear ? 1.f : prim::fma(-y, y, 1.f); }
  FASTRNN_DEVICE static float drelu(float y, float g) { return Linear || !(y <= 0.f) ? g : 0.f; }
  FASTRNN_DEVICE static float fma(float a, float b, float c) { return prim::fma(a, b, c); }
  FASTRNN_DEVICE static float one() { return 1.f; }
};

}  // namespace fastrnn::cuda
