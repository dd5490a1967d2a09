// A highway layer step by step: the pointwise part of a micro-step for one unit of one row, csrc/cells/rhn.h with the state in
// global memory.
//
// A launch is a micro-step, number s of T * depth. Its product takes slab s % depth (program.h packs them in that order); all else
// of a layer that runs step by step does not know that it is not a step. The tape is that of the kernels for whole sequences
// (core/rhn.cuh). Where each gate has a mask of the state, a product has a part and an operand for each gate.
#pragma once
#include "../core/rhn.cuh"
#include "functions.cuh"

namespace fastrnn::cuda {

// Of state (parts, N, H), one where there is no mask.
template <class D>
FASTRNN_DEVICE float rhn_mask(const void* mask, int64_t row, int H, int j) {
  return mask ? D::load(static_cast<const typename D::Elem*>(mask) + row * H + j) : 1.f;
}

template <class Cell, class D>
class RhnForwardUnits {
  using Elem = typename D::Elem;
  using A = Activations<false>;
  static constexpr int kG = Cell::kG;

 public:
  FASTRNN_DEVICE RhnForwardUnits(const StepsForwardParams& params, int direction, int s)
      : q_(params, direction, s / params.depth),
        level_(s % params.depth),
        s_(s),
        p_(params),
        d_(params.dir[direction]),
        w_(params.work[direction]) {}

  FASTRNN_DEVICE void micro_step(int n, int j) const {
    const bool ends = level_ + 1 == p_.depth;
    const int length = row_length(p_, n);
    if (q_.t >= length) {
      if (ends) D::store(row_at<Elem>(d_.y, q_.t, n) + j, 0.f);
      return;
    }
    const int64_t at = q_.at(n, p_.H, j);
    const float before = level_ == 0 && cleared(q_.t, n) ? 0.f : w_.h[at];
    float gate[kG];
    FASTRNN_UNROLL
    for (int g = 0; g < kG; g++) gate[g] = input(n, g * p_.H + j) + sum(n, g, j);
    const float out = Cell::template forward<A>(gate, before);
    if (d_.tape.data) {
      Elem* tape = row_at<Elem>(d_.tape, q_.t * p_.depth + level_, n) + j;
      FASTRNN_UNROLL
      for (int g = 0; g < kG; g++) D::store(tape + g * p_.H, gate[g]);
      D::store(tape + kG * p_.H, before);
    }
    // The carry has the state unmasked.
    w_.h[at] = mutated(Mutation::masked_carry) ? out * rhn_mask<D>(d_.mask, n, p_.H, j) : out;
    if (ends) {
      D::store(row_at<Elem>(d_.y, q_.t, n) + j, out);
      if (q_.t == (q_.reverse ? 0 : length - 1)) {
        if (d_.h_n) D::store(static_cast<Elem*>(d_.h_n) + at, out);
        return;
      }
    }
    send(n, j, ends && cleared(q_.walk.at(q_.s + 1), n) ? 0.f : out);
  }

 private:
  FASTRNN_DEVICE bool cleared(int t, int n) const {
    return reset_at(p_, t, n) && !mutated(Mutation::reset_ignored);
  }
  FASTRNN_DEVICE float input(int n, int row) const {
    if (level_ > 0)
      return d_.bias ? prim::load_constant(d_.bias + static_cast<int64_t>(level_) * kG * p_.H + row) : 0.f;
    if (p_.wx_is_float) return prim::load_constant(row_at<const float>(d_.wx, q_.t, n) + row);
    return D::load(row_at<const Elem>(d_.wx, q_.t, n) + row);
  }
  // Gate g's, (N, G * H), or (G, N, H) where each gate is a part.
  FASTRNN_DEVICE float sum(int n, int g, int j) const {
    const int64_t row = p_.parts == 1 ? static_cast<int64_t>(n) * kG + g : static_cast<int64_t>(g) * p_.N + n;
    return w_.sums[row * p_.H + j];
  }
  // Masked after it was rounded, as the weight gradients' operand is.
  FASTRNN_DEVICE void send(int n, int j, float state) const {
    Elem* const to = static_cast<Elem*>(w_.operand[(s_ + 1) & 1]);
    for (int part = 0; part < p_.parts; part++) {
      const int64_t row = static_cast<int64_t>(part) * p_.N + n;
      D::store(to + row * p_.product[0].inner + j, D::round(state) * rhn_mask<D>(d_.mask, row, p_.H, j));
    }
  }

