// Batch-normalised LSTM backward, in one launch, against the order of the forward steps; batch.cuh has how the batch is
// walked, csrc/cells/bnlstm.h the arithmetic.
//
//   step:   passes over the rows: dh from the gradient of the recurrent term  ->  output gate and normalised cell  ->  means
//           ->  cell and gates  ->  means  ->  publish the recurrent term's gradient  ->  fetch the step before
#pragma once
#include "batch.cuh"

namespace fastrnn::cuda {

template <class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false>
class BnLstmBackward : public BnLstmBase<D, T, ExchangeOf, true, BnLstmBackwardParams> {
  using Base = BnLstmBase<D, T, ExchangeOf, true, BnLstmBackwardParams>;
  using typename Base::Elem;
  using typename Base::Exchange;
  using A = Activations<kLinear>;
  using Base::p_, Base::place_, Base::exchange_, Base::sums_, Base::kU, Base::get, Base::put;
  // Planes: four gates, then the gradients of their pre-activations; the normalised terms; dh, then the normalised cell's
  // gradient; dc; c, then its normalised value; c of the step before.
  static constexpr int kGates = 0, kHats = 4, kDh = 8, kDc = 9, kCell = 10, kBefore = 11;
  // Of a step's columns: gamma / sqrt(var + eps) of the recurrent term, mean and 1 / sqrt(var + eps) of the cell.
  static constexpr int kScaleH = 0, kMeanC = 4, kFactorC = 5, kGammaC = 6, kBetaC = 7;

 public:
  FASTRNN_DEVICE BnLstmBackward(const BnLstmBackwardParams& p)
      : BnLstmBackward(p, p.dir[place_of(p, prim::block_index()).direction]) {}

  // After the first step one more matmul: what reaches the initial state.
  FASTRNN_DEVICE void run() {
    for (int s = p_.T - 1; s >= 0; s--) step(s);
    receive(-1);
    this->each([&](const Element& x) {
      if (!x.length) return;
      const int64_t at = static_cast<int64_t>(x.n) * p_.H + x.j;
      if (d_.dh0) D::store(static_cast<Elem*>(d_.dh0) + at, get(kDh, x));
      if (d_.dc0) D::store(static_cast<Elem*>(d_.dc0) + at, get(kDc, x));
    });
    exchange_.finish();
  }

 private:
  FASTRNN_DEVICE BnLstmBackward(const BnLstmBackwardParams& p, const BnLstmBackwardDirection& d)
      : Base(p, d.reverse, d.weights), d_(d) {
    this->each([&](const Element& x) {
      if (!x.length) return;
      put(kDh, x, this->load(d.dh_n, x));
      put(kDc, x, this->load(d.dc_n, x));
    });
    fetch(p.T - 1);
  }

  FASTRNN_DEVICE float used(int term, int what, int s, int gate) const {
    const int width = term ? p_.H : 4 * p_.H;
    return this->of_unit(d_.used[term] + static_cast<int64_t>(what * p_.T + s) * width, gate);
  }

  // What a step reads from HBM, while the exchange is under way; gradients from outside are added to the carried ones.
  FASTRNN_DEVICE void fetch(int s) {
    if (s < 0) return;
    if (this->speaks()) {
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++)
        this->tell(s, kScaleH + g,
                   this->of_unit(d_.gamma_h, g) * prim::reciprocal_sqrt(used(0, 1, s, g) + p_.eps));
      this->tell(s, kMeanC, used(1, 0, s, 0));
      this->tell(s, kFactorC, prim::reciprocal_sqrt(used(1, 1, s, 0) + p_.eps));
      this->tell(s, kGammaC, this->of_unit(d_.gamma_c));
      this->tell(s, kBetaC, this->of_unit(d_.beta_c));
    }
    constexpr int kBlock = 2;
    float tape[kBlock][8], dy[kBlock], dcells[kBlock], before[kBlock], c[kBlock];
    this->template each_block<kBlock>(
        [&](const Element& x, int i) {
          if (s >= x.length) return;
          const int t = this->time(s, x.length);
          const auto cell = [&](int time) {
            return prim::load_constant(row_at<const float>(d_.cells, time, x.n) + x.j);
          };
          FASTRNN_UNROLL
          for (int k = 0; k < 8; k++)
            tape[i][k] = D::load(row_at<const Elem>(d_.tape, t, x.n) + k * p_.H + x.j);
          dy[i] = d_.dy.data ? D::load(row_at<const Elem>(d_.dy, t, x.n) + x.j) : 0.f;
          dcells[i] =
              d_.dcells.data ? prim::load_constant(row_at<const float>(d_.dcells, t, x.n) + x.j) : 0.f;
          before[i] = s == 0 ? this->load(d_.c0, x) : cell(this->time(s - 1, x.length));
          c[i] = s == x.length - 1 ? cell(t) : get(kBefore, x);
        },
        [&](const Element& x, int i) {
          if (s >= x.length) return;
          FASTRNN_UNROLL
          for (int k = 0; k < 8; k++) put(kGates + k, x, tape[i][k]);
          put(kDh, x, get(kDh, x) + dy[i]);
          put(kDc, x, get(kDc, x) + dcells[i]);
          put(kCell, x, c[i]);
          put(kBefore, x, before[i]);
        });
  }

