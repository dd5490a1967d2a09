// Batch-normalised LSTM, forward and backward, in one launch each: a CTA has all rows of the batch for its units, so
// statistics are its own business and CTAs exchange h alone, or in backward the gradient of the recurrent term.
// csrc/cells/bnlstm.h has the arithmetic.
#pragma once
#include "../../cells/bnlstm.h"
#include "activations.cuh"
#include "bnlstm.h"
#include "cells.cuh"
#include "columns.cuh"
#include "weights.cuh"

namespace fastrnn::cuda {

struct BnLstm : Shaped<CellKind::bnlstm> {};

template <class D, class T, template <class, class, int> class ExchangeOf, bool IsBackward, class Params>
class BnLstmBase {
 public:
  using Geo = GeometryOf<BnLstm, T, IsBackward>;
  static constexpr Geometry kGeometry = Geo::kGeometry;
  using Exchange = ExchangeOf<D, T, kGeometry.values()>;
  static constexpr SharedLayout kLayout = shared_layout(kGeometry, D::kFormat, Exchange::kBuffers);
  static constexpr int kSharedBytes = kLayout.bytes + column_bytes(T::kShape);
  static constexpr bool kAvailable =
      kSharedBytes <= prim::kMostShared && (prim::kHasClusters || !Exchange::kIsCluster);

 protected:
  using Elem = typename D::Elem;
  using M = Matmul<Geo, 0>;

  FASTRNN_DEVICE BnLstmBase(const Params& p, bool reverse, const Vec4* weights)
      : p_(p),
        place_(place_of(p, prim::block_index())),
        reverse_(reverse),
        rows_(p, place_),
        lane_(prim::thread_index() % 32),
        warp_(prim::thread_index() / 32),
        slice_((warp_ + place_.cta) % T::kWarps),
        exchange_(p, place_, kLayout.mail),
        sums_(kLayout.sums),
        columns_(kLayout.bytes) {
    weights_.load(weights + static_cast<int64_t>(place_.cta) * kGeometry.cta_vectors() +
                      warp_ * kGeometry.warp_vectors(),
                  kLayout.weights + warp_ * kGeometry.warp_shared_vectors() * 16, lane_);
    exchange_.start(p, kGeometry.values(), kGeometry.values());
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) length_[i] = length_of<T>(p_, place_, i);
  }

  FASTRNN_DEVICE Element element(int i) const { return element_of<T>(p_, place_, i, length_[i]); }
  FASTRNN_DEVICE int time(int s, int length) const { return reverse_ ? length - 1 - s : s; }
  FASTRNN_DEVICE bool resets(int s, int n, int length) const { return reset_at(p_, time(s, length), n); }
  FASTRNN_DEVICE bool measured(int s) const {
    return p_.batch && (p_.alive ? prim::load_constant(p_.alive + s) : p_.N) >= 2;
  }
  FASTRNN_DEVICE float share(int s) const {
    const bool counted = p_.alive && !mutated(Mutation::dead_rows_counted);
    return 1.f / static_cast<float>(counted ? prim::load_constant(p_.alive + s) : p_.N);
  }
  FASTRNN_DEVICE float load(const void* state, const Element& x) const {
    if (!state || !x.length) return 0.f;
    return D::load(static_cast<const Elem*>(state) + static_cast<int64_t>(x.n) * p_.H + x.j);
  }
  // Column of a term of `width`: its place in the tensors, or -1 for padding.
  FASTRNN_DEVICE int column_at(int column) const {
    const int j = place_.cta * T::kUnits + column % T::kUnits;
    return j < p_.H ? column / T::kUnits * p_.H + j : -1;
  }

  FASTRNN_DEVICE bool live(int s, int column, int row) const {
    return column_at(column) >= 0 && s < row_length(p_, row_of(p_, place_.group, row));
  }

  template <class FromOf>
  FASTRNN_DEVICE int sum(int e, int read, const Mail& mail, const void* initial, FromOf&& from) {
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
    sums_.put(e & 1, slice_, lane_, acc);
    prim::block_barrier("partial sums");
    return e & 1;
  }

