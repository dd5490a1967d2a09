// Number formats on the host: conversions to and from 16 bits, as the PTX instructions round.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emu {

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float bf16_value(uint32_t half) { return as_float(half << 16); }

inline float fp16_value(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3ffu;
  if (exponent == 31) return as_float(sign | 0x7f800000u | (mantissa << 13));
  const float magnitude =
      exponent ? as_float(((exponent + 112) << 23) | (mantissa << 13)) : std::ldexp(float(mantissa), -24);
  return sign ? -magnitude : magnitude;
}

// Nearest even; NaN is the canonical 0x7fff, as cvt.rn gives it.
inline uint32_t bf16_bits(float f) {
  const uint32_t bits = as_bits(f);
  if (std::isnan(f)) return 0x7fffu;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline uint32_t fp16_bits(float f) {
  if (std::isnan(f)) return 0x7fffu;
  const uint32_t sign = std::signbit(f) ? 0x8000u : 0;
  const float a = std::fabs(f);
  if (a >= 65520.f) return sign | 0x7c00u;
  int exponent = 0;
  std::frexp(a, &exponent);
  const int step = std::max(exponent - 11, -24);  // weight of the last place
  const float scaled = std::nearbyint(std::ldexp(a, -step));
  const float rounded = std::ldexp(scaled, step);
  if (rounded < 6.103515625e-05f) return sign | static_cast<uint32_t>(std::ldexp(rounded, 24));
  const uint32_t bits = as_bits(rounded);
  return sign | (((bits >> 23) - 112) << 10) | ((bits >> 13) & 0x3ffu);
}

}  // namespace emu
