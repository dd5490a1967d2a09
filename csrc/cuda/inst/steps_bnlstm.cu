#include "../steps/functions.cuh"
#include "../steps/table.h"
#include "../tiles.h"

namespace fastrnn::cuda {

void steps_bnlstm(StepsKernels& k, Format format, bool backward) {
  if (format == Format::bf16) return steps_columns_functions<Bf16, FASTRNN_STEPS_COLUMNS>(k, backward);
  if (format == Format::fp16) return steps_columns_functions<Fp16, FASTRNN_STEPS_COLUMNS>(k, backward);
  // Formats of 32 bits store the same tensors.
  steps_columns_functions<Tf32, FASTRNN_STEPS_COLUMNS>(k, backward);
}

}  // namespace fastrnn::cuda
