// The pointwise part of a layer-normalised step: a CTA has a row of the batch, so the row's statistics are sums inside it.
//
// A thread has the same units in every pass and keeps what it made of them where the sums were: it alone reads them again.
#pragma once
#include "../../cells/layernorm.h"
#include "../prim/shared.cuh"
#include "units.cuh"

namespace fastrnn::cuda {

// Sums over a CTA, the same in every thread, in an order that does not depend on the schedule. Each has its own place, so that
// one barrier orders it.
template <int Threads>
class RowSums {
  static constexpr int kWarps = Threads / 32;

 public:
  static constexpr int kMost = 6, kBytes = kMost * kWarps * 4;
  FASTRNN_DEVICE RowSums() : parts_(prim::shared_view<float>(0, kMost * kWarps)) {}
  FASTRNN_DEVICE float operator()(int place, float v) const {
    FASTRNN_UNROLL
    for (int m = 16; m > 0; m /= 2) v += prim::bits_float(prim::shuffle_xor(prim::float_bits(v), m));
    const int thread = prim::thread_index();
    if (thread % 32 == 0) parts_.store(place * kWarps + thread / 32, v);
    if (!mutated(Mutation::statistics_barrier)) prim::block_barrier("row sums");
    float sum = 0.f;
    FASTRNN_UNROLL
    for (int w = 0; w < kWarps; w++) sum += parts_.load(place * kWarps + w);
    return sum;
  }

 private:
  const prim::Shared<float> parts_;
};

struct RowMoments {
  float mean, factor;
  FASTRNN_DEVICE float hat(float v) const { return (v - mean) * factor; }
};
// In two passes: sum(f) adds f of each element over the row.
template <class Sum>
FASTRNN_DEVICE RowMoments row_moments(int count, const Sum& sum) {
  RowMoments m;
  m.mean = sum(0, [](float v) { return v; }) / static_cast<float>(count);
  const float mean = m.mean;
  const float squares = sum(1, [mean](float v) { return (v - mean) * (v - mean); });
  m.factor = prim::reciprocal_sqrt(squares / static_cast<float>(count) + static_cast<float>(kLayerNormEps));
  return m;
}

template <class F, int Threads>
FASTRNN_DEVICE void each_unit(int H, std::integral_constant<int, Threads>, const F& f) {
  for (int j = prim::thread_index(); j < H; j += Threads) f(j);
}

template <class Cell, class D, int Threads, bool kLinear = false>
class ForwardRow {
  using A = Activations<kLinear>;
  static constexpr int G = Cell::kGates;
  static constexpr std::integral_constant<int, Threads> kThreads{};

 public:
  FASTRNN_DEVICE ForwardRow(const StepsForwardParams& p, int direction, int s, int n)
      : units_(p, direction, s),
        p_(p),
        d_(p.dir[direction]),
        H_(p.H),
        n_(n),
        t_(d_.reverse ? p.T - 1 - s : s),
        a_(p.work[direction].sums + static_cast<int64_t>(n) * G * p.H) {}

  FASTRNN_DEVICE void run() const {
    if (!units_.live(n_)) {
      each_unit(H_, kThreads, [&](int j) {
        if (Cell::kHasCell) units_.keep_cell(n_, j, 0.f, false);
        if (!p_.projected) units_.dead(n_, j);
      });
      return;
    }
    const RowMoments of_a = row_moments(G * H_, [&](int place, const auto& f) {
      float sum = 0.f;
      each_unit(H_, kThreads, [&](int j) {
        FASTRNN_UNROLL
        for (int g = 0; g < G; g++) sum += f(a_[g * H_ + j]);
      });
      return sums_(place, sum);
    });
    RowMoments of_c = {};
    if constexpr (Cell::kHasCell) {
      of_c = lstm(of_a);
    } else {
      each_unit(H_, kThreads, [&](int j) {
        float hat[G];
        keep_hats(of_a, j, hat);
        units_.template cell<Cell, 0>(n_, j, [&](int g) { return gain(g, j) * hat[g]; });
      });
    }
    if (!d_.scales.data || prim::thread_index()) return;
    float* scales = row_at<float>(d_.scales, t_, n_);
    prim::store(scales, of_a.factor);
    prim::store(scales + 1, of_c.factor);
  }

