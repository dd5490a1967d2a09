// Layer-normalised LSTM and GRU, forward and backward, in one launch each: a step waits for its exchange of h as the plain
// layers do, and once more for each norm inside it, whose statistics are sums along rows that lie in many CTAs
// (row_pairs.cuh): that of the recurrent term, over all its gates, and in LSTM that of the cell. csrc/cells has the
// arithmetic.
#pragma once
#include "../../cells/layernorm.h"
#include "cells.cuh"
#include "layer.cuh"
#include "layernorm.h"
#include "row_pairs.cuh"

namespace fastrnn::cuda {

struct LayerNormLstm : Shaped<CellKind::lstm_layer_norm> {
  static constexpr bool kHasCell = true;
};
struct LayerNormGru : Shaped<CellKind::gru_layer_norm> {
  static constexpr bool kHasCell = false;
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool IsBackward,
          class Params>
class LayerNormBase : public LayerBase<GeometryOf<Cell, T, IsBackward>, D, T, ExchangeOf, Params> {
  using Geo = GeometryOf<Cell, T, IsBackward>;
  using Base = LayerBase<Geo, D, T, ExchangeOf, Params>;

 public:
  using Base::kLayout;
  using typename Base::Exchange;
  static constexpr int kSharedBytes = kLayout.bytes + pair_bytes(T::kShape);
  static constexpr bool kAvailable =
      kSharedBytes <= prim::kMostShared && (prim::kHasClusters || !Exchange::kIsCluster);

 protected:
  using Base::p_, Base::place_;
  using M = Matmul<Geo, 0>;
  static constexpr int kG = Cell::kGates;
  using Pairs = RowPairs<T, Exchange::kInShared && !Exchange::kIsCluster, T::kWarps * T::kChunks * D::kChunk>;

  FASTRNN_DEVICE LayerNormBase(const Params& p, bool backwards, const Vec4* weights)
      : Base(p, backwards), pairs_(p, place_, kLayout.bytes) {
    this->template load<0>(weights_, weights);
    this->exchange_.start(p, IsBackward ? kG : 1, IsBackward ? kG : 1);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      row_length_[i] = pairs_.exists(x) ? row_length(p_, x.n) : 0;
    }
  }
  FASTRNN_DEVICE static float constant(const float* data, const Element& x, int at) {
    return data && x.length ? prim::load_constant(data + at) : 0.f;
  }

  Pairs pairs_;
  Weights<M> weights_;
  int row_length_
      [T::kPerThread];  // steps of the row, where a unit of the segment exists: its lanes sum together
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class LayerNormForward : public LayerNormBase<Cell, D, T, ExchangeOf, false, LayerNormForwardParams> {
  using Base = LayerNormBase<Cell, D, T, ExchangeOf, false, LayerNormForwardParams>;
  using typename Base::Elem;
  using typename Base::Pairs;
  using A = Activations<kLinear>;
  using Base::p_, Base::place_, Base::walk_, Base::rows_, Base::exchange_, Base::sums_, Base::kG,
      Base::pairs_, Base::row_length_;

 public:
  using typename Base::Exchange;
  FASTRNN_DEVICE LayerNormForward(const LayerNormForwardParams& p)
      : LayerNormForward(p, p.dir[place_of(p, prim::block_index()).direction]) {}

  FASTRNN_DEVICE void run() {
    for (int s = 0; s < p_.T; s++) step(s);
    exchange_.finish();
  }

 private:
  struct Moments {
    float mean, factor;
    FASTRNN_DEVICE float hat(float v) const { return (v - mean) * factor; }
  };

  FASTRNN_DEVICE LayerNormForward(const LayerNormForwardParams& p, const LayerNormForwardDirection& d)
      : Base(p, d.reverse, d.weights), d_(d) {
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      state_[i] = this->load(Cell::kHasCell ? d_.c0 : d_.h0, x, p_.H);
      FASTRNN_UNROLL
      for (int g = 0; g < kG; g++) gain_h_[i][g] = this->constant(d_.gain_h, x, g * p_.H + x.j);
      extra_[i][0] = this->constant(Cell::kHasCell ? d_.gain_c : d_.bias_n, x, x.j);
      extra_[i][1] = Cell::kHasCell ? this->constant(d_.bias_c, x, x.j) : 0.f;
      fetch(i, x, walk_.at(0));
    }
  }

