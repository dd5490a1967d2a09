// The launches of a batch-normalised layer that runs step by step: its ends, and the columns of a step.
#pragma once
#include "columns.cuh"

namespace fastrnn::cuda {

// Both operands of a row hold its first state, whichever step it begins at in reverse.
template <class D>
FASTRNN_KERNEL(256)
steps_begin_forward_columns_kernel(const StepsBnForwardParams* __restrict__ block, int) {
  using Elem = typename D::Elem;
  const StepsBnForwardParams& p = *block;
  const auto state = [&p](const void* from, int n, int j) {
    return from && j < p.H ? D::load(static_cast<const Elem*>(from) + static_cast<int64_t>(n) * p.H + j)
                           : 0.f;
  };
  each_element(p, p.product[0].inner, [&](int direction, int n, int j) {
    const BnLstmForwardDirection& d = p.dir[direction];
    const StepsWork& w = p.work[direction];
    const float h = reset_at(p, d.reverse ? row_length(p, n) - 1 : 0, n) ? 0.f : state(d.h0, n, j);
    for (void* operand : w.operand)
      D::store(static_cast<Elem*>(operand) + static_cast<int64_t>(n) * p.product[0].inner + j, h);
    if (j < p.H) w.c[static_cast<int64_t>(n) * p.H + j] = state(d.c0, n, j);
  });
}
// Nothing is sent to the first step that is walked but what the caller has.
template <class D>
FASTRNN_KERNEL(256)
steps_begin_backward_columns_kernel(const StepsBnBackwardParams* __restrict__ block, int) {
  using Elem = typename D::Elem;
  const StepsBnBackwardParams& p = *block;
  each_element(p, p.product[0].inner, [&](int direction, int n, int j) {
    const BnLstmBackwardDirection& d = p.dir[direction];
    const StepsWork& w = p.work[direction];
    for (void* operand : w.operand)
      D::store(static_cast<Elem*>(operand) + static_cast<int64_t>(n) * p.product[0].inner + j, 0.f);
    if (j >= p.H) return;
    const int64_t at = static_cast<int64_t>(n) * p.H + j;
    w.h[at] = d.dh_n ? D::load(static_cast<const Elem*>(d.dh_n) + at) : 0.f;
    w.c[at] = d.dc_n ? D::load(static_cast<const Elem*>(d.dc_n) + at) : 0.f;
  });
}
template <class D>
FASTRNN_KERNEL(256)
steps_end_backward_columns_kernel(const StepsBnBackwardParams* __restrict__ block, int) {
  using Elem = typename D::Elem;
  const StepsBnBackwardParams& p = *block;
  each_element(p, p.H, [&](int direction, int n, int j) {
    const BnLstmBackwardDirection& d = p.dir[direction];
    const int64_t at = static_cast<int64_t>(n) * p.H + j;
    if (d.dh0) D::store(static_cast<Elem*>(d.dh0) + at, p.work[direction].h[at]);
    if (d.dc0) D::store(static_cast<Elem*>(d.dc0) + at, p.work[direction].c[at]);
  });
}

// A CTA for `Units` units of each direction.
template <class D, int Units, int Threads, bool kLinear = false>
FASTRNN_KERNEL(Threads)
steps_forward_columns_kernel(const StepsBnForwardParams* __restrict__ block, int step) {
  const StepsBnForwardParams& p = *block;
  const int of_direction = ceil_div(p.H, Units), cta = prim::block_index();
  ForwardColumns<D, Units, Threads, kLinear>(p, cta / of_direction, cta % of_direction, p.first + step).run();
}
template <class D, int Units, int Threads, bool kLinear = false>
FASTRNN_KERNEL(Threads)
steps_backward_columns_kernel(const StepsBnBackwardParams* __restrict__ block, int step) {
  const StepsBnBackwardParams& p = *block;
  const int of_direction = ceil_div(p.H, Units), cta = prim::block_index();
  BackwardColumns<D, Units, Threads, kLinear>(p, cta / of_direction, cta % of_direction, p.first + step)
      .run();
}

}  // namespace fastrnn::cuda
