// What every cell header needs: how its functions are compiled on a CPU and on a GPU.
#pragma once
#if defined(__CUDACC__)
#define FASTRNN_CELL __host__ __device__ __forceinline__
#else
#define FASTRNN_CELL static inline __attribute__((always_inline))
#endif
