// LSTM with projection, forward and backward, in one launch each: a step has two matmuls and an exchange after each.
//
//   forward:   gates of a CTA's units from h_{t-1} (K = P), publish m_t = o * tanh(c_t)
//              ->  h_t of its projected units from m_t (K = H), publish h_t
//   backward:  dh_t of its projected units from the gate gradients of the step walked before (K = 4H), publish dh_t
//              ->  dm_t of its units from dh_t (K = P), the cell backward, publish the gate gradients
//
// CTA c has units and projected units of the same numbers; since P < H, the last CTAs have no projected ones.
#pragma once
#include "cells.cuh"
#include "layer.cuh"
#include "projected.h"

namespace fastrnn::cuda {

struct ProjectedLstm : Shaped<CellKind::lstm_projected> {};

template <class D, class T, template <class, class, int> class ExchangeOf, bool IsBackward, class Params>
class ProjectedBase : public LayerBase<GeometryOf<ProjectedLstm, T, IsBackward>, D, T, ExchangeOf, Params> {
  using Geo = GeometryOf<ProjectedLstm, T, IsBackward>;
  using Base = LayerBase<Geo, D, T, ExchangeOf, Params>;

 public:
  using Base::kLayout;
  using typename Base::Exchange;
  static constexpr bool kAvailable =
      kLayout.bytes <= prim::kMostShared && (prim::kHasClusters || !Exchange::kIsCluster);

 protected:
  using Base::p_, Base::place_;
  using M0 = Matmul<Geo, 0>;
  using M1 = Matmul<Geo, 1>;

  FASTRNN_DEVICE ProjectedBase(const Params& p, bool backwards, const Vec4* weights) : Base(p, backwards) {
    this->template load<0>(w0_, weights);
    this->template load<1>(w1_, weights);
    this->exchange_.start(p, 1, IsBackward ? 4 : 1);
  }
  // The same element as one of a projected row.
  FASTRNN_DEVICE Element projected(int i) const {
    Element x = this->element(i);
    if (x.j >= p_.P) x.length = 0;
    return x;
  }
  FASTRNN_DEVICE bool idle() const { return place_.cta * T::kUnits >= p_.P; }
  // Rows of h as the mail has them. In a cluster every CTA (all have units, plan.h) publishes its part of every exchange, zeros
  // if nothing else: that a peer has published tells that it has read.
  FASTRNN_DEVICE int published_width() const { return Exchange::kInShared ? p_.H_padded : p_.P_padded; }
  FASTRNN_DEVICE int read_width() const { return mutated(Mutation::other_width) ? p_.P_padded : p_.H_padded; }

  Weights<M0> w0_;
  Weights<M1> w1_;
};

template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class ProjectedForward : public ProjectedBase<D, T, ExchangeOf, false, ProjectedForwardParams> {
  using Base = ProjectedBase<D, T, ExchangeOf, false, ProjectedForwardParams>;
  using typename Base::Elem;
  using A = Activations<kLinear>;
  using Base::p_, Base::place_, Base::walk_, Base::rows_, Base::exchange_, Base::sums_;

 public:
  using typename Base::Exchange;
  FASTRNN_DEVICE ProjectedForward(const ProjectedForwardParams& p)
      : ProjectedForward(p, p.dir[place_of(p, prim::block_index()).direction]) {}

  FASTRNN_DEVICE void run() {
    for (int s = 0; s < p_.T; s++) {
      gates(s);
      project(s);
    }
    exchange_.finish();
  }

 private:
  FASTRNN_DEVICE ProjectedForward(const ProjectedForwardParams& p, const ProjectedForwardDirection& d)
      : Base(p, d.reverse, d.weights), d_(d) {
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      cell_[i] = this->load(d_.c0, x, p_.H);
      fetch(i, x, walk_.at(0));
    }
  }

  FASTRNN_DEVICE void fetch(int i, const Element& x, int t) {
    if (t >= x.length) return;
    FASTRNN_UNROLL
    for (int g = 0; g < 4; g++) {
      const int at = g * p_.H + x.j;
      wx_[i][g] = p_.wx_is_float ? prim::load_constant(row_at<const float>(d_.wx, t, x.n) + at)
                                 : D::load(row_at<const Elem>(d_.wx, t, x.n) + at);
    }
  }

