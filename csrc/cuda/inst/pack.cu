#include "../core/pack.cuh"

namespace fastrnn::cuda {
template __global__ void pack_kernel<Bf16>(const __grid_constant__ PackParams);
template __global__ void pack_kernel<Fp16>(const __grid_constant__ PackParams);
template __global__ void pack_kernel<Tf32>(const __grid_constant__ PackParams);
template __global__ void pack_kernel<Bf16x3>(const __grid_constant__ PackParams);
}  // namespace fastrnn::cuda
