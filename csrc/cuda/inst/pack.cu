#include "../core/pack.cuh"
#include "../kernels.h"

namespace fastrnn::cuda {

const void* pack_function(Format format) {
  if (format == Format::bf16) return reinterpret_cast<const void*>(&pack_kernel<Bf16>);
  if (format == Format::fp16) return reinterpret_cast<const void*>(&pack_kernel<Fp16>);
  if (format == Format::tf32) return reinterpret_cast<const void*>(&pack_kernel<Tf32>);
  return reinterpret_cast<const void*>(&pack_kernel<Bf16x3>);
}

}  // namespace fastrnn::cuda
