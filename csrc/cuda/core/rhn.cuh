// Recurrent Highway layers, forward and backward, in one launch each: a step is `depth` micro-steps, each a matmul with its
// own slab of weights and an exchange. csrc/cells/rhn.h has the arithmetic.
//
// All slabs are in shared memory: a micro-step sweeps one of them, 1 / depth of what registers would save, and an
// index that is known at run time only serves every depth with one kernel.
#pragma once
#include "../../cells/rhn.h"
#include "activations.cuh"
#include "cells.cuh"
#include "rhn.h"
#include "source.cuh"
#include "weights.cuh"

namespace fastrnn::cuda {

template <bool Coupled>
struct Rhn : Shaped<Coupled ? CellKind::rhn : CellKind::rhn_uncoupled> {
  static constexpr int kG = Coupled ? 2 : 3;

  // z: pre-activations, made gates; returns the next state.
  template <class A>
  FASTRNN_DEVICE static float forward(float (&z)[kG], float s) {
    z[0] = A::tanh(z[0]);
    z[1] = A::sigmoid(z[1]);
    if constexpr (Coupled) {
      return rhn_state<A>(z[0], z[1], s);
    } else {
      z[2] = A::sigmoid(z[2]);
      return rhn_state<A>(z[0], z[1], z[2], s);
    }
  }
  // g: gradients of the pre-activations; returns what reaches s beside the matmul.
  template <class A>
  FASTRNN_DEVICE static float backward(const float (&tape)[kG + 1], float ds, float (&g)[kG]) {
    RhnGrad<float> r;
    if constexpr (Coupled) {
      r = rhn_backward<A>(tape[0], tape[1], tape[2], ds);
    } else {
      r = rhn_backward<A>(tape[0], tape[1], tape[2], tape[3], ds);
      g[2] = r.c;
    }
    g[0] = r.h;
    g[1] = r.t;
    return r.s;
  }
};

// What both directions of the computation share: a CTA's place, its slabs, its elements.
template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool IsBackward,
          class Params>
class RhnBase {
 public:
  using Geo = GeometryOf<Cell, T, IsBackward>;
  static constexpr Geometry kGeometry = Geo::kGeometry;
  using Exchange = ExchangeOf<D, T, kGeometry.values()>;
  static constexpr SharedLayout kLayout = shared_layout(kGeometry, D::kFormat, Exchange::kBuffers);
  static constexpr bool kAvailable =
      kLayout.bytes <= prim::kMostShared && (prim::kHasClusters || !Exchange::kIsCluster);

 protected:
  using Elem = typename D::Elem;
  using M = Matmul<Geo, 0>;
  static constexpr int kG = Cell::kG;
  static_assert(T::kResident == 0, "the slab of a micro-step is found by its number");

  FASTRNN_DEVICE RhnBase(const Params& p, bool reverse, const Vec4* weights)
      : p_(p),
        place_(place_of(p, prim::block_index())),
        walk_{p.T, reverse},
        rows_(p, place_),
        lane_(prim::thread_index() % 32),
        warp_(prim::thread_index() / 32),
        slice_((warp_ + place_.cta) % T::kWarps),
        exchange_(p, place_, kLayout.mail),
        sums_(kLayout.sums) {
    for (int l = 0; l < p.depth; l++)
      weights_.load(weights + (static_cast<int64_t>(l) * p.ctas + place_.cta) * kGeometry.cta_vectors() +
                        warp_ * kGeometry.warp_vectors(),
                    slab(l), lane_);
    exchange_.start(p, IsBackward ? kG : 1, IsBackward ? kG : 1);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) length_[i] = length_of<T>(p_, place_, i);
  }

