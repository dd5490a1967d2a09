// Layer-normalised cells, backward: one row's gate gradients, those of its terms and its share of the parameters'.
#pragma once
#include "cells_cpu_backward.h"
#include "norm_cells.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Where a batch row's share of the parameter gradients is summed over its steps, in the order of the steps.
template <class E, class C>
struct NormSums {
  using T = typename E::T;
  T *ih, *hh, *bias, *c, *beta;
  NormSums(T* p, int64_t H)
      : ih(p),
        hh(ih + C::kGates * H),
        bias(hh + C::kGates * H),
        c(bias + C::kBiases * H),
        beta(c + (C::kCellState ? H : 0)) {}
  static int64_t size(int64_t H) { return (2 * C::kGates + C::kBiases + 2 * C::kCellState) * H; }
};

template <class T>
FASTRNN_INLINE void add_to(T* p, Vec<T> v, int n) {
  store_as<Vec<T>>(p, load_as<Vec<T>>(p, n) + v, n);
}

// From dz, the gradients of what C::kBiases pre-activations (H each): dx and dh of the raw terms, in torch's order.
template <class E, class C>
static void norm_terms_backward(const NormTerms<E>& terms, const typename E::T* dz, typename E::T* dx,
                                typename E::T* dh, const NormSums<E, C>& sums) {
  using V = typename E::V;
  using T = typename E::T;
  const int64_t H = terms.H;
  const Panels<E>& p = terms.p;
  V x_sum = V::zero(), x_hats = V::zero(), h_sum = V::zero(), h_hats = V::zero();
  for (int64_t b = 0; b < p.blocks; b++) {
    const int n = p.units(b);
    const int64_t u0 = p.first(b);
    for (int g = 0; g < C::kGates; g++) {
      const V zx = load_as<V>(dz + g * H + u0, n), zh = load_as<V>(dz + C::h_bias(g) * H + u0, n);
      const V x_hat = terms.hat_x(b, g, n), h_hat = terms.hat_h(b, g, n);
      add_to(sums.ih + g * H + u0, zx * x_hat, n);
      add_to(sums.hh + g * H + u0, zh * h_hat, n);
      const V gx = zx * terms.param(terms.w.ih, g, b, n), gh = zh * terms.param(terms.w.hh, g, b, n);
      x_sum = x_sum + gx;
      x_hats = V::fma(gx, x_hat, x_hats);
      h_sum = h_sum + gh;
      h_hats = V::fma(gh, h_hat, h_hats);
    }
    for (int s = 0; s < C::kBiases; s++) add_to(sums.bias + s * H + u0, load_as<V>(dz + s * H + u0, n), n);
  }
  auto mean = [&](V v) { return V::set1(lanes_sum(v) / T(C::kGates * H)); };
  const V x_mean = mean(x_sum), x_mean_hat = mean(x_hats), h_mean = mean(h_sum), h_mean_hat = mean(h_hats);
  for (int64_t b = 0; b < p.blocks; b++) {
    const int n = p.units(b);
    for (int g = 0; g < C::kGates; g++) {
      const int64_t at = g * H + p.first(b), at_h = C::h_bias(g) * H + p.first(b);
      using A = Act<V, false, true>;
      store_as<V>(dx + at,
                  batch_norm_backward<A>(load_as<V>(dz + at, n) * terms.param(terms.w.ih, g, b, n),
                                         terms.hat_x(b, g, n), terms.of_x.factor, x_mean, x_mean_hat),
                  n);
      store_as<V>(dh + at,
                  batch_norm_backward<A>(load_as<V>(dz + at_h, n) * terms.param(terms.w.hh, g, b, n),
                                         terms.hat_h(b, g, n), terms.of_h.factor, h_mean, h_mean_hat),
                  n);
    }
  }
}

template <class E, bool Linear>
struct NormLstmGrad : LstmBiases {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear, true>;
  using Sums = NormSums<E, NormLstmGrad>;
  static constexpr bool kCellState = true, kCarryH = false, kTwoStage = false;
  static constexpr int kSlots = 4, kTape = 8, kScratch = 10;
  static constexpr int kPieces[][3] = {{0, 0, 4}};

