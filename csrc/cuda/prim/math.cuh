// Scalar arithmetic: the special function unit's approximations, and conversions between number formats.
#pragma once
#include "platform.cuh"

namespace fastrnn::cuda::prim {

#if defined(FASTRNN_EMU)

FASTRNN_DEVICE float exp2_approx(float x) { return std::exp2(x); }
FASTRNN_DEVICE float reciprocal_approx(float x) { return 1.f / x; }
FASTRNN_DEVICE float reciprocal_sqrt(float x) { return 1.f / std::sqrt(x); }
FASTRNN_DEVICE float fma(float a, float b, float c) { return std::fma(a, b, c); }
FASTRNN_DEVICE uint32_t float_bits(float f) { return emu::as_bits(f); }
FASTRNN_DEVICE float bits_float(uint32_t b) { return emu::as_float(b); }
FASTRNN_DEVICE uint32_t to_bf16(float f) { return emu::bf16_bits(f); }
FASTRNN_DEVICE uint32_t to_fp16(float f) { return emu::fp16_bits(f); }
FASTRNN_DEVICE float from_fp16(uint32_t h) { return emu::fp16_value(h); }
// Nearest, ties away from zero, as cvt.rna: 10 bits of mantissa stay.
FASTRNN_DEVICE uint32_t to_tf32(float f) {
  return std::isfinite(f) ? (emu::as_bits(f) + 0x1000u) & ~0x1fffu : emu::as_bits(f);
}

#else

FASTRNN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTRNN_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTRNN_DEVICE float reciprocal_sqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTRNN_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTRNN_DEVICE uint32_t float_bits(float f) { return __float_as_uint(f); }
FASTRNN_DEVICE float bits_float(uint32_t b) { return __uint_as_float(b); }
// Conversions to 16 bits give 0x7fff for every NaN, so a result is never the sentinel 0xffff.
FASTRNN_DEVICE uint32_t to_bf16(float f) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
FASTRNN_DEVICE uint32_t to_fp16(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
FASTRNN_DEVICE float from_fp16(uint32_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(static_cast<uint16_t>(h)));
  return f;
}
FASTRNN_DEVICE uint32_t to_tf32(float f) {
  uint32_t b;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(b) : "f"(f));
  return b;
}

#endif

FASTRNN_DEVICE float from_bf16(uint32_t h) { return bits_float(h << 16); }

}  // namespace fastrnn::cuda::prim
