// What a kernel source needs to be compiled by nvcc, or by a host compiler for the SIMT emulator (FASTRNN_EMU).
// Each wrapper of csrc/cuda/prim is one PTX instruction and its emulated twin; kernels contain no assembly.
#pragma once
#include <cstdint>

#if defined(FASTRNN_EMU)
#include "../../tests/emu/emu.h"
#define FASTRNN_DEVICE inline
#define FASTRNN_HOST_DEVICE inline
#define FASTRNN_KERNEL(threads) inline void
#define FASTRNN_GRID_CONSTANT
#define FASTRNN_UNROLL
#else
#include <cuda_runtime.h>
#define FASTRNN_DEVICE __device__ __forceinline__
#define FASTRNN_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTRNN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FASTRNN_GRID_CONSTANT __grid_constant__
#define FASTRNN_UNROLL _Pragma("unroll")
#endif

namespace fastrnn::cuda {

struct alignas(16) Vec4 {
  uint32_t x, y, z, w;
};

namespace prim {

// What an architecture (80, 90, ...) has: shared memory of a CTA in bytes, and clusters.
constexpr int most_shared(int architecture) {
  return architecture == 80 ? 166912 : architecture < 90 || architecture >= 120 ? 101376 : 232448;
}
constexpr bool has_clusters(int architecture) { return architecture >= 90; }

// The one that is compiled for.
#if defined(__CUDA_ARCH__)
constexpr int kMostShared = most_shared(__CUDA_ARCH__ / 10);
constexpr bool kHasClusters = has_clusters(__CUDA_ARCH__ / 10);
#else
constexpr int kMostShared = 1 << 30;
constexpr bool kHasClusters = true;
#endif

#if defined(FASTRNN_EMU)
FASTRNN_DEVICE void unavailable() {}
FASTRNN_DEVICE int thread_index() { return emu::self().index; }
FASTRNN_DEVICE int block_index() { return emu::self().cta->index; }
FASTRNN_DEVICE int grid_threads() { return emu::machine().config.grid * emu::machine().config.block; }
// The site names the wait in a deadlock report.
FASTRNN_DEVICE void block_barrier(const char* site) { emu::block_barrier(site); }
FASTRNN_DEVICE void warp_barrier(const char* site) { emu::warp_barrier(site); }
FASTRNN_DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return emu::shuffle_xor(v, mask); }
FASTRNN_DEVICE void converge() {}  // collectives meet by themselves
constexpr uint32_t kPollsBetweenLooks = 16;
FASTRNN_DEVICE void poll_failed(const char* site) { emu::spin(site); }
FASTRNN_DEVICE uint64_t nanoseconds() { return emu::machine().rounds * 100000000u; }
#else
// The body of a kernel that this architecture cannot run; plan.h never asks for it there.
FASTRNN_DEVICE void unavailable() { __trap(); }
FASTRNN_DEVICE int thread_index() { return threadIdx.x; }
FASTRNN_DEVICE int block_index() { return blockIdx.x; }
FASTRNN_DEVICE int grid_threads() { return gridDim.x * blockDim.x; }
FASTRNN_DEVICE void block_barrier(const char*) { __syncthreads(); }
FASTRNN_DEVICE void warp_barrier(const char*) { __syncwarp(); }
FASTRNN_DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
// Lanes that waited for different lengths of time are together again: mma.sync needs all 32.
FASTRNN_DEVICE void converge() { __syncwarp(); }
constexpr uint32_t kPollsBetweenLooks = 1u << 16;
FASTRNN_DEVICE void poll_failed(const char*) {}
FASTRNN_DEVICE uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
#endif

}  // namespace prim
}  // namespace fastrnn::cuda
