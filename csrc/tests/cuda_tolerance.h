// The one tolerance of the CUDA kernels' tests. A result may differ from the double-precision layer by kUlps roundings of
// its number format, each relative to the largest value of the tensor or to 1, whichever is more: the format rounds what
// CTAs exchange, what is stored for backward, and the result itself.
#pragma once
#include <algorithm>
#include <cmath>
#include <string>

#include "../cuda/core/types.cuh"
#include "naive.h"

namespace trial {

constexpr double kUlps = 5;

// Unit roundoff of the coarsest rounding that a format's data meets.
template <class D>
double roundoff();
template <>
inline double roundoff<fastrnn::cuda::Bf16>() {
  return std::ldexp(1.0, -9);
}
template <>
inline double roundoff<fastrnn::cuda::Fp16>() {
  return std::ldexp(1.0, -12);
}
template <>
inline double roundoff<fastrnn::cuda::Tf32>() {
  return std::ldexp(1.0, -12);
}
template <>
inline double roundoff<fastrnn::cuda::Bf16x3>() {
  return std::ldexp(1.0, -18);
}

// Empty if `got` is near `expected`, else what differs most; `worst` collects the error as a share of what is allowed.
template <class D>
std::string compare(const char* name, const naive::Doubles& got, const naive::Doubles& expected,
                    double* worst) {
  double scale = 1, error = 0;
  size_t at = 0;
  for (double v : expected) scale = std::max(scale, std::fabs(v));
  for (size_t i = 0; i < expected.size(); i++) {
    const double e = std::fabs(got[i] - expected[i]);
    if (e > error || !(e == e)) error = e == e ? e : INFINITY, at = i;
  }
  const double allowed = kUlps * roundoff<D>() * scale;
  *worst = std::max(*worst, error / allowed);
  if (error <= allowed) return {};
  return std::string(name) + "[" + std::to_string(at) + "] is " + std::to_string(got[at]) + ", expected " +
         std::to_string(expected[at]) + ", allowed difference " + std::to_string(allowed);
}

}  // namespace trial
