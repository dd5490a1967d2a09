// First: kernels.h has lists of the same names as the cells' functions.
#include "../steps/rhn.cuh"

#include "../steps/table.h"

namespace fastrnn::cuda {

template <class D>
static void fill(StepsKernels& k, CellKind cell, bool backward) {
  if (cell == CellKind::rhn) return steps_rhn_functions<Rhn<true>, D>(k, backward);
  steps_rhn_functions<Rhn<false>, D>(k, backward);
}

void steps_rhn(StepsKernels& k, CellKind cell, Format format, bool backward) {
  if (format == Format::bf16) return fill<Bf16>(k, cell, backward);
  if (format == Format::fp16) return fill<Fp16>(k, cell, backward);
  fill<Tf32>(k, cell, backward);  // formats of 32 bits store the same tensors
}

}  // namespace fastrnn::cuda