  const StepPlace<StepsForwardParams, false> q_;
  const int level_, s_;
  const StepsForwardParams& p_;
  const StepsForwardDirection& d_;
  const StepsWork& w_;
};

template <class Cell, class D>
class RhnBackwardUnits {
  using Elem = typename D::Elem;
  using A = Activations<false>;
  static constexpr int kG = Cell::kG;

 public:
  FASTRNN_DEVICE RhnBackwardUnits(const StepsBackwardParams& params, int direction, int s)
      : q_(params, direction, s / params.depth),
        level_(params.depth - 1 - s % params.depth),
        s_(s),
        p_(params),
        d_(params.dir[direction]),
        w_(params.work[direction]) {}

  FASTRNN_DEVICE void micro_step(int n, int j) const {
    const int64_t at = q_.at(n, p_.H, j);
    // What the micro-step walked before sends through its product, zero where it sends nothing, beside what it left.
    float ds = w_.h[at];
    for (int part = 0; part < p_.parts; part++) {
      const int64_t row = static_cast<int64_t>(part) * p_.N + n;
      ds = A::fma(w_.sums[row * p_.H + j], rhn_mask<D>(d_.mask, row, p_.H, j), ds);
    }
    if (q_.s == p_.T) {
      w_.h[at] = ds;
      return;
    }
    float g[kG] = {};
    bool cut = false;
    const int row = q_.t * p_.depth + level_;
    if (q_.t < row_length(p_, n)) {
      float tape[kG + 1];
      const Elem* from = row_at<const Elem>(d_.tape, row, n) + j;
      FASTRNN_UNROLL
      for (int v = 0; v <= kG; v++) tape[v] = D::load(from + v * p_.H);
      if (level_ + 1 == p_.depth) ds += optional_row<D>(d_.dy, q_.t, n, j);
      ds = Cell::template backward<A>(tape, ds, g);
      cut = level_ == 0 && reset_at(p_, q_.t, n) && !mutated(Mutation::reset_ignored);
    }
    w_.h[at] = cut ? 0.f : ds;
    Elem* const dgates = row_at<Elem>(d_.dgates, row, n) + j;
    FASTRNN_UNROLL
    for (int v = 0; v < kG; v++) {
      D::store(dgates + v * p_.H, g[v]);
      send(n, v, j, cut ? 0.f : g[v]);
    }
  }

 private:
  // (N, G * H_padded), or (G, N, H_padded) where each gate is a part.
  FASTRNN_DEVICE void send(int n, int v, int j, float g) const {
    const int64_t row = p_.parts == 1 ? static_cast<int64_t>(n) * kG + v : static_cast<int64_t>(v) * p_.N + n;
    D::store(static_cast<Elem*>(w_.operand[(s_ + 1) & 1]) + row * p_.H_padded + j, g);
  }

  const StepPlace<StepsBackwardParams, true> q_;
  const int level_, s_;
  const StepsBackwardParams& p_;
  const StepsBackwardDirection& d_;
  const StepsWork& w_;
};

template <class Cell, class D>
FASTRNN_KERNEL(256)
steps_rhn_forward_kernel(const StepsForwardParams* __restrict__ block, int step) {
  const StepsForwardParams& p = *block;
  const int s = p.first + step;
  each_element(p, p.H, [&](int direction, int n, int j) {
    RhnForwardUnits<Cell, D>(p, direction, s).micro_step(n, j);
  });
}
template <class Cell, class D>
FASTRNN_KERNEL(256)
steps_rhn_backward_kernel(const StepsBackwardParams* __restrict__ block, int step) {
  const StepsBackwardParams& p = *block;
  const int s = p.first + step;
  each_element(p, p.H, [&](int direction, int n, int j) {
    RhnBackwardUnits<Cell, D>(p, direction, s).micro_step(n, j);
  });
}

template <class Cell, class D>
void steps_rhn_functions(StepsKernels& k, bool backward) {
  if (backward) {
    steps_backward_ends<D>(k);
    k.phase[0] = address_of(&steps_rhn_backward_kernel<Cell, D>);
  } else {
    steps_forward_ends<D>(k);
    k.phase[0] = address_of(&steps_rhn_forward_kernel<Cell, D>);
  }
}

}  // namespace fastrnn::cuda