  FASTRNN_DEVICE int slab(int l) const {
    return kLayout.weights + (l * T::kWarps + warp_) * kGeometry.warp_shared_vectors() * 16;
  }
  FASTRNN_DEVICE Element element(int i) const { return element_of<T>(p_, place_, i, length_[i]); }
  FASTRNN_DEVICE float load(const void* state, const Element& x, float otherwise) const {
    if (!state || !x.length) return otherwise;
    return D::load(static_cast<const Elem*>(state) + static_cast<int64_t>(x.n) * p_.H + x.j);
  }

  // Slab l times what exchange e - 1 published as row `read` of the mail, into the partial sums; from(x): where row
  // tile x has it from.
  template <class FromOf>
  FASTRNN_DEVICE int sum(int l, int e, int read, const Mail& mail, const void* initial, FromOf&& from) {
    weights_.attach(slab(mutated(Mutation::one_slab) ? 0 : l), lane_);
    Source<D, T, M, Exchange> source{exchange_,
                                     mail,
                                     static_cast<const Elem*>(initial),
                                     e - 1,
                                     read,
                                     p_.H,
                                     M::kIn * p_.H_padded,
                                     slice_ * M::kChunks * D::kChunk + lane_ % 4 * D::kVec,
                                     rows_,
                                     {}};
    FASTRNN_UNROLL
    for (int x = 0; x < T::kRowTiles; x++) source.from[x] = from(x);
    float acc[M::kTiles][T::kRowTiles][4] = {};
    if (e > 0) exchange_.wait(e - 1);
    multiply<D, T, M>(weights_, source, acc);
    const int buffer = mutated(Mutation::single_reduction_tile) ? 0 : e & 1;
    sums_.put(buffer, slice_, lane_, acc);
    if (!mutated(Mutation::dropped_barrier)) prim::block_barrier("partial sums");
    return buffer;
  }

  const Params& p_;
  const Place place_;
  const Walk walk_;
  const LaneRows<T> rows_;
  const int lane_, warp_, slice_;
  Exchange exchange_;
  const Sums<T, kGeometry.sum_rows()> sums_;
  Weights<M> weights_;
  int length_[T::kPerThread];
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class RhnForward : public RhnBase<Cell, D, T, ExchangeOf, false, RhnForwardParams> {
  using Base = RhnBase<Cell, D, T, ExchangeOf, false, RhnForwardParams>;
  using typename Base::Elem;
  using typename Base::Exchange;
  using A = Activations<kLinear>;
  using Base::kG, Base::p_, Base::place_, Base::walk_, Base::rows_, Base::exchange_, Base::sums_;

 public:
  FASTRNN_DEVICE RhnForward(const RhnForwardParams& p)
      : RhnForward(p, p.dir[place_of(p, prim::block_index()).direction]) {}

  FASTRNN_DEVICE void run() {
    int e = 0;
    for (int s = 0; s < p_.T; s++)
      for (int l = 0; l < p_.depth; l++) micro_step(walk_.at(s), l, e++);
    exchange_.finish();
  }

 private:
  FASTRNN_DEVICE RhnForward(const RhnForwardParams& p, const RhnForwardDirection& d)
      : Base(p, d.reverse, d.weights), d_(d) {
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      state_[i] = this->load(d_.h0, x, 0.f);
      mask_[i] = this->load(d_.mask, x, 1.f);
      fetch(i, x, walk_.at(0), 0);
    }
  }

  // What a micro-step's gates have beside the matmul, fetched a micro-step ahead.
  FASTRNN_DEVICE void fetch(int i, const Element& x, int t, int l) {
    if (t >= x.length) return;
    FASTRNN_UNROLL
    for (int g = 0; g < kG; g++) {
      const int at = g * p_.H + x.j;
      if (l > 0)
        input_[i][g] =
            d_.bias ? prim::load_constant(d_.bias + static_cast<int64_t>(l) * kG * p_.H + at) : 0.f;
      else if (p_.wx_is_float)
        input_[i][g] = prim::load_constant(row_at<const float>(d_.wx, t, x.n) + at);
      else
        input_[i][g] = D::load(row_at<const Elem>(d_.wx, t, x.n) + at);
    }
  }