  FASTRNN_DEVICE void fetch(int i, const Element& x, int t) {
    if (t >= x.length) return;
    FASTRNN_UNROLL
    for (int g = 0; g < kG; g++) {
      const int at = g * p_.H + x.j;
      wx_[i][g] = p_.wx_is_float ? prim::load_constant(row_at<const float>(d_.wx, t, x.n) + at)
                                 : D::load(row_at<const Elem>(d_.wx, t, x.n) + at);
    }
  }

  template <int Values>
  FASTRNN_DEVICE void publish_moments(int plane, int i, int t, const float (&v)[Values]) {
    const Element x = this->element(i);
    float mean, squares;
    segment_moments(v, t < x.length, pairs_.count(pairs_.segment_of(x)), mean, squares);
    if (t < row_length_[i] && x.unit % kSegment == 0)
      pairs_.publish(plane, d_.pairs[plane], t, x, mean, squares);
  }
  template <int Values>
  FASTRNN_DEVICE Moments moments(int plane, int i, int t) {
    const typename Pairs::Part part =
        pairs_.read(plane, d_.pairs[plane], t, this->element(i), t < row_length_[i]);
    const float share = 1.f / static_cast<float>(Values * p_.H);
    const float mean =
        share * pairs_.sum(part, [](float m, float, float units) { return Values * units * m; });
    const float var = share * pairs_.sum(part, [&](float m, float squares, float units) {
      return prim::fma(Values * units * (m - mean), m - mean, squares);
    });
    return {mean, prim::reciprocal_sqrt(var + p_.eps)};
  }
  FASTRNN_DEVICE void keep_statistic(const Element& x, int t, int which, float v) const {
    if (d_.statistics.data && x.j == 0) prim::store(row_at<float>(d_.statistics, t, x.n) + which, v);
  }

