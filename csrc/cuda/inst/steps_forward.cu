#include "../steps/functions.cuh"
#include "../steps/table.h"
#include "../tiles.h"

namespace fastrnn::cuda {

template <class D>
static void fill(StepsKernels& k, CellKind cell) {
  if (cell == CellKind::lstm) return steps_forward_functions<Lstm, D, FASTRNN_STEPS_ROW_THREADS>(k);
  if (cell == CellKind::gru) return steps_forward_functions<Gru<true>, D, FASTRNN_STEPS_ROW_THREADS>(k);
  if (cell == CellKind::gru_reset_before)
    return steps_forward_functions<Gru<false>, D, FASTRNN_STEPS_ROW_THREADS>(k);
  if (cell == CellKind::rnn_tanh) return steps_forward_functions<Rnn<false>, D, FASTRNN_STEPS_ROW_THREADS>(k);
  steps_forward_functions<Rnn<true>, D, FASTRNN_STEPS_ROW_THREADS>(k);
}

void steps_forward(StepsKernels& k, CellKind cell, Format format) {
  if (format == Format::bf16) return fill<Bf16>(k, cell);
  if (format == Format::fp16) return fill<Fp16>(k, cell);
  fill<Tf32>(k, cell);  // formats of 32 bits store the same tensors
}

}  // namespace fastrnn::cuda