  FASTRNN_DEVICE void gates(int s) {
    const int t = walk_.at(s), e = 2 * s;
    const int buffer =
        this->sum(this->w0_, e, walk_.before(t), d_.state_mail, d_.h0, p_.P, p_.P_padded, false,
                  [&](int x) { return state_before(p_, walk_, rows_.n[x], rows_.length[x], t); });
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      const bool live = t < x.length;
      float gate[4] = {}, middle = 0.f;
      if (live) {
        if (reset_at(p_, t, x.n)) cell_[i] = 0.f;
        FASTRNN_UNROLL
        for (int g = 0; g < 4; g++) {
          const float z = wx_[i][g] + sums_.get(buffer, g * T::kUnits + x.unit, x.local);
          gate[g] = g == 2 ? A::tanh(z) : A::sigmoid(z);
        }
        cell_[i] = lstm_cell<A>(gate[0], gate[1], gate[2], cell_[i]);
        middle = gate[3] * A::tanh(cell_[i]);
      }
      publish<D>(p_, exchange_, d_.middle_mail, e, t, x, 0, middle);
      if (x.length) keep(i, x, t, live, gate);
      if (s + 1 < p_.T) fetch(i, x, walk_.at(s + 1));
    }
    exchange_.done(e);
  }

  FASTRNN_DEVICE void keep(int i, const Element& x, int t, bool live, const float (&gate)[4]) const {
    if (d_.tape.data && live) {
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) D::store(row_at<Elem>(d_.tape, t, x.n) + g * p_.H + x.j, gate[g]);
    }
    if (d_.cells.data) prim::store(row_at<float>(d_.cells, t, x.n) + x.j, live ? cell_[i] : 0.f);
    if (t == (walk_.backwards ? 0 : x.length - 1)) this->store(d_.c_n, x, p_.H, cell_[i]);
  }

  FASTRNN_DEVICE void project(int s) {
    const int t = walk_.at(s), e = 2 * s + 1;
    const int buffer =
        this->sum(this->w1_, e, t, d_.middle_mail, nullptr, p_.H, this->read_width(), this->idle(),
                  [&](int x) { return t < rows_.length[x] ? From::mail : From::zero; });
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->projected(i);
      const float h = t < x.length ? sums_.get(buffer, x.unit, x.local) : 0.f;
      if (!Exchange::kInShared || s + 1 < p_.T)
        publish<D>(p_, exchange_, d_.state_mail, e, t, x, 0, h, this->published_width());
      if (!x.length) continue;
      if (Exchange::kInShared || d_.y.data != d_.state_mail.data)
        D::store(row_at<Elem>(d_.y, t, x.n) + x.j, h);
      if (t == (walk_.backwards ? 0 : x.length - 1)) this->store(d_.h_n, x, p_.P, h);
    }
    exchange_.done(e);
  }

  const ProjectedForwardDirection& d_;
  float cell_[T::kPerThread], wx_[T::kPerThread][4];
};