  FASTRNN_DEVICE void micro_step(int t, int l, int e) {
    const int read = l ? t * p_.depth + l - 1 : walk_.before(t) * p_.depth + p_.depth - 1;
    const int buffer = this->sum(l, e, read, d_.mail, d_.h0_masked, [&](int x) {
      if (l == 0) return state_before(p_, walk_, rows_.n[x], rows_.length[x], t);
      return t < rows_.length[x] ? From::mail : From::zero;
    });
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) finish(i, t, l, e, buffer);
    exchange_.done(e);
  }

  FASTRNN_DEVICE void finish(int i, int t, int l, int e, int buffer) {
    const Element x = this->element(i);
    const int row = t * p_.depth + l;
    const bool live = t < x.length, ends = l + 1 == p_.depth, last = e + 1 == p_.T * p_.depth;
    float gate[kG], before = 0.f, out = 0.f;
    if (live) {
      if (l == 0 && reset_at(p_, t, x.n)) state_[i] = 0.f;
      before = state_[i];
      FASTRNN_UNROLL
      for (int g = 0; g < kG; g++)
        gate[g] = input_[i][g] + sums_.get(buffer, g * T::kUnits + x.unit, x.local);
      out = state_[i] = Cell::template forward<A>(gate, before);
      if (mutated(Mutation::masked_carry)) state_[i] *= mask_[i];
    }
    // Masked after it was rounded, as the weight gradients' operand is; the carry has the state unmasked.
    if (!Exchange::kInShared || !last)
      publish<D>(p_, exchange_, d_.mail, e, row, x, 0, D::round(out) * mask_[i]);
    if (x.length && d_.tape.data && live) {
      Elem* tape = row_at<Elem>(d_.tape, row, x.n) + x.j;
      FASTRNN_UNROLL
      for (int g = 0; g < kG; g++) D::store(tape + g * p_.H, gate[g]);
      D::store(tape + kG * p_.H, before);
    }
    if (x.length && ends) {
      D::store(row_at<Elem>(d_.y, t, x.n) + x.j, out);
      if (d_.h_n && t == (walk_.backwards ? 0 : x.length - 1))
        D::store(static_cast<Elem*>(d_.h_n) + static_cast<int64_t>(x.n) * p_.H + x.j, out);
    }
    if (!last) fetch(i, x, ends ? walk_.at((e + 1) / p_.depth) : t, ends ? 0 : l + 1);
  }

  const RhnForwardDirection& d_;
  float state_[T::kPerThread], mask_[T::kPerThread], input_[T::kPerThread][kG];
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class RhnBackward : public RhnBase<Cell, D, T, ExchangeOf, true, RhnBackwardParams> {
  using Base = RhnBase<Cell, D, T, ExchangeOf, true, RhnBackwardParams>;
  using typename Base::Elem;
  using typename Base::Exchange;
  using A = Activations<kLinear>;
  using Base::kG, Base::p_, Base::place_, Base::walk_, Base::rows_, Base::exchange_, Base::sums_;

 public:
  FASTRNN_DEVICE RhnBackward(const RhnBackwardParams& p)
      : RhnBackward(p, p.dir[place_of(p, prim::block_index()).direction]) {}

  // After the last micro-step one more matmul: what reaches the initial state.
  FASTRNN_DEVICE void run() {
    int e = 0;
    for (int s = 0; s < p_.T; s++)
      for (int l = p_.depth - 1; l >= 0; l--) {
        micro_step(s, l, e);
        exchange_.done(e++);
      }
    micro_step(p_.T, p_.depth - 1, e);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      if (x.length && d_.dh0)
        D::store(static_cast<Elem*>(d_.dh0) + static_cast<int64_t>(x.n) * p_.H + x.j, ds_[i]);
    }
    exchange_.finish();
  }

 private:
  FASTRNN_DEVICE RhnBackward(const RhnBackwardParams& p, const RhnBackwardDirection& d)
      : Base(p, !d.reverse, d.weights), d_(d) {
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      ds_[i] = this->load(d_.dh_n, x, 0.f);
      mask_[i] = this->load(d_.mask, x, 1.f);
      fetch(i, x, walk_.at(0), p_.depth - 1);
    }
  }

  FASTRNN_DEVICE void fetch(int i, const Element& x, int t, int l) {
    if (t >= x.length) return;
    const Elem* tape = row_at<const Elem>(d_.tape, t * p_.depth + l, x.n) + x.j;
    FASTRNN_UNROLL
    for (int g = 0; g <= kG; g++) tape_[i][g] = D::load(tape + g * p_.H);
    dy_[i] = d_.dy.data && l + 1 == p_.depth ? D::load(row_at<const Elem>(d_.dy, t, x.n) + x.j) : 0.f;
  }

  // Takes the gradient from the micro-step above: the one after l, or the first one of the step walked before.
  FASTRNN_DEVICE void micro_step(int s, int l, int e) {
    const int t = walk_.at(s), done = walk_.before(t);
    const bool ends = l + 1 == p_.depth;
    const int above = ends ? 0 : l + 1;
    const int buffer =
        this->sum(above, e, (ends ? done : t) * p_.depth + above, d_.mail, nullptr, [&](int x) {
          if (ends) return gradient_after(p_, rows_.n[x], rows_.length[x], done);
          return t < rows_.length[x] ? From::mail : From::zero;
        });
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) finish(i, s, t, l, e, done, buffer);
  }

  FASTRNN_DEVICE void finish(int i, int s, int t, int l, int e, int done, int buffer) {
    const Element x = this->element(i);
    const bool live = s < p_.T && t < x.length, ends = l + 1 == p_.depth;
    const bool arrives = ends ? x.length && done >= 0 && done < x.length : live;
    if (arrives && ends && reset_at(p_, done, x.n))
      ds_[i] = 0.f;
    else if (arrives)
      ds_[i] = A::fma(sums_.get(buffer, x.unit, x.local), mask_[i], ds_[i]);
    if (s == p_.T) return;
    float g[kG] = {};
    if (live) ds_[i] = Cell::template backward<A>(tape_[i], ds_[i] + dy_[i], g);
    const int row = t * p_.depth + l;
    FASTRNN_UNROLL
    for (int v = 0; v < kG; v++) publish<D>(p_, exchange_, d_.mail, e, row, x, v, g[v]);
    if (x.length && (Exchange::kInShared || !d_.mail_is_gradient)) {
      Elem* dgates = row_at<Elem>(d_.dgates, row, x.n) + x.j;
      FASTRNN_UNROLL
      for (int v = 0; v < kG; v++) D::store(dgates + v * p_.H, g[v]);
    }
    if (l > 0)
      fetch(i, x, t, l - 1);
    else if (s + 1 < p_.T)
      fetch(i, x, walk_.at(s + 1), p_.depth - 1);
  }

  const RhnBackwardDirection& d_;
  float ds_[T::kPerThread], mask_[T::kPerThread], dy_[T::kPerThread], tape_[T::kPerThread][kG + 1];
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
FASTRNN_KERNEL(T::kThreads)
rhn_forward_kernel(const FASTRNN_GRID_CONSTANT RhnForwardParams p) {
  using Layer = RhnForward<Cell, D, T, ExchangeOf, kLinear>;
  if constexpr (Layer::kAvailable) {
    Layer layer(p);
    layer.run();
  } else {
    prim::unavailable();
  }
}

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
FASTRNN_KERNEL(T::kThreads)
rhn_backward_kernel(const FASTRNN_GRID_CONSTANT RhnBackwardParams p) {
  using Layer = RhnBackward<Cell, D, T, ExchangeOf, kLinear>;
  if constexpr (Layer::kAvailable) {
    Layer layer(p);
    layer.run();
  } else {
    prim::unavailable();
  }
}

}  // namespace fastrnn::cuda
