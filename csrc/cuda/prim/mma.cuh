// Tensor core products of one warp, fp32 accumulation: d[16][8] += a[16][K] b[K][8].
#pragma once
#include "platform.cuh"

namespace fastrnn::cuda::prim {

#if defined(FASTRNN_EMU)

#define FASTRNN_MMA(name, k, value)                                                                 \
  FASTRNN_DEVICE void name(float (&d)[4], const Vec4& a, uint32_t b0, uint32_t b1) {                \
    const uint32_t words[4] = {a.x, a.y, a.z, a.w};                                                 \
    emu::mma<k>(#name, d, words, b0, b1, [](uint32_t w, [[maybe_unused]] int i) { return value; }); \
  }
FASTRNN_MMA(mma_bf16, 16, emu::bf16_value(w >> (16 * i) & 0xffffu))
FASTRNN_MMA(mma_fp16, 16, emu::fp16_value(w >> (16 * i) & 0xffffu))
FASTRNN_MMA(mma_tf32, 8, emu::as_float(w & ~0x1fffu))

#else

#define FASTRNN_MMA(name, shape)                                                     \
  FASTRNN_DEVICE void name(float (&d)[4], const Vec4& a, uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned." shape                                           \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                    \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));        \
  }
FASTRNN_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTRNN_MMA(mma_fp16, "m16n8k16.row.col.f32.f16.f16.f32")
FASTRNN_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")

#endif
#undef FASTRNN_MMA

}  // namespace fastrnn::cuda::prim
