// Layer-normalised cells: what happens to one row's complete terms, forward.
#pragma once
#include "cells_cpu.h"
#include "norm.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// The normalised terms of a row, as a cell reads them.
template <class E>
struct NormTerms {
  using V = typename E::V;
  using T = typename E::T;
  const T *x, *h;  // raw, in the order of the packed weights
  const Panels<E>& p;
  const NormParams<E>& w;
  int64_t H;
  const Moments<V> of_x, of_h;

  NormTerms(const T* raw_x, const T* raw_h, const Panels<E>& panels, const NormParams<E>& params)
      : x(raw_x),
        h(raw_h),
        p(panels),
        w(params),
        H(panels.width),
        of_x(raw_x, panels.gates * panels.width),
        of_h(raw_h, panels.gates * panels.width) {}

  V hat_x(int64_t b, int gate, int n) const { return of_x.hat(load_as<V>(x + p.offset(b) + gate * n, n)); }
  V hat_h(int64_t b, int gate, int n) const { return of_h.hat(load_as<V>(h + p.offset(b) + gate * n, n)); }
  V param(const T* values, int gate, int64_t b, int n) const {
    return load_as<V>(values + gate * H + p.first(b), n);
  }
  // Both terms of a gate and its bias.
  template <class Math>
  V gate(int64_t b, int g, int n) const {
    return batch_norm_gate<Math>(hat_h(b, g, n), hat_x(b, g, n), param(w.hh, g, b, n), param(w.ih, g, b, n),
                                 param(w.bias, g, b, n));
  }
  // GRU's candidate needs them apart.
  template <class Math>
  V input_part(int64_t b, int g, int n) const {
    return layer_norm_term<Math>(hat_x(b, g, n), param(w.ih, g, b, n), param(w.bias, g, b, n));
  }
  template <class Math>
  V recurrent_part(int64_t b, int g, int bias, int n) const {
    return layer_norm_term<Math>(hat_h(b, g, n), param(w.hh, g, b, n), param(w.bias, bias, b, n));
  }
};

template <class E, bool Linear>
struct NormLstm : LstmBiases {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear, true>;
  static constexpr bool kCellState = true;
  static constexpr int kSlots = 8, kStages = 1;

  // scratch: 2H values.
  template <class M>
  static void row(const NormTerms<E>& terms, const RowState<E>& st, bool projected, T* scratch,
                  const M& masks) {
    const Panels<E>& p = terms.p;
    const int64_t H = terms.H;
    T *cell = scratch, *gate_o = scratch + H;
    each_block<E>(p, [&](auto q, int64_t b) {
      constexpr int Q = decltype(q)::value;
      V s[3 * Q], g[Q];
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        s[3 * i] = terms.template gate<Math>(b + i, 0, n);
        s[3 * i + 1] = terms.template gate<Math>(b + i, 1, n);
        g[i] = terms.template gate<Math>(b + i, 2, n);
        s[3 * i + 2] = terms.template gate<Math>(b + i, 3, n);
      }
      Math::both(s, g);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        const int64_t at = p.first(b + i);
        const V c_prev = load_as<V>(st.c_prev + at, n);
        V c;
        if constexpr (M::on)
          c = lstm_cell<Math>(s[3 * i], s[3 * i + 1], g[i], c_prev, masks.update(0, at), masks.cell(0, at));
        else
          c = lstm_cell<Math>(s[3 * i], s[3 * i + 1], g[i], c_prev);
        store_as<V>(cell + at, c, n);  // h_t is made of the new cell
        if constexpr (M::on)
          if (masks.plan.zones_c()) c = zoneout<Math>(masks.zoneout_c(0, at), c, c_prev);
        store_as<V>(st.c + at, c, n);
        store_as<V>(gate_o + at, s[3 * i + 2], n);
      }
    });
    const Moments<V> of_c(cell, H);
    each_block<E>(p, [&](auto q, int64_t b) {
      constexpr int Q = decltype(q)::value;
      V c[Q];
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        c[i] = layer_norm_term<Math>(of_c.hat(load_as<V>(cell + p.first(b + i), n)),
                                     terms.param(terms.w.c, 0, b + i, n),
                                     terms.param(terms.w.beta, 0, b + i, n));
      }
      Math::tanhs(c);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        const int64_t at = p.first(b + i);
        const V h = load_as<V>(gate_o + at, n) * c[i];
        if (projected)
          store_as<V>(st.mid + at, h, n);
        else
          put_state<E, Math>(st, 0, at, h, n, masks);
      }
    });
  }
  template <class M>
  static void project(const TileRows<E>& tile, const M& masks) {
    put_projected<E, Math>(tile, masks);
  }
};

template <class E, bool Linear>
struct NormGru : GruBiases {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear, true>;
  static constexpr bool kCellState = false;
  static constexpr int kSlots = 6, kStages = 1;

  template <class M>
  static void row(const NormTerms<E>& terms, const RowState<E>& st, bool, T*, const M& masks) {
    const Panels<E>& p = terms.p;
    each_block<E>(p, [&](auto q, int64_t b) {
      constexpr int Q = decltype(q)::value;
      V s[2 * Q], c[Q];
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        s[2 * i] = terms.template gate<Math>(b + i, 0, n);
        s[2 * i + 1] = terms.template gate<Math>(b + i, 1, n);
      }
      Math::sigmoids(s);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        c[i] = gru_candidate<Math>(s[2 * i], terms.template recurrent_part<Math>(b + i, 2, 3, n),
                                   terms.template input_part<Math>(b + i, 2, n));
      }
      Math::tanhs(c);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int n = p.units(b + i);
        const int64_t at = p.first(b + i);
        const V h_prev = load_as<V>(st.h_prev + at, n);
        V h;
        if constexpr (M::on)
          h = gru_output<Math>(s[2 * i + 1], c[i], h_prev, masks.update(0, at));
        else
          h = gru_output<Math>(s[2 * i + 1], c[i], h_prev);
        put_state<E, Math>(st, 0, at, h, n, masks);
      }
    });
  }
};

template <class E, bool Linear>
constexpr bool kWholeRows<NormLstm<E, Linear>> = true;
template <class E, bool Linear>
constexpr bool kWholeRows<NormGru<E, Linear>> = true;

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
