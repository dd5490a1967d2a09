// The compiled kernels of layers that run step by step. Plain C++.
#pragma once
#include "program.h"

namespace fastrnn::cuda {

// Of inst/steps_*.cu: each fills in its part.
void steps_products(StepsKernels& k, Format format, bool wide);
void steps_forward(StepsKernels& k, CellKind cell, Format format);
void steps_backward(StepsKernels& k, CellKind cell, Format format);
void steps_rhn(StepsKernels& k, CellKind cell, Format format, bool backward);
void steps_bnlstm(StepsKernels& k, Format format, bool backward);

inline StepsKernels steps_kernels(const StepsProblem& q, bool wide) {
  StepsKernels k;
  steps_products(k, q.format, wide);
  if (is_rhn(q.cell))
    steps_rhn(k, q.cell, q.format, q.backward);
  else if (q.cell == CellKind::bnlstm)
    steps_bnlstm(k, q.format, q.backward);
  else if (q.backward)
    steps_backward(k, q.cell, q.format);
  else
    steps_forward(k, q.cell, q.format);
  return k;
}

}  // namespace fastrnn::cuda