 private:
  FASTRNN_DEVICE float gain(int g, int j) const { return prim::load_constant(d_.gain_h + g * H_ + j); }
  FASTRNN_DEVICE void keep_hats(const RowMoments& of_a, int j, float (&hat)[G]) const {
    FASTRNN_UNROLL
    for (int g = 0; g < G; g++) {
      hat[g] = of_a.hat(a_[g * H_ + j]);
      units_.put_tape(n_, j, Cell::kTape + g, hat[g]);
    }
  }

  FASTRNN_DEVICE RowMoments lstm(const RowMoments& of_a) const {
    each_unit(H_, kThreads, [&](int j) {
      float hat[G], z[G];
      keep_hats(of_a, j, hat);
      FASTRNN_UNROLL
      for (int g = 0; g < G; g++) z[g] = A::fma(gain(g, j), hat[g], units_.input(n_, g * H_ + j));
      const float i = A::sigmoid(z[0]), f = A::sigmoid(z[1]), c = A::tanh(z[2]), o = A::sigmoid(z[3]);
      const Factors by = units_.factors(n_, j);
      const float old = units_.old_cell(n_, j);
      const float fresh = lstm_cell<A>(i, f, c, old, by.update, by.cell);
      units_.keep_cell(n_, j, by.zones_c ? zoneout<A>(by.zone_c, fresh, old) : fresh, true);
      units_.put_tape(n_, j, 0, i);
      units_.put_tape(n_, j, 1, f);
      units_.put_tape(n_, j, 2, c);
      units_.put_tape(n_, j, 3, o);
      a_[j] = fresh;
      a_[H_ + j] = o;
    });
    const RowMoments of_c = row_moments(H_, [&](int place, const auto& f) {
      float sum = 0.f;
      each_unit(H_, kThreads, [&](int j) { sum += f(a_[j]); });
      return sums_(2 + place, sum);
    });
    each_unit(H_, kThreads, [&](int j) {
      const float hat = of_c.hat(a_[j]);
      units_.put_tape(n_, j, 8, hat);
      const float h = a_[H_ + j] * A::tanh(layer_norm_term<A>(hat, prim::load_constant(d_.gain_c + j),
                                                              prim::load_constant(d_.bias_c + j)));
      units_.send(n_, j, p_.projected ? h : units_.zoned_state(n_, j, h));
    });
    return of_c;
  }

  const ForwardUnits<D, kLinear> units_;
  const StepsForwardParams& p_;
  const StepsForwardDirection& d_;
  const RowSums<Threads> sums_;
  const int H_, n_, t_;
  float* const a_;  // the recurrent term
};

template <class Cell, class D, int Threads, bool kLinear = false>
class BackwardRow {
  using Elem = typename D::Elem;
  using A = Activations<kLinear>;
  static constexpr int G = Cell::kGates;
  static constexpr std::integral_constant<int, Threads> kThreads{};

 public:
  FASTRNN_DEVICE BackwardRow(const StepsBackwardParams& p, int direction, int s, int n)
      : units_(p, direction, s),
        p_(p),
        d_(p.dir[direction]),
        H_(p.H),
        n_(n),
        s_(s),
        t_(d_.reverse ? s : p.T - 1 - s),
        sums_in_(p.work[direction].sums + static_cast<int64_t>(n) * (p.projected ? p.H : p.O)),
        terms_(p.work[direction].terms + static_cast<int64_t>(n) * G * p.H) {}

  FASTRNN_DEVICE void run() const {
    if (!units_.live(n_)) {
      each_unit(H_, kThreads, [&](int j) { dead(j); });
      return;
    }
    const float* scales = row_at<const float>(d_.scales, t_, n_);
    const float of_a = prim::load_constant(scales);
    float sum = 0.f, hats = 0.f;
    // A gate's gradient at the recurrent term's normalised value.
    const auto term = [&](int g, int j, float dz) {
      const float gradient = dz * gain(g, j);
      terms_[g * H_ + j] = gradient;
      sum += gradient;
      hats = A::fma(gradient, hat(g, j), hats);
    };
    if constexpr (Cell::kHasCell)
      lstm(prim::load_constant(scales + 1), term);
    else
      each_unit(H_, kThreads, [&](int j) {
        float g[4] = {};
        const float n_input = units_.template cell_gradient<Cell, 0>(n_, j, sums_in_[j], g);
        FASTRNN_UNROLL
        for (int k = 0; k < G; k++) {
          term(k, j, g[k]);
          D::store(row_at<Elem>(d_.dgates, t_, n_) + k * H_ + j, k == 2 ? n_input : g[k]);
        }
      });
    const float count = static_cast<float>(G * H_);
    const float mean = sums_(2, sum) / count, mean_hat = sums_(3, hats) / count;
    const bool cut = units_.cleared(n_);
    each_unit(H_, kThreads, [&](int j) {
      FASTRNN_UNROLL
      for (int g = 0; g < G; g++) {
        const float da = batch_norm_backward<A>(terms_[g * H_ + j], hat(g, j), of_a, mean, mean_hat);
        D::store(row_at<Elem>(d_.dgates_h, t_, n_) + g * H_ + j, da);
        units_.operand(n_, g, j, cut ? 0.f : da);
      }
    });
  }