  // The recurrent gradient of step s + 1. Where that step reset its state, nothing of it goes further.
  FASTRNN_DEVICE void receive(int s) {
    this->matmul(
        p_.T - 1 - s, s + 1, d_.mail, nullptr,
        [&](int n, int length) {
          return s + 1 >= length || this->resets(s + 1, n, length) ? From::zero : From::mail;
        },
        [&](const Element& x, int buffer, int row) {
          if (s + 1 >= x.length || this->resets(s + 1, x.n, x.length)) return;
          put(kDh, x, get(kDh, x) + sums_.get(buffer, x.unit, row));
        });
  }

  // The means of dy and of dy times the normalised value, by column; zero where the statistics are constants.
  template <int Gates>
  FASTRNN_DEVICE void means(int s, int plane, int beside) {
    const bool of_batch = this->measured(s);
    const float part = this->share(s);
    this->template columns<Gates>(s, plane, beside, [&](int, bool, auto&& sum, float& mean, float& mean_hat) {
      if (!of_batch) return;
      mean = part * sum([](float dy, float) { return dy; });
      mean_hat = part * sum([](float dy, float hat) { return dy * hat; });
    });
  }

  FASTRNN_DEVICE void step(int s) {
    receive(s);
    const int e = p_.T - 1 - s;
    const float mean_c = this->told(s, kMeanC), factor_c = this->told(s, kFactorC),
                gamma_c = this->told(s, kGammaC), beta_c = this->told(s, kBetaC);
    this->each([&](const Element& x) {
      if (s >= x.length) return;
      const float c_hat = (get(kCell, x) - mean_c) * factor_c;
      const float q = A::tanh(A::fma(gamma_c, c_hat, beta_c));
      const BnOutputGrad<float> out = bnlstm_backward_output<A>(get(kGates + 3, x), q, get(kDh, x));
      put(kGates + 3, x, out.o);
      put(kDh, x, out.m);
      put(kCell, x, c_hat);
    });
    means<1>(s, kDh, kCell - kDh);
    const float mean = this->first(0), mean_hat = this->second(0);
    this->each([&](const Element& x) {
      if (s < x.length) cell(s, x, gamma_c * factor_c, mean, mean_hat);
    });
    means<4>(s, kGates, kHats - kGates);
    finish(s, e);
    exchange_.done(e);
    fetch(s - 1);
  }

  FASTRNN_DEVICE void cell(int s, const Element& x, float scale, float mean, float mean_hat) {
    const float dc = get(kDc, x) + batch_norm_backward<A>(get(kDh, x), get(kCell, x), scale, mean, mean_hat);
    const bool cleared = this->resets(s, x.n, x.length);
    const BnCellGrad<float> r = bnlstm_backward_cell<A>(
        get(kGates, x), get(kGates + 1, x), get(kGates + 2, x), cleared ? 0.f : get(kBefore, x), dc);
    put(kGates, x, r.i);
    put(kGates + 1, x, r.f);
    put(kGates + 2, x, r.g);
    put(kDc, x, cleared ? 0.f : r.c_prev);
  }

  FASTRNN_DEVICE void finish(int s, int e) {
    float mean[4], mean_hat[4], scale[4];
    FASTRNN_UNROLL
    for (int g = 0; g < 4; g++) {
      mean[g] = this->first(g);
      mean_hat[g] = this->second(g);
      scale[g] = this->told(s, kScaleH + g);
    }
    this->each([&](const Element& x) {
      const bool live = s < x.length;
      const int t = live ? this->time(s, x.length) : s;
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) {
        float dz = 0.f, da = 0.f;
        if (live) {
          dz = get(kGates + g, x);
          da = batch_norm_backward<A>(dz, get(kHats + g, x), scale[g], mean[g], mean_hat[g]);
        }
        publish<D>(p_, exchange_, d_.mail, e, s, x, g, da);
        if (!x.length) continue;
        D::store(row_at<Elem>(d_.dgates_h, t, x.n) + g * p_.H + x.j, da);
        D::store(row_at<Elem>(d_.dgates, t, x.n) + g * p_.H + x.j, dz);
      }
      if (!x.length) return;
      D::store(row_at<Elem>(d_.dm, t, x.n) + x.j, live ? get(kDh, x) : 0.f);
      if (live) put(kDh, x, 0.f);
    });
  }

  const BnLstmBackwardDirection& d_;
};

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