template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class ProjectedBackward : public ProjectedBase<D, T, ExchangeOf, true, ProjectedBackwardParams> {
  using Base = ProjectedBase<D, T, ExchangeOf, true, ProjectedBackwardParams>;
  using typename Base::Elem;
  using A = Activations<kLinear>;
  using Base::p_, Base::place_, Base::walk_, Base::rows_, Base::exchange_, Base::sums_;

 public:
  using typename Base::Exchange;
  FASTRNN_DEVICE ProjectedBackward(const ProjectedBackwardParams& p)
      : ProjectedBackward(p, p.dir[place_of(p, prim::block_index()).direction]) {}

  // After the last step one more matmul: what reaches the initial state.
  FASTRNN_DEVICE void run() {
    for (int s = 0; s < p_.T; s++) {
      state(s);
      exchange_.done(2 * s);
      gates(s);
    }
    state(p_.T);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i), projected = this->projected(i);
      if (projected.length) this->store(d_.dh0, projected, p_.P, dh_[i]);
      if (x.length) this->store(d_.dc0, x, p_.H, dc_[i]);
    }
    exchange_.finish();
  }

 private:
  FASTRNN_DEVICE ProjectedBackward(const ProjectedBackwardParams& p, const ProjectedBackwardDirection& d)
      : Base(p, !d.reverse, d.weights), d_(d) {
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      dh_[i] = this->load(d_.dh_n, this->projected(i), p_.P);
      dc_[i] = this->load(d_.dc_n, this->element(i), p_.H);
      fetch_dy(i, walk_.at(0));
      fetch(i, walk_.at(0));
    }
  }

  // What a step reads from HBM, fetched ahead.
  FASTRNN_DEVICE void fetch_dy(int i, int t) {
    const Element x = this->projected(i);
    if (t < x.length) dy_[i] = d_.dy.data ? D::load(row_at<const Elem>(d_.dy, t, x.n) + x.j) : 0.f;
  }
  FASTRNN_DEVICE void fetch(int i, int t) {
    const Element x = this->element(i);
    if (t >= x.length) return;
    FASTRNN_UNROLL
    for (int g = 0; g < 4; g++)
      saved_[i].gate[g] = D::load(row_at<const Elem>(d_.tape, t, x.n) + g * p_.H + x.j);
    const int before = walk_.backwards ? t - 1 : t + 1;
    saved_[i].c = prim::load_constant(row_at<const float>(d_.cells, t, x.n) + x.j);
    saved_[i].c_prev = reset_at(p_, t, x.n) ? 0.f
                       : before < 0 || before >= x.length
                           ? this->load(d_.c0, x, p_.H)
                           : prim::load_constant(row_at<const float>(d_.cells, before, x.n) + x.j);
    dcells_[i] = d_.dcells.data ? prim::load_constant(row_at<const float>(d_.dcells, t, x.n) + x.j) : 0.f;
  }

  FASTRNN_DEVICE void state(int s) {
    const int t = walk_.at(s), done = walk_.before(t), e = 2 * s;
    const int buffer = this->sum(
        this->w0_, e, done, d_.gradient_mail, nullptr, p_.H, 4 * p_.H_padded, e == 0 || this->idle(),
        [&](int x) { return gradient_after(p_, rows_.n[x], rows_.length[x], done); });
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->projected(i);
      if (x.length && done >= 0 && done < x.length)
        dh_[i] = reset_at(p_, done, x.n) ? 0.f : dh_[i] + sums_.get(buffer, x.unit, x.local);
      if (s == p_.T) continue;
      float dh = 0.f;
      if (t < x.length) {
        dh = dh_[i] + dy_[i];
        dh_[i] = 0.f;
      }
      publish<D>(p_, exchange_, d_.state_mail, e, t, x, 0, dh, this->published_width());
      if (x.length && (Exchange::kInShared || d_.dh.data != d_.state_mail.data))
        D::store(row_at<Elem>(d_.dh, t, x.n) + x.j, dh);
      if (s + 1 < p_.T) fetch_dy(i, walk_.at(s + 1));
    }
  }

  FASTRNN_DEVICE void gates(int s) {
    const int t = walk_.at(s), e = 2 * s + 1;
    const int buffer = this->sum(this->w1_, e, t, d_.state_mail, nullptr, p_.P, p_.P_padded, false,
                                 [&](int x) { return t < rows_.length[x] ? From::mail : From::zero; });
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      float g[4] = {}, middle = 0.f;
      if (t < x.length) {
        const Saved& v = saved_[i];
        const LstmGrad<float> r = lstm_backward<A>(v.gate[0], v.gate[1], v.gate[2], v.gate[3], v.c, v.c_prev,
                                                   sums_.get(buffer, x.unit, x.local), dc_[i] + dcells_[i]);
        g[0] = r.i;
        g[1] = r.f;
        g[2] = r.g;
        g[3] = r.o;
        middle = v.gate[3] * A::tanh(v.c);
        dc_[i] = reset_at(p_, t, x.n) ? 0.f : r.c_prev;
      }
      FASTRNN_UNROLL
      for (int v = 0; v < 4; v++) {
        publish<D>(p_, exchange_, d_.gradient_mail, e, t, x, v, g[v]);
        if (x.length && (Exchange::kInShared || d_.dgates.data != d_.gradient_mail.data))
          D::store(row_at<Elem>(d_.dgates, t, x.n) + v * p_.H + x.j, g[v]);
      }
      if (x.length && d_.middle.data) D::store(row_at<Elem>(d_.middle, t, x.n) + x.j, middle);
      if (s + 1 < p_.T) fetch(i, walk_.at(s + 1));
    }
    exchange_.done(e);
  }

  const ProjectedBackwardDirection& d_;
  float dh_[T::kPerThread], dc_[T::kPerThread], dy_[T::kPerThread], dcells_[T::kPerThread];
  Saved saved_[T::kPerThread];
};

template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
FASTRNN_KERNEL(T::kThreads)
projected_forward_kernel(const FASTRNN_GRID_CONSTANT ProjectedForwardParams p) {
  using Layer = ProjectedForward<D, T, ExchangeOf, kLinear>;
  if constexpr (Layer::kAvailable) {
    Layer layer(p);
    layer.run();
  } else {
    prim::unavailable();
  }
}
template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
FASTRNN_KERNEL(T::kThreads)
projected_backward_kernel(const FASTRNN_GRID_CONSTANT ProjectedBackwardParams p) {
  using Layer = ProjectedBackward<D, T, ExchangeOf, kLinear>;
  if constexpr (Layer::kAvailable) {
    Layer layer(p);
    layer.run();
  } else {
    prim::unavailable();
  }
}

}  // namespace fastrnn::cuda