  // dh: gradient of h_t by the next step's matmul; with a projection that of o * tanh(.), complete.
  // scratch: kScratch * H values; dx: gradient of the raw input term (that of the recurrent one is g.dg).
  template <class M>
  static void row(const NormTerms<E>& terms, const GradRow<E>& g, const T* dh, T* dx, bool projected,
                  const Sums& sums, T* scratch, const M& masks) {
    const Panels<E>& p = terms.p;
    const int64_t H = terms.H;
    T *gates = scratch, *dz = scratch + 4 * H, *fresh = scratch + 8 * H, *dc_hat = scratch + 9 * H;
    each_block<E>(p, [&](auto q, int64_t b) {
      constexpr int Q = decltype(q)::value;
      V s[3 * Q], t[Q];
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        s[3 * i] = terms.template gate<Math>(b + i, 0, n);
        s[3 * i + 1] = terms.template gate<Math>(b + i, 1, n);
        t[i] = terms.template gate<Math>(b + i, 2, n);
        s[3 * i + 2] = terms.template gate<Math>(b + i, 3, n);
      }
      Math::both(s, t);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        const int64_t at = p.first(b + i);
        store_as<V>(gates + at, s[3 * i], n);
        store_as<V>(gates + H + at, s[3 * i + 1], n);
        store_as<V>(gates + 2 * H + at, t[i], n);
        store_as<V>(gates + 3 * H + at, s[3 * i + 2], n);
        if constexpr (M::on)
          if (masks.plan.zones_c())  // the cell before zoneout
            store_as<V>(fresh + at,
                        lstm_cell<Math>(s[3 * i], s[3 * i + 1], t[i], load_as<V>(g.c_prev + at, n),
                                        masks.update(0, at), masks.cell(0, at)),
                        n);
      }
    });
    const T* c = g.c;
    if constexpr (M::on)
      if (masks.plan.zones_c()) c = fresh;
    const Moments<V> of_c(c, H);

    V sum = V::zero(), hats = V::zero();
    for (int64_t b = 0; b < p.blocks; b++) {
      const int n = p.units(b);
      const int64_t at = p.first(b);
      V d;
      if (projected) {
        d = load_as<V>(dh + at, n);
      } else {
        d = incoming<E>(g, dh, at, static_cast<int>(at), n, masks);
        const V old = zoned<Math>(d, at, masks);
        if (carries_h(masks)) store_as<V>(g.dh_out + at, old, n);
      }
      const V hat = of_c.hat(load_as<V>(c + at, n)), gain = terms.param(terms.w.c, 0, b, n);
      const V o = load_as<V>(gates + 3 * H + at, n);
      const V h = Math::tanh(layer_norm_term<Math>(hat, gain, terms.param(terms.w.beta, 0, b, n)));
      const auto r = bnlstm_backward_output<Math>(o, h, d);
      store_as<V>(dz + 3 * H + at, r.o, n);
      if (projected) store_as<V>(g.mid + at, o * h, n);
      add_to(sums.c + at, r.m * hat, n);
      add_to(sums.beta + at, r.m, n);
      const V m = r.m * gain;
      store_as<V>(dc_hat + at, m, n);
      sum = sum + m;
      hats = V::fma(m, hat, hats);
    }
    const V mean = V::set1(lanes_sum(sum) / T(H)), mean_hat = V::set1(lanes_sum(hats) / T(H));
    for (int64_t b = 0; b < p.blocks; b++) {
      const int n = p.units(b);
      const int64_t at = p.first(b);
      V dc = load_as<V>(g.dc_in + at, n), old = V::zero();
      if (g.dcells) dc = dc + load_as<V>(g.dcells + at, n);
      if constexpr (M::on)
        if (masks.plan.zones_c()) old = zoneout_backward<Math>(masks.zoneout_c(0, at), dc);
      dc = dc + batch_norm_backward<Math>(load_as<V>(dc_hat + at, n), of_c.hat(load_as<V>(c + at, n)),
                                          of_c.factor, mean, mean_hat);
      if constexpr (M::on) dc = dc * masks.cell(0, at);
      auto r =
          bnlstm_backward_cell<Math>(load_as<V>(gates + at, n), load_as<V>(gates + H + at, n),
                                     load_as<V>(gates + 2 * H + at, n), load_as<V>(g.c_prev + at, n), dc);
      if constexpr (M::on) {
        const V update = masks.update(0, at);
        r.i = r.i * update;
        r.g = r.g * update;
        r.c_prev = r.c_prev + old;
      }
      store_as<V>(dz + at, r.i, n);
      store_as<V>(dz + H + at, r.f, n);
      store_as<V>(dz + 2 * H + at, r.g, n);
      store_as<V>(g.dc_out + at, r.c_prev, n);
    }
    norm_terms_backward<E, NormLstmGrad>(terms, dz, dx, g.dg, sums);
  }

  // A projected state's gradient, complete: where it is kept for the projection's own gradients.
  template <class M>
  static void state_row(const GradRow<E>& g, const T* dh, int64_t O, const M& masks) {
    each_vector<V>(static_cast<int>(O), [&](int u, auto n) {
      V d = incoming<E>(g, dh, u, u, n, masks);
      const V old = zoned<Math>(d, u, masks);
      if (carries_h(masks)) store_as<V>(g.dh_out + u, old, n);
      store_as<V>(g.dh + u, d, n);
    });
  }
};