 private:
  FASTRNN_DEVICE float gain(int g, int j) const { return prim::load_constant(d_.gain_h + g * H_ + j); }
  FASTRNN_DEVICE float hat(int g, int j) const { return units_.tape(n_, j, Cell::kTape + g); }

  FASTRNN_DEVICE void dead(int j) const {
    if (!p_.projected) units_.arriving(n_, j, sums_in_[j]);
    if (s_ == p_.T) return;
    FASTRNN_UNROLL
    for (int g = 0; g < G; g++) {
      D::store(row_at<Elem>(d_.dgates, t_, n_) + g * H_ + j, 0.f);
      D::store(row_at<Elem>(d_.dgates_h, t_, n_) + g * H_ + j, 0.f);
      units_.operand(n_, g, j, 0.f);
    }
    if (Cell::kHasCell) D::store(row_at<Elem>(d_.dm, t_, n_) + j, 0.f);
  }

  template <class Term>
  FASTRNN_DEVICE void lstm(float of_c, const Term& term) const {
    float sum = 0.f, hats = 0.f;
    each_unit(H_, kThreads, [&](int j) {
      float dh = p_.projected ? sums_in_[j] : units_.arriving(n_, j, sums_in_[j]);
      if (!p_.projected) {
        const Factors by = units_.factors(n_, j);
        units_.carry_h(n_, j, zoned_h<A>(by, dh));
      }
      const float hat_c = units_.tape(n_, j, 8), gain_c = prim::load_constant(d_.gain_c + j);
      const float q = A::tanh(layer_norm_term<A>(hat_c, gain_c, prim::load_constant(d_.bias_c + j)));
      const BnOutputGrad<float> r = bnlstm_backward_output<A>(units_.tape(n_, j, 3), q, dh);
      D::store(row_at<Elem>(d_.dm, t_, n_) + j, r.m);
      const float m = r.m * gain_c;
      terms_[j] = m;
      terms_[3 * H_ + j] = r.o;
      sum += m;
      hats = A::fma(m, hat_c, hats);
    });
    const float mean = sums_(0, sum) / static_cast<float>(H_),
                mean_hat = sums_(1, hats) / static_cast<float>(H_);
    each_unit(H_, kThreads, [&](int j) {
      const Factors by = units_.factors(n_, j);
      float dc = units_.arriving_c(n_, j), old = 0.f;
      if (by.zones_c) old = zoneout_backward<A>(by.zone_c, dc);
      dc += batch_norm_backward<A>(terms_[j], units_.tape(n_, j, 8), of_c, mean, mean_hat);
      const BnCellGrad<float> r =
          bnlstm_backward_cell<A>(units_.tape(n_, j, 0), units_.tape(n_, j, 1), units_.tape(n_, j, 2),
                                  units_.old_cell(n_, j), dc * by.cell);
      const float dz[4] = {r.i * by.update, r.f, r.g * by.update, terms_[3 * H_ + j]};
      units_.carry_c(n_, j, r.c_prev + old);
      FASTRNN_UNROLL
      for (int g = 0; g < 4; g++) {
        term(g, j, dz[g]);
        D::store(row_at<Elem>(d_.dgates, t_, n_) + g * H_ + j, dz[g]);
      }
    });
  }

  const BackwardUnits<D, kLinear> units_;
  const StepsBackwardParams& p_;
  const StepsBackwardDirection& d_;
  const RowSums<Threads> sums_;
  const int H_, n_, s_, t_;
  const float* const sums_in_;
  float* const terms_;
};

}  // namespace fastrnn::cuda