  const Params& p_;
  const Place place_;
  const bool reverse_;
  const LaneRows<T> rows_;
  const int lane_, warp_, slice_;
  Exchange exchange_;
  const Sums<T, kGeometry.sum_rows()> sums_;
  const Columns<T> columns_;
  Weights<M> weights_;
  int length_[T::kPerThread];
};

template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class BnLstmForward : public BnLstmBase<D, T, ExchangeOf, false, BnLstmForwardParams> {
  using Base = BnLstmBase<D, T, ExchangeOf, false, BnLstmForwardParams>;
  using typename Base::Elem;
  using typename Base::Exchange;
  using A = Activations<kLinear>;
  using Base::p_, Base::place_, Base::rows_, Base::exchange_, Base::sums_, Base::columns_;

 public:
  FASTRNN_DEVICE BnLstmForward(const BnLstmForwardParams& p)
      : BnLstmForward(p, p.dir[place_of(p, prim::block_index()).direction]) {}

  FASTRNN_DEVICE void run() {
    for (int s = 0; s < p_.T; s++) step(s);
    exchange_.finish();
  }

 private:
  FASTRNN_DEVICE BnLstmForward(const BnLstmForwardParams& p, const BnLstmForwardDirection& d)
      : Base(p, d.reverse, d.weights), d_(d) {
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      cell_[i] = this->load(d_.c0, x);
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++)
        gamma_h_[i][g] = x.length ? prim::load_constant(d_.gamma_h + g * p_.H + x.j) : 0.f;
      gamma_c_[i] = x.length ? prim::load_constant(d_.gamma_c + x.j) : 0.f;
      beta_c_[i] = x.length ? prim::load_constant(d_.beta_c + x.j) : 0.f;
    }
  }

  // Mean and 1 / sqrt(var + eps) of `Count` columns: of the batch, or given.
  template <int Count>
  FASTRNN_DEVICE void normalise(int s, int term, int width) {
    const bool of_batch = this->measured(s);
    const float part = this->share(s);
    const auto live = [&](int column, int r) { return this->live(s, column, r); };
    columns_.template reduce<Count, false>(
        p_.N, live, [&](int column, bool stores, auto&& sum, float& mean, float& factor) {
          const int at = this->column_at(column);
          float var = 1.f;
          if (of_batch) {
            mean = part * sum([](float v, float) { return v; });
            // Two passes, because the squares of activations cancel.
            var = part * sum([&](float v, float) { return (v - mean) * (v - mean); });
          } else if (at >= 0) {
            const BnGiven& given = d_.given[term];
            const int row = s < given.rows ? s : given.rows - 1;
            mean = prim::load_constant(given.mean + static_cast<int64_t>(row) * width + at);
            var = prim::load_constant(given.var + static_cast<int64_t>(row) * width + at);
          }
          factor = prim::reciprocal_sqrt(var + p_.eps);
          if (!stores || at < 0 || !d_.used[term]) return;
          prim::store(d_.used[term] + static_cast<int64_t>(s) * width + at, mean);
          prim::store(d_.used[term] + static_cast<int64_t>(p_.T + s) * width + at, var);
        });
  }

  FASTRNN_DEVICE void step(int s) {
    constexpr int kU = T::kUnits;
    float gate[T::kPerThread][4], hat[T::kPerThread][4];
    // From HBM, while the exchange is under way.
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      if (s >= x.length) continue;
      const int t = this->time(s, x.length);
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) {
        const int at = g * p_.H + x.j;
        gate[i][g] = p_.wx_is_float ? prim::load_constant(row_at<const float>(d_.wx, t, x.n) + at)
                                    : D::load(row_at<const Elem>(d_.wx, t, x.n) + at);
      }
    }
    const int buffer = this->sum(s, s - 1, d_.mail, d_.h0, [&](int x) {
      const int n = rows_.n[x], length = rows_.length[x];
      if (s >= length || this->resets(s, n, length)) return From::zero;
      return s == 0 ? From::initial : From::mail;
    });
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      if (s >= x.length) continue;
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) {
        hat[i][g] = sums_.get(buffer, g * kU + x.unit, x.local);
        columns_.put(0, g * kU + x.unit, x.local, hat[i][g]);
      }
    }
    normalise<4 * kU>(s, 0, 4 * p_.H);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      if (s >= x.length) continue;
      if (this->resets(s, x.n, x.length)) cell_[i] = 0.f;
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) {
        const int column = g * kU + x.unit;
        hat[i][g] = (hat[i][g] - columns_.first(column)) * columns_.second(column);
        const float z = batch_norm_gate<A>(hat[i][g], gate[i][g], gamma_h_[i][g], 1.f, 0.f);
        gate[i][g] = g == 2 ? A::tanh(z) : A::sigmoid(z);
      }
      cell_[i] = lstm_cell<A>(gate[i][0], gate[i][1], gate[i][2], cell_[i]);
    }
    // The factors of the gates have been read by all before they are replaced: reduce begins with a barrier.
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      if (s < x.length) columns_.put(0, x.unit, x.local, cell_[i]);
    }
    normalise<kU>(s, 1, p_.H);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) finish(i, s, gate[i], hat[i]);
    exchange_.done(s);
  }

  FASTRNN_DEVICE void finish(int i, int s, const float (&gate)[4], const float (&hat)[4]) {
    const Element x = this->element(i);
    const bool live = s < x.length;
    float out = 0.f;
    if (live) {
      const float c_hat = (cell_[i] - columns_.first(x.unit)) * columns_.second(x.unit);
      out = gate[3] * A::tanh(A::fma(gamma_c_[i], c_hat, beta_c_[i]));
    }
    if (!Exchange::kInShared || s + 1 < p_.T) publish<D>(p_, exchange_, d_.mail, s, s, x, 0, out);
    if (!x.length) return;
    // A row past its end has its zeros at the times that are left.
    const int t = live ? this->time(s, x.length) : s;
    D::store(row_at<Elem>(d_.y, t, x.n) + x.j, out);
    if (d_.cells.data) prim::store(row_at<float>(d_.cells, t, x.n) + x.j, live ? cell_[i] : 0.f);
    if (!live) return;
    if (d_.tape.data) {
      Elem* tape = row_at<Elem>(d_.tape, t, x.n) + x.j;
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) {
        D::store(tape + g * p_.H, gate[g]);
        D::store(tape + (4 + g) * p_.H, hat[g]);
      }
    }
    if (s != x.length - 1) return;
    const int64_t at = static_cast<int64_t>(x.n) * p_.H + x.j;
    if (d_.h_n) D::store(static_cast<Elem*>(d_.h_n) + at, out);
    if (d_.c_n) D::store(static_cast<Elem*>(d_.c_n) + at, cell_[i]);
  }

  const BnLstmForwardDirection& d_;
  float cell_[T::kPerThread], gamma_h_[T::kPerThread][4], gamma_c_[T::kPerThread], beta_c_[T::kPerThread];
};

