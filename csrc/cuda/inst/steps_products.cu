#include "../steps/functions.cuh"
#include "../steps/table.h"
#include "../tiles.h"

namespace fastrnn::cuda {

template <class D>
static void fill(StepsKernels& k, bool wide) {
  if (wide)
    steps_product_functions<D, ProductTile<FASTRNN_STEPS_WIDE>>(k);
  else
    steps_product_functions<D, ProductTile<FASTRNN_STEPS_NARROW>>(k);
}

void steps_products(StepsKernels& k, Format format, bool wide) {
  if (format == Format::bf16) return fill<Bf16>(k, wide);
  if (format == Format::fp16) return fill<Fp16>(k, wide);
  if (format == Format::tf32) return fill<Tf32>(k, wide);
  fill<Bf16x3>(k, wide);
}

}  // namespace fastrnn::cuda