  FASTRNN_DEVICE void step(int s) {
    const int t = walk_.at(s);
    const int buffer =
        this->sum(this->weights_, s, walk_.before(t), d_.mail, d_.h0, p_.H, p_.H_padded, false,
                  [&](int x) { return state_before(p_, walk_, rows_.n[x], rows_.length[x], t); });
    float hat[T::kPerThread][kG], gate[T::kPerThread][kG] = {};
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      FASTRNN_UNROLL
      for (int g = 0; g < kG; g++)
        hat[i][g] = t < x.length ? sums_.get(buffer, g * T::kUnits + x.unit, x.local) : 0.f;
      publish_moments(0, i, t, hat[i]);
    }
    pairs_.published();
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      const Moments of_h = moments<kG>(0, i, t);
      if (t < x.length) {
        if (reset_at(p_, t, x.n)) state_[i] = 0.f;
        FASTRNN_UNROLL
        for (int g = 0; g < kG; g++) hat[i][g] = of_h.hat(hat[i][g]);
        keep_statistic(x, t, 0, of_h.factor);
        gates(i, hat[i], gate[i]);
      }
      if constexpr (Cell::kHasCell) publish_moments(1, i, t, {state_[i]});
    }
    if constexpr (Cell::kHasCell) pairs_.published();
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      float out = state_[i];
      if constexpr (Cell::kHasCell) {
        const Moments of_c = moments<1>(1, i, t);
        out = gate[i][kG - 1] * A::tanh(layer_norm_term<A>(of_c.hat(state_[i]), extra_[i][0], extra_[i][1]));
        if (t < x.length) {
          keep_statistic(x, t, 1, of_c.mean);
          keep_statistic(x, t, 2, of_c.factor);
        }
      }
      finish(i, x, s, t, out, gate[i], hat[i]);
    }
    exchange_.done(s);
  }

  FASTRNN_DEVICE void gates(int i, const float (&hat)[kG], float (&gate)[kG]) {
    FASTRNN_UNROLL
    for (int g = 0; g < kG; g++) {
      const float z = layer_norm_term<A>(hat[g], gain_h_[i][g], wx_[i][g]);
      if (Cell::kHasCell || g < 2) gate[g] = Cell::kHasCell && g == 2 ? A::tanh(z) : A::sigmoid(z);
    }
    if constexpr (Cell::kHasCell) {
      state_[i] = lstm_cell<A>(gate[0], gate[1], gate[2], state_[i]);
    } else {
      const float un = layer_norm_term<A>(hat[2], gain_h_[i][2], extra_[i][0]);
      gate[2] = A::tanh(gru_candidate<A>(gate[0], un, wx_[i][2]));
      state_[i] = gru_output<A>(gate[1], gate[2], state_[i]);
    }
  }

  FASTRNN_DEVICE void finish(int i, const Element& x, int s, int t, float out, const float (&gate)[kG],
                             const float (&hat)[kG]) {
    const bool live = t < x.length, last = s + 1 == p_.T;
    if (!live) out = 0.f;
    if (!Exchange::kInShared || !last) publish<D>(p_, exchange_, d_.mail, s, t, x, 0, out);
    if (x.length) {
      if (Exchange::kInShared || d_.y.data != d_.mail.data) D::store(row_at<Elem>(d_.y, t, x.n) + x.j, out);
      if (Cell::kHasCell && d_.cells.data)
        prim::store(row_at<float>(d_.cells, t, x.n) + x.j, live ? state_[i] : 0.f);
    }
    if (live && d_.tape.data) {
      Elem* tape = row_at<Elem>(d_.tape, t, x.n) + x.j;
      FASTRNN_UNROLL
      for (int g = 0; g < kG; g++) {
        D::store(tape + g * p_.H, gate[g]);
        D::store(tape + (kG + g) * p_.H, hat[g]);
      }
    }
    if (x.length && t == (walk_.backwards ? 0 : x.length - 1)) {
      this->store(d_.h_n, x, p_.H, out);
      if (Cell::kHasCell) this->store(d_.c_n, x, p_.H, state_[i]);
    }
    if (!last) fetch(i, x, walk_.at(s + 1));
  }

  const LayerNormForwardDirection& d_;
  // The carried state: LSTM's cell, GRU's h. extra_: gain and bias of the cell's norm, or b_hn.
  float state_[T::kPerThread], extra_[T::kPerThread][2];
  float wx_[T::kPerThread][kG], gain_h_[T::kPerThread][kG];
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class LayerNormBackward : public LayerNormBase<Cell, D, T, ExchangeOf, true, LayerNormBackwardParams> {
  using Base = LayerNormBase<Cell, D, T, ExchangeOf, true, LayerNormBackwardParams>;
  using typename Base::Elem;
  using typename Base::Pairs;
  using A = Activations<kLinear>;
  using Base::p_, Base::place_, Base::walk_, Base::rows_, Base::exchange_, Base::sums_, Base::kG,
      Base::pairs_, Base::row_length_;

 public:
  using typename Base::Exchange;
  FASTRNN_DEVICE LayerNormBackward(const LayerNormBackwardParams& p)
      : LayerNormBackward(p, p.dir[place_of(p, prim::block_index()).direction]) {}

  // After the last step one more matmul: what reaches the initial state.
  FASTRNN_DEVICE void run() {
    for (int s = 0; s < p_.T; s++) step(s);
    const int buffer = receive(p_.T);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      arrive(i, x, walk_.before(walk_.at(p_.T)), buffer);
      if (!x.length) continue;
      this->store(d_.dh0, x, p_.H, dh_[i]);
      if (Cell::kHasCell) this->store(d_.dc0, x, p_.H, dc_[i]);
    }
    exchange_.finish();
  }

 private:
  // What backward reads of a step.
  struct Tape {
    float gate[kG], hat[kG], factor_h, before;  // before: c_{t-1} or h_{t-1}
    float c_hat, factor_c, dcells, dy;
  };
  struct Means {
    float v, v_hat;
  };

  FASTRNN_DEVICE LayerNormBackward(const LayerNormBackwardParams& p, const LayerNormBackwardDirection& d)
      : Base(p, !d.reverse, d.weights), d_(d) {
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      dh_[i] = this->load(d_.dh_n, x, p_.H);
      dc_[i] = Cell::kHasCell ? this->load(d_.dc_n, x, p_.H) : 0.f;
      fetch(i, x, walk_.at(0));
    }
  }

  // Fetched a step ahead: it comes from HBM.
  FASTRNN_DEVICE void fetch(int i, const Element& x, int t) {
    if (t >= x.length) return;
    Tape& v = tape_[i];
    const Elem* tape = row_at<const Elem>(d_.tape, t, x.n) + x.j;
    FASTRNN_UNROLL
    for (int g = 0; g < kG; g++) {
      v.gate[g] = D::load(tape + g * p_.H);
      v.hat[g] = D::load(tape + (kG + g) * p_.H);
    }
    const float* statistics = row_at<const float>(d_.statistics, t, x.n);
    v.factor_h = prim::load_constant(statistics);
    v.dy = d_.dy.data ? D::load(row_at<const Elem>(d_.dy, t, x.n) + x.j) : 0.f;
    const int before = walk_.backwards ? t - 1 : t + 1;
    const bool first = before < 0 || before >= x.length, cleared = reset_at(p_, t, x.n);
    if constexpr (Cell::kHasCell) {
      v.factor_c = prim::load_constant(statistics + 2);
      v.c_hat = (prim::load_constant(row_at<const float>(d_.cells, t, x.n) + x.j) -
                 prim::load_constant(statistics + 1)) *
                v.factor_c;
      v.dcells = d_.dcells.data ? prim::load_constant(row_at<const float>(d_.dcells, t, x.n) + x.j) : 0.f;
      v.before = cleared ? 0.f
                 : first ? this->load(d_.c0, x, p_.H)
                         : prim::load_constant(row_at<const float>(d_.cells, before, x.n) + x.j);
    } else {
      v.before = cleared ? 0.f
                 : first ? this->load(d_.h0, x, p_.H)
                         : D::load(row_at<const Elem>(d_.y, before, x.n) + x.j);
    }
  }

  FASTRNN_DEVICE int receive(int s) {
    const int done = walk_.before(walk_.at(s));
    return this->sum(this->weights_, s, done, d_.mail, nullptr, p_.H, kG * p_.H_padded, s == 0,
                     [&](int x) { return gradient_after(p_, rows_.n[x], rows_.length[x], done); });
  }
  FASTRNN_DEVICE void arrive(int i, const Element& x, int done, int buffer) {
    if (x.length && done >= 0 && done < x.length)
      dh_[i] = reset_at(p_, done, x.n) ? 0.f : dh_[i] + sums_.get(buffer, x.unit, x.local);
  }

  // The row's sums of v and of v times the normalised value, by segments and as means.
  FASTRNN_DEVICE void publish_sums(int plane, int i, int t, float v, float v_hat) {
    const Element x = this->element(i);
    v = segment_sum(v);
    v_hat = segment_sum(v_hat);
    if (t < row_length_[i] && x.unit % kSegment == 0) pairs_.publish(plane, d_.pairs[plane], t, x, v, v_hat);
  }
  FASTRNN_DEVICE Means means(int plane, int i, int t, int values) {
    const typename Pairs::Part part =
        pairs_.read(plane, d_.pairs[plane], t, this->element(i), t < row_length_[i]);
    const float share = 1.f / static_cast<float>(values);
    return {share * pairs_.sum(part, [](float v, float, float) { return v; }),
            share * pairs_.sum(part, [](float, float v_hat, float) { return v_hat; })};
  }

  FASTRNN_DEVICE void step(int s) {
    const int t = walk_.at(s), buffer = receive(s);
    // dz: of the pre-activations, GRU's n on the input side; dn_h: n on the recurrent side.
    float dz[T::kPerThread][kG] = {}, dn_h[T::kPerThread] = {}, dm[T::kPerThread] = {};
    if constexpr (Cell::kHasCell) {
      FASTRNN_UNROLL
      for (int i = 0; i < T::kPerThread; i++) {
        const Element x = this->element(i);
        const Tape& v = tape_[i];
        arrive(i, x, walk_.before(t), buffer);
        float gained = 0.f, gained_hat = 0.f;
        if (t < x.length) {
          const float gain = prim::load_constant(d_.gain_c + x.j);
          const float q = A::tanh(layer_norm_term<A>(v.c_hat, gain, prim::load_constant(d_.bias_c + x.j)));
          const BnOutputGrad<float> out = bnlstm_backward_output<A>(v.gate[kG - 1], q, dh_[i] + v.dy);
          dz[i][kG - 1] = out.o;
          dm[i] = out.m;
          gained = out.m * gain;
          gained_hat = gained * v.c_hat;
        }
        publish_sums(1, i, t, gained, gained_hat);
      }
      pairs_.published();
    }
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      if constexpr (Cell::kHasCell) {
        const Means of_c = means(1, i, t, p_.H);
        if (t < x.length) cell(i, x, t, of_c, dm[i], dz[i]);
      } else {
        arrive(i, x, walk_.before(t), buffer);
        if (t < x.length) candidate(i, x, dz[i], dn_h[i]);
      }
      float gained = 0.f, gained_hat = 0.f;
      FASTRNN_UNROLL
      for (int g = 0; g < kG; g++) {
        const float v = t < x.length ? term(x, g, dz[i], dn_h[i]) : 0.f;
        gained += v;
        if (t < x.length) gained_hat = A::fma(v, tape_[i].hat[g], gained_hat);
      }
      publish_sums(0, i, t, gained, gained_hat);
    }
    pairs_.published();
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      const Means of_h = means(0, i, t, kG * p_.H);
      finish(i, x, s, t, of_h, dz[i], dn_h[i], dm[i]);
    }
    exchange_.done(s);
  }

  // The gradient of a gate's recurrent term, normalised.
  FASTRNN_DEVICE float term(const Element& x, int g, const float (&dz)[kG], float dn_h) const {
    return prim::load_constant(d_.gain_h + g * p_.H + x.j) * (!Cell::kHasCell && g == 2 ? dn_h : dz[g]);
  }

  FASTRNN_DEVICE void cell(int i, const Element& x, int t, const Means& of_c, float dm, float (&dz)[kG]) {
    const Tape& v = tape_[i];
    const float dc = dc_[i] + v.dcells +
                     batch_norm_backward<A>(dm * prim::load_constant(d_.gain_c + x.j), v.c_hat, v.factor_c,
                                            of_c.v, of_c.v_hat);
    const BnCellGrad<float> r = bnlstm_backward_cell<A>(v.gate[0], v.gate[1], v.gate[2], v.before, dc);
    dz[0] = r.i;
    dz[1] = r.f;
    dz[2] = r.g;
    dc_[i] = reset_at(p_, t, x.n) ? 0.f : r.c_prev;
    dh_[i] = 0.f;
  }
  FASTRNN_DEVICE void candidate(int i, const Element& x, float (&dz)[kG], float& dn_h) {
    const Tape& v = tape_[i];
    const float un = layer_norm_term<A>(v.hat[2], prim::load_constant(d_.gain_h + 2 * p_.H + x.j),
                                        this->constant(d_.bias_n, x, x.j));
    const GruGrad<float> r = gru_backward<A>(v.gate[0], v.gate[1], v.gate[2], un, v.before, dh_[i] + v.dy);
    dz[0] = r.r;
    dz[1] = r.z;
    dz[2] = r.n;
    dn_h = r.un;
    dh_[i] = r.h_prev;
  }

  FASTRNN_DEVICE void finish(int i, const Element& x, int s, int t, const Means& of_h, const float (&dz)[kG],
                             float dn_h, float dm) {
    const bool live = t < x.length;
    FASTRNN_UNROLL
    for (int g = 0; g < kG; g++) {
      const float da = live ? batch_norm_backward<A>(term(x, g, dz, dn_h), tape_[i].hat[g], tape_[i].factor_h,
                                                     of_h.v, of_h.v_hat)
                            : 0.f;
      publish<D>(p_, exchange_, d_.mail, s, t, x, g, da);
      if (!x.length) continue;
      if (Exchange::kInShared || d_.dgates_h.data != d_.mail.data)
        D::store(row_at<Elem>(d_.dgates_h, t, x.n) + g * p_.H + x.j, da);
      D::store(row_at<Elem>(d_.dgates, t, x.n) + g * p_.H + x.j, dz[g]);
    }
    if (Cell::kHasCell && x.length) D::store(row_at<Elem>(d_.dm, t, x.n) + x.j, dm);
    if (s + 1 < p_.T) fetch(i, x, walk_.at(s + 1));
  }

  const LayerNormBackwardDirection& d_;
  float dh_[T::kPerThread], dc_[T::kPerThread];
  Tape tape_[T::kPerThread];
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
FASTRNN_KERNEL(T::kThreads)
layer_norm_forward_kernel(const FASTRNN_GRID_CONSTANT LayerNormForwardParams p) {
  using Layer = LayerNormForward<Cell, D, T, ExchangeOf, kLinear>;
  if constexpr (Layer::kAvailable) {
    Layer layer(p);
    layer.run();
  } else {
    prim::unavailable();
  }
}
template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
FASTRNN_KERNEL(T::kThreads)
layer_norm_backward_kernel(const FASTRNN_GRID_CONSTANT LayerNormBackwardParams p) {
  using Layer = LayerNormBackward<Cell, D, T, ExchangeOf, kLinear>;
  if constexpr (Layer::kAvailable) {
    Layer layer(p);
    layer.run();
  } else {
    prim::unavailable();
  }
}

}  // namespace fastrnn::cuda