template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class BnLstmBackward : public BnLstmBase<D, T, ExchangeOf, true, BnLstmBackwardParams> {
  using Base = BnLstmBase<D, T, ExchangeOf, true, BnLstmBackwardParams>;
  using typename Base::Elem;
  using typename Base::Exchange;
  using A = Activations<kLinear>;
  using Base::p_, Base::place_, Base::rows_, Base::exchange_, Base::sums_, Base::columns_;

 public:
  FASTRNN_DEVICE BnLstmBackward(const BnLstmBackwardParams& p)
      : BnLstmBackward(p, p.dir[place_of(p, prim::block_index()).direction]) {}

  // After the first step one more matmul: what reaches the initial state.
  FASTRNN_DEVICE void run() {
    for (int s = p_.T - 1; s >= 0; s--) step(s);
    const int buffer = receive(-1);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      arrive(i, -1, buffer);
      const Element x = this->element(i);
      if (!x.length) continue;
      const int64_t at = static_cast<int64_t>(x.n) * p_.H + x.j;
      if (d_.dh0) D::store(static_cast<Elem*>(d_.dh0) + at, dh_[i]);
      if (d_.dc0) D::store(static_cast<Elem*>(d_.dc0) + at, dc_[i]);
    }
    exchange_.finish();
  }

 private:
  FASTRNN_DEVICE BnLstmBackward(const BnLstmBackwardParams& p, const BnLstmBackwardDirection& d)
      : Base(p, d.reverse, d.weights), d_(d) {
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      dh_[i] = this->load(d_.dh_n, x);
      dc_[i] = this->load(d_.dc_n, x);
    }
  }

  // The recurrent gradient of step s + 1.
  FASTRNN_DEVICE int receive(int s) {
    return this->sum(p_.T - 1 - s, s + 1, d_.mail, nullptr, [&](int x) {
      const int n = rows_.n[x], length = rows_.length[x];
      return s + 1 >= length || this->resets(s + 1, n, length) ? From::zero : From::mail;
    });
  }
  FASTRNN_DEVICE void arrive(int i, int s, int buffer) {
    const Element x = this->element(i);
    if (s + 1 >= x.length) return;
    if (this->resets(s + 1, x.n, x.length))
      dh_[i] = dc_[i] = 0.f;
    else
      dh_[i] += sums_.get(buffer, x.unit, x.local);
  }

  // The means of dy and of dy times the normalised value, by column; zero where the statistics are constants.
  template <int Count>
  FASTRNN_DEVICE void means(int s) {
    const bool of_batch = this->measured(s);
    const float part = this->share(s);
    const auto live = [&](int column, int r) { return this->live(s, column, r); };
    columns_.template reduce<Count, true>(
        p_.N, live, [&](int, bool, auto&& sum, float& mean, float& mean_hat) {
          if (!of_batch) return;
          mean = part * sum([](float dy, float) { return dy; });
          mean_hat = part * sum([](float dy, float hat) { return dy * hat; });
        });
  }
  FASTRNN_DEVICE float used(int term, int what, int s, int at) const {
    const int width = term ? p_.H : 4 * p_.H;
    return prim::load_constant(d_.used[term] + static_cast<int64_t>(what * p_.T + s) * width + at);
  }

  FASTRNN_DEVICE void step(int s) {
    const int buffer = receive(s), e = p_.T - 1 - s;
    constexpr int kU = T::kUnits;
    float dz[T::kPerThread][4] = {}, hat[T::kPerThread][4], dm[T::kPerThread] = {}, c_hat[T::kPerThread];
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      arrive(i, s, buffer);
      if (s >= x.length) continue;
      const int t = this->time(s, x.length);
      const float c = prim::load_constant(row_at<const float>(d_.cells, t, x.n) + x.j);
      const float o = D::load(row_at<const Elem>(d_.tape, t, x.n) + 3 * p_.H + x.j);
      const float dy = d_.dy.data ? D::load(row_at<const Elem>(d_.dy, t, x.n) + x.j) : 0.f;
      c_hat[i] = (c - used(1, 0, s, x.j)) * prim::reciprocal_sqrt(used(1, 1, s, x.j) + p_.eps);
      const float q = A::tanh(
          A::fma(prim::load_constant(d_.gamma_c + x.j), c_hat[i], prim::load_constant(d_.beta_c + x.j)));
      const BnOutputGrad<float> out = bnlstm_backward_output<A>(o, q, dh_[i] + dy);
      dz[i][3] = out.o;
      dm[i] = out.m;
      columns_.put(0, x.unit, x.local, dm[i]);
      columns_.put(1, x.unit, x.local, c_hat[i]);
    }
    means<kU>(s);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      if (s < x.length) cell(i, x, s, dz[i], hat[i], dm[i], c_hat[i]);
    }
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) {
      const Element x = this->element(i);
      if (s >= x.length) continue;
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) {
        columns_.put(0, g * kU + x.unit, x.local, dz[i][g]);
        columns_.put(1, g * kU + x.unit, x.local, hat[i][g]);
      }
    }
    means<4 * kU>(s);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) finish(i, s, e, dz[i], hat[i], dm[i]);
    exchange_.done(e);
  }

  FASTRNN_DEVICE void cell(int i, const Element& x, int s, float (&dz)[4], float (&hat)[4], float dm,
                           float c_hat) {
    const int t = this->time(s, x.length);
    const Elem* tape = row_at<const Elem>(d_.tape, t, x.n) + x.j;
    const float scale =
        prim::load_constant(d_.gamma_c + x.j) * prim::reciprocal_sqrt(used(1, 1, s, x.j) + p_.eps);
    float dc =
        dc_[i] + batch_norm_backward<A>(dm, c_hat, scale, columns_.first(x.unit), columns_.second(x.unit));
    if (d_.dcells.data) dc += prim::load_constant(row_at<const float>(d_.dcells, t, x.n) + x.j);
    float c_prev = 0.f;
    if (!this->resets(s, x.n, x.length))
      c_prev =
          s == 0 ? this->load(d_.c0, x)
                 : prim::load_constant(row_at<const float>(d_.cells, this->time(s - 1, x.length), x.n) + x.j);
    const BnCellGrad<float> r =
        bnlstm_backward_cell<A>(D::load(tape), D::load(tape + p_.H), D::load(tape + 2 * p_.H), c_prev, dc);
    dz[0] = r.i;
    dz[1] = r.f;
    dz[2] = r.g;
    dc_[i] = r.c_prev;
    dh_[i] = 0.f;
    FASTRNN_UNROLL
    for (int g = 0; g < 4; g++) hat[g] = D::load(tape + (4 + g) * p_.H);
  }

  FASTRNN_DEVICE void finish(int i, int s, int e, const float (&dz)[4], const float (&hat)[4], float dm) {
    const Element x = this->element(i);
    const bool live = s < x.length;
    const int t = live ? this->time(s, x.length) : s;
    FASTRNN_UNROLL
    for (int g = 0; g < 4; g++) {
      float da = 0.f;
      if (live) {
        const int column = g * T::kUnits + x.unit, at = g * p_.H + x.j;
        const float scale =
            prim::load_constant(d_.gamma_h + at) * prim::reciprocal_sqrt(used(0, 1, s, at) + p_.eps);
        da = batch_norm_backward<A>(dz[g], hat[g], scale, columns_.first(column), columns_.second(column));
      }
      publish<D>(p_, exchange_, d_.mail, e, s, x, g, da);
      if (!x.length) continue;
      D::store(row_at<Elem>(d_.dgates_h, t, x.n) + g * p_.H + x.j, da);
      D::store(row_at<Elem>(d_.dgates, t, x.n) + g * p_.H + x.j, live ? dz[g] : 0.f);
    }
    if (x.length) D::store(row_at<Elem>(d_.dm, t, x.n) + x.j, live ? dm : 0.f);
  }

  const BnLstmBackwardDirection& d_;
  float dh_[T::kPerThread], dc_[T::kPerThread];
};

template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
FASTRNN_KERNEL(T::kThreads)
bnlstm_forward_kernel(const FASTRNN_GRID_CONSTANT BnLstmForwardParams p) {
  using Layer = BnLstmForward<D, T, ExchangeOf, kLinear>;
  if constexpr (Layer::kAvailable) {
    Layer layer(p);
    layer.run();
  } else {
    prim::unavailable();
  }
}
template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
FASTRNN_KERNEL(T::kThreads)
bnlstm_backward_kernel(const FASTRNN_GRID_CONSTANT BnLstmBackwardParams p) {
  using Layer = BnLstmBackward<D, T, ExchangeOf, kLinear>;
  if constexpr (Layer::kAvailable) {
    Layer layer(p);
    layer.run();
  } else {
    prim::unavailable();
  }
}

}  // namespace fastrnn::cuda
