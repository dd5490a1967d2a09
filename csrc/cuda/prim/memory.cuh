// Loads and stores of global memory, by strength. What another CTA of the same launch writes is read by a relaxed or an
// acquiring load only: those go to L2, where all CTAs meet.
#pragma once
#include "platform.cuh"

namespace fastrnn::cuda::prim {

#if defined(FASTRNN_EMU)

FASTRNN_DEVICE Vec4 load_constant(const Vec4* p) { return *p; }
FASTRNN_DEVICE float load_constant(const float* p) { return *p; }
FASTRNN_DEVICE int load_constant(const int* p) { return *p; }
FASTRNN_DEVICE uint16_t load_constant(const uint16_t* p) { return *p; }
FASTRNN_DEVICE uint8_t load_constant(const uint8_t* p) { return *p; }
FASTRNN_DEVICE uint64_t load_constant(const uint64_t* p) { return *p; }
FASTRNN_DEVICE Vec4 load_relaxed(const Vec4* p) {
  uint32_t w[4];
  emu::load_relaxed(p, w, 4);
  return {w[0], w[1], w[2], w[3]};
}
FASTRNN_DEVICE uint32_t load_relaxed(const uint32_t* p) {
  uint32_t w;
  emu::load_relaxed(p, &w, 1);
  return w;
}
FASTRNN_DEVICE uint32_t load_acquire(const uint32_t* p) { return emu::load_acquire(p); }
FASTRNN_DEVICE void store_relaxed(uint32_t* p, uint32_t v) { emu::store_relaxed(p, v); }
FASTRNN_DEVICE void store_release(uint32_t* p, uint32_t v) { emu::store_release(p, v); }
template <class T>
FASTRNN_DEVICE void store(T* p, T v) {
  *p = v;
}

#else

// Never written while the kernel runs.
FASTRNN_DEVICE Vec4 load_constant(const Vec4* p) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {v.x, v.y, v.z, v.w};
}
FASTRNN_DEVICE float load_constant(const float* p) { return __ldg(p); }
FASTRNN_DEVICE int load_constant(const int* p) { return __ldg(p); }
FASTRNN_DEVICE uint16_t load_constant(const uint16_t* p) { return __ldg(p); }
FASTRNN_DEVICE uint8_t load_constant(const uint8_t* p) { return __ldg(p); }
FASTRNN_DEVICE uint64_t load_constant(const uint64_t* p) { return __ldg(p); }
FASTRNN_DEVICE Vec4 load_relaxed(const Vec4* p) {
  Vec4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
FASTRNN_DEVICE uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FASTRNN_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FASTRNN_DEVICE void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FASTRNN_DEVICE void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// For what nobody reads before the kernel ends.
template <class T>
FASTRNN_DEVICE void store(T* p, T v) {
  *p = v;
}

#endif

}  // namespace fastrnn::cuda::prim