template <class E, bool Linear>
struct NormGruGrad : GruBiases {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear, true>;
  using Sums = NormSums<E, NormGruGrad>;
  static constexpr bool kCellState = false, kCarryH = true, kTwoStage = false;
  static constexpr int kSlots = 3, kTape = 6, kScratch = 4;
  static constexpr int kPieces[][3] = {{0, 0, 3}};

  template <class M>
  static void row(const NormTerms<E>& terms, const GradRow<E>& g, const T* dh, T* dx, bool, const Sums& sums,
                  T* dz, const M& masks) {
    const Panels<E>& p = terms.p;
    const int64_t H = terms.H;
    each_block<E>(p, [&](auto q, int64_t b) {
      constexpr int Q = decltype(q)::value;
      V s[2 * Q], c[Q], un[Q];
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        s[2 * i] = terms.template gate<Math>(b + i, 0, n);
        s[2 * i + 1] = terms.template gate<Math>(b + i, 1, n);
        un[i] = terms.template recurrent_part<Math>(b + i, 2, 3, n);
      }
      Math::sigmoids(s);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) c[i] =
          gru_candidate<Math>(s[2 * i], un[i], terms.template input_part<Math>(b + i, 2, p.units(b + i)));
      Math::tanhs(c);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        const int64_t at = p.first(b + i);
        const V h_prev = load_as<V>(g.h_prev + at, n);
        V d = incoming<E>(g, dh, at, static_cast<int>(at), n, masks);
        GruGrad<V> r;
        if constexpr (M::on) {
          const V old = zoned<Math>(d, at, masks);
          r = gru_backward<Math>(s[2 * i], s[2 * i + 1], c[i], un[i], h_prev, d, masks.update(0, at));
          r.h_prev = r.h_prev + old;
        } else {
          r = gru_backward<Math>(s[2 * i], s[2 * i + 1], c[i], un[i], h_prev, d);
        }
        store_as<V>(dz + at, r.r, n);
        store_as<V>(dz + H + at, r.z, n);
        store_as<V>(dz + 2 * H + at, r.n, n);
        store_as<V>(dz + 3 * H + at, r.un, n);
        store_as<V>(g.dh_out + at, r.h_prev, n);
      }
    });
    norm_terms_backward<E, NormGruGrad>(terms, dz, dx, g.dg, sums);
  }
};

template <class E, bool Linear>
constexpr bool kWholeRows<NormLstmGrad<E, Linear>> = true;
template <class E, bool Linear>
constexpr bool kWholeRows<NormGruGrad<E, Linear>> = true;

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
