// Addresses of the kernels of one problem: taking them compiles them.
#pragma once
#include "columns_kernels.cuh"
#include "kernels.cuh"
#include "product.cuh"
#include "program.h"

namespace fastrnn::cuda {

template <class F>
const void* address_of(F* f) {
  return reinterpret_cast<const void*>(f);
}

// D: the format of the products.
template <class D, class Tile>
void steps_product_functions(StepsKernels& k) {
  k.tile = Tile::kShape;
  k.product = address_of(&steps_product_kernel<D, Tile>);
  k.pack = address_of(&steps_pack_kernel<D>);
}

// What all cells have. D: a format that stores tensors as the problem's does; the pointwise part knows nothing else of it.
template <class D>
void steps_forward_ends(StepsKernels& k) {
  k.block = address_of(&steps_block_kernel<StepsForwardParams>);
  k.begin = address_of(&steps_begin_forward_kernel<D>);
}
template <class D>
void steps_backward_ends(StepsKernels& k) {
  k.block = address_of(&steps_block_kernel<StepsBackwardParams>);
  k.begin = address_of(&steps_begin_backward_kernel<D>);
  k.end = address_of(&steps_end_backward_kernel<D>);
}

template <class Cell, class D, int RowThreads, bool kLinear = false>
void steps_forward_functions(StepsKernels& k) {
  k.row_threads = RowThreads;
  steps_forward_ends<D>(k);
  k.phase[0] = address_of(&steps_forward_kernel<Cell, D, 0, kLinear>);
  if constexpr (Cell::kPhases == 2) k.phase[1] = address_of(&steps_forward_kernel<Cell, D, 1, kLinear>);
  if constexpr (Cell::kHasCell) k.projection = address_of(&steps_forward_projection_kernel<D, kLinear>);
  if constexpr (Cell::kHasCell || Cell::kTwoGradients)
    k.row = address_of(&steps_forward_row_kernel<Cell, D, RowThreads, kLinear>);
}
template <class Cell, class D, int RowThreads, bool kLinear = false>
void steps_backward_functions(StepsKernels& k) {
  k.row_threads = RowThreads;
  steps_backward_ends<D>(k);
  k.phase[0] = address_of(&steps_backward_kernel<Cell, D, 0, kLinear>);
  if constexpr (Cell::kPhases == 2) k.phase[1] = address_of(&steps_backward_kernel<Cell, D, 1, kLinear>);
  if constexpr (Cell::kHasCell) k.projection = address_of(&steps_backward_projection_kernel<D, kLinear>);
  if constexpr (Cell::kHasCell || Cell::kTwoGradients)
    k.row = address_of(&steps_backward_row_kernel<Cell, D, RowThreads, kLinear>);
}

// Batch-normalised LSTM.
template <class D, int Units, int Threads, bool kLinear = false>
void steps_columns_functions(StepsKernels& k, bool backward) {
  k.columns_shape = {Units, Threads};
  if (backward) {
    k.block = address_of(&steps_block_kernel<StepsBnBackwardParams>);
    k.begin = address_of(&steps_begin_backward_columns_kernel<D>);
    k.end = address_of(&steps_end_backward_columns_kernel<D>);
    k.columns = address_of(&steps_backward_columns_kernel<D, Units, Threads, kLinear>);
  } else {
    k.block = address_of(&steps_block_kernel<StepsBnForwardParams>);
    k.begin = address_of(&steps_begin_forward_columns_kernel<D>);
    k.columns = address_of(&steps_forward_columns_kernel<D, Units, Threads, kLinear>);
  }
}

}  // namespace fastrnn::cuda
