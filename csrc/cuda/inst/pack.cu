#include "../core/noise.cuh"
#include "../core/pack.cuh"
#include "../kernels.h"

namespace fastrnn::cuda {

const void* pack_function(Format format) {
  if (format == Format::bf16) return reinterpret_cast<const void*>(&pack_kernel<Bf16>);
  if (format == Format::fp16) return reinterpret_cast<const void*>(&pack_kernel<Fp16>);
  if (format == Format::tf32) return reinterpret_cast<const void*>(&pack_kernel<Tf32>);
  return reinterpret_cast<const void*>(&pack_kernel<Bf16x3>);
}

// Formats of 32 bits store the same tensors.
const void* mask_state_function(Format format) {
  if (format == Format::bf16) return reinterpret_cast<const void*>(&mask_state_kernel<Bf16>);
  if (format == Format::fp16) return reinterpret_cast<const void*>(&mask_state_kernel<Fp16>);
  return reinterpret_cast<const void*>(&mask_state_kernel<Tf32>);
}

}  // namespace fastrnn::cuda
