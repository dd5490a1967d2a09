// Batch-normalised LSTM forward, in one launch; batch.cuh has how the batch is walked, csrc/cells/bnlstm.h the arithmetic.
//
//   step:   passes over the rows: sums of the recurrent term  ->  its statistics  ->  gates and cell
//           ->  the cell's statistics  ->  publish h_t, store what backward needs  ->  fetch the next step's input term
#pragma once
#include "batch.cuh"

namespace fastrnn::cuda {

template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class BnLstmForward : public BnLstmBase<D, T, ExchangeOf, false, BnLstmForwardParams> {
  using Base = BnLstmBase<D, T, ExchangeOf, false, BnLstmForwardParams>;
  using typename Base::Elem;
  using typename Base::Exchange;
  using A = Activations<kLinear>;
  using Base::p_, Base::place_, Base::exchange_, Base::sums_, Base::kU, Base::get, Base::put;
  // Planes: the recurrent sums of four gates, the last one later the output gate itself; the input terms; c.
  static constexpr int kSums = 0, kOutputGate = 3, kInput = 4, kCell = 8;
  // The same in all steps.
  static constexpr int kGammaH = 0, kGammaC = 4, kBetaC = 5;

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
    if (this->speaks()) {
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) this->tell(0, kGammaH + g, this->of_unit(d.gamma_h, g));
      this->tell(0, kGammaC, this->of_unit(d.gamma_c));
      this->tell(0, kBetaC, this->of_unit(d.beta_c));
    }
    this->each([&](const Element& x) {
      if (x.length) put(kCell, x, this->load(d.c0, x));
    });
    fetch(0);
  }

  // From HBM, while the exchange is under way.
  FASTRNN_DEVICE void fetch(int s) {
    if (s >= p_.T) return;
    constexpr int kBlock = 4;
    float wx[kBlock][4];
    this->template each_block<kBlock>(
        [&](const Element& x, int i) {
          if (s >= x.length) return;
          const int t = this->time(s, x.length);
          FASTRNN_UNROLL
          for (int g = 0; g < 4; g++) {
            const int at = g * p_.H + x.j;
            wx[i][g] = p_.wx_is_float ? prim::load_constant(row_at<const float>(d_.wx, t, x.n) + at)
                                      : D::load(row_at<const Elem>(d_.wx, t, x.n) + at);
          }
        },
        [&](const Element& x, int i) {
          if (s >= x.length) return;
          FASTRNN_UNROLL
          for (int g = 0; g < 4; g++) put(kInput + g, x, wx[i][g]);
        });
  }

  // Mean and 1 / sqrt(var + eps) of the columns: of the batch, or given.
  template <int Gates>
  FASTRNN_DEVICE void normalise(int s, int plane, int term, int width) {
    const bool of_batch = this->measured(s);
    const float part = this->share(s);
    this->template columns<Gates>(
        s, plane, 0, [&](int at, bool stores, auto&& sum, float& mean, float& factor) {
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
    this->matmul(
        s, s - 1, d_.mail, d_.h0,
        [&](int n, int length) {
          if (s >= length || this->resets(s, n, length)) return From::zero;
          return s == 0 ? From::initial : From::mail;
        },
        [&](const Element& x, int buffer, int row) {
          if (s >= x.length) return;
          FASTRNN_UNROLL
          for (int g = 0; g < 4; g++) put(kSums + g, x, sums_.get(buffer, g * kU + x.unit, row));
        });
    normalise<4>(s, kSums, 0, 4 * p_.H);
    gates(s);
    normalise<1>(s, kCell, 1, p_.H);
    const float mean = this->first(0), factor = this->second(0);
    const float gamma_c = this->told(0, kGammaC), beta_c = this->told(0, kBetaC);
    this->each([&](const Element& x) {
      float out = 0.f, c = 0.f;
      if (s < x.length) {
        c = get(kCell, x);
        out = get(kOutputGate, x) * A::tanh(A::fma(gamma_c, (c - mean) * factor, beta_c));
      }
      finish(s, x, out, c);
    });
    exchange_.done(s);
    fetch(s + 1);
  }

  FASTRNN_DEVICE void gates(int s) {
    float mean[4], factor[4], gamma_h[4];
    FASTRNN_UNROLL
    for (int g = 0; g < 4; g++) {
      mean[g] = this->first(g);
      factor[g] = this->second(g);
      gamma_h[g] = this->told(0, kGammaH + g);
    }
    this->each([&](const Element& x) {
      if (s >= x.length) return;
      float gate[4], hat[4];
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) {
        hat[g] = (get(kSums + g, x) - mean[g]) * factor[g];
        const float z = batch_norm_gate<A>(hat[g], get(kInput + g, x), gamma_h[g], 1.f, 0.f);
        gate[g] = g == 2 ? A::tanh(z) : A::sigmoid(z);
      }
      const float before = this->resets(s, x.n, x.length) ? 0.f : get(kCell, x);
      put(kCell, x, lstm_cell<A>(gate[0], gate[1], gate[2], before));
      put(kOutputGate, x, gate[3]);
      if (!d_.tape.data) return;
      Elem* tape = row_at<Elem>(d_.tape, this->time(s, x.length), x.n) + x.j;
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) {
        D::store(tape + g * p_.H, gate[g]);
        D::store(tape + (4 + g) * p_.H, hat[g]);
      }
    });
  }

  // h and c of an element, 0 past a row's end.
  FASTRNN_DEVICE void finish(int s, const Element& x, float out, float c) {
    if (!Exchange::kInShared || s + 1 < p_.T) publish<D>(p_, exchange_, d_.mail, s, s, x, 0, out);
    if (!x.length) return;
    // A row past its end has its zeros at the times that are left.
    const int t = s < x.length ? this->time(s, x.length) : s;
    D::store(row_at<Elem>(d_.y, t, x.n) + x.j, out);
    if (d_.cells.data) prim::store(row_at<float>(d_.cells, t, x.n) + x.j, c);
    if (s != x.length - 1) return;
    const int64_t at = static_cast<int64_t>(x.n) * p_.H + x.j;
    if (d_.h_n) D::store(static_cast<Elem*>(d_.h_n) + at, out);
    if (d_.c_n) D::store(static_cast<Elem*>(d_.c_n) + at, c);
  }

  const BnLstmForwardDirection& d_;
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

}  // namespace fastrnn::cuda
