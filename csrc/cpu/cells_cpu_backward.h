// Backward halves of the cells, bound to rows in memory (see cells_cpu.h for the forward ones).
// Stage 0 turns dh_t, the matmul of the next step's gate gradients plus what reaches h_t directly, into this
// step's gate gradients; stage 1 exists for projections (d(o tanh c) from dh_t) and reset_before GRUs.
#pragma once
#include "cells_cpu.h"
#include "outer.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class E>
struct GradRow {
  using IO = typename E::IO;
  using T = typename E::T;
  const IO* dy;     // gradient of y's row, or null
  const T* dh_in;   // what reaches h_t beside dy and the matmul
  const T* dc_in;   // the same for c_t
  const T* dcells;  // gradient of the cell-state output's row, or null
  const T* tape;    // saved gates; may be dg itself when recomputed
  const IO *h, *h_prev;
  const T *c, *c_prev;
  T* dg;               // gate gradients of this row
  T *dh_out, *dc_out;  // carried to the previous step
  T* dh;               // projection: gradient of the projected state
  T* mid;              // operand of a second-stage weight gradient: o * tanh(c), or r * h_prev
};

// What the pointwise part of units [u, u + n) of a row will read and write, asked for before the product that comes first.
template <class E, class C>
FASTRNN_INLINE void prefetch_row(const GradRow<E>& g, int64_t u, int n, int64_t H) {
  for (int slot = 0; slot < C::kTape; slot++) prefetch_lines(g.tape + slot * H + u, n);
  for (int slot = 0; slot < C::kSlots; slot++) prefetch_lines(g.dg + slot * H + u, n);
  if (g.dy) prefetch_lines(g.dy + u, n);
  if constexpr (C::kCellState) {
    prefetch_lines(g.c + u, n);
    prefetch_lines(g.c_prev + u, n);
    prefetch_lines(g.dc_in + u, n);
  } else {
    prefetch_lines(g.h + u, n);
    prefetch_lines(g.h_prev + u, n);
    prefetch_lines(g.dh_in + u, n);
  }
}

// Gradient of h_t; acc is that of what the next step's matmul took, h_t or its masked copy.
template <class E, class M>
FASTRNN_INLINE typename E::V incoming(const GradRow<E>& g, const typename E::T* acc, int64_t at, int u, int n,
                                      const M& masks) {
  using V = typename E::V;
  V dh = load_as<V>(acc + u, n);
  if constexpr (M::on) dh = dh * masks.state(0, at);
  dh = dh + load_as<V>(g.dh_in + at, n);
  return g.dy ? dh + load_as<V>(g.dy + at, n) : dh;
}

// What zoneout sends straight to the state before; dh becomes the gradient of the new value.
template <class Math, class V, class M>
FASTRNN_INLINE V zoned(V& dh, int64_t at, const M& masks) {
  if constexpr (M::on)
    if (masks.plan.zones_h()) return zoneout_backward<Math>(masks.zoneout_h(0, at), dh);
  return V::zero();
}

// Columns of the gate gradients that one weight gradient is made of.
struct Segment {
  int slot, slots;     // in the gate gradients
  int x_gate, h_gate;  // first gate in weight_ih / weight_hh, -1: no part
  bool mid;            // recurrent operand is `mid`, not h_prev
};

// Whether h_{t-1} gets a gradient beside the matmul's in a cell that has none of its own.
template <class M>
FASTRNN_INLINE bool carries_h(const M& masks) {
  if constexpr (M::on)
    return masks.plan.zones_h();
  else
    return false;
}

template <class E, bool Linear>
struct LstmGradCpu {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  static constexpr bool kCellState = true, kCarryH = false, kTwoStage = false;
  static constexpr int kSlots = 4, kTape = 4;
  static constexpr Segment kSegments[] = {{0, 4, 0, 0, false}};
  // Gate gradients that meet weight_hh in stage 0, as (slot, gate, gates) pieces of the k axis.
  static constexpr int kPieces[][3] = {{0, 0, 4}};

  template <class M>
  static void finish(int stage, bool projected, const GradRow<E>& g, const T* acc, int64_t u0, int units,
                     int64_t H, const M& masks) {
    each_vector<V>(units, [&](int u, auto n) {
      const int64_t at = u0 + u;
      V dh;
      if (stage == 0) {
        dh = incoming<E>(g, acc, at, u, n, masks);
        const V old = zoned<Math>(dh, at, masks);
        if (carries_h(masks)) store_as<V>(g.dh_out + at, old, n);
        if (projected) {
          store_as<V>(g.dh + at, dh, n);
          return;
        }
      } else {
        dh = load_as<V>(acc + u, n);
      }
      V dc = load_as<V>(g.dc_in + at, n);
      if (g.dcells) dc = dc + load_as<V>(g.dcells + at, n);
      const V i = load_as<V>(g.tape + at, n), f = load_as<V>(g.tape + H + at, n);
      const V gate = load_as<V>(g.tape + 2 * H + at, n), o = load_as<V>(g.tape + 3 * H + at, n);
      const V c_prev = load_as<V>(g.c_prev + at, n);
      V c = load_as<V>(g.c + at, n);
      LstmGrad<V> r;
      if constexpr (M::on) {
        const V update = masks.update(0, at), cell = masks.cell(0, at);
        V old = V::zero();
        if (masks.plan.zones_c()) {
          c = lstm_cell<Math>(i, f, gate, c_prev, update, cell);  // before zoneout
          old = zoneout_backward<Math>(masks.zoneout_c(0, at), dc);
        }
        r = lstm_backward<Math>(i, f, gate, o, c, c_prev, dh, dc, update, cell);
        r.c_prev = r.c_prev + old;
      } else {
        r = lstm_backward<Math>(i, f, gate, o, c, c_prev, dh, dc);
      }
      store_as<V>(g.dg + at, r.i, n);
      store_as<V>(g.dg + H + at, r.f, n);
      store_as<V>(g.dg + 2 * H + at, r.g, n);
      store_as<V>(g.dg + 3 * H + at, r.o, n);
      store_as<V>(g.dc_out + at, r.c_prev, n);
      if (projected) store_as<V>(g.mid + at, o * Math::tanh(c), n);
    });
  }
  // Gates of one row from complete pre-activations (acc carries input and recurrent term).
  static void activate(int, const T* acc, const T*, T* tape, const typename E::IO*, T*, int64_t u0, int units,
                       int64_t H) {
    each_vector<V>(units, [&](int u, auto n) {
      T* out = tape + u0 + u;
      store_as<V>(out, Math::sigmoid(load_as<V>(acc + u, n)), n);
      store_as<V>(out + H, Math::sigmoid(load_as<V>(acc + units + u, n)), n);
      store_as<V>(out + 2 * H, Math::tanh(load_as<V>(acc + 2 * units + u, n)), n);
      store_as<V>(out + 3 * H, Math::sigmoid(load_as<V>(acc + 3 * units + u, n)), n);
    });
  }
};

template <class E, bool Linear>
struct GruGradCpu {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  static constexpr bool kCellState = false, kCarryH = true, kTwoStage = false;
  static constexpr int kSlots = 4, kTape = 4;
  static constexpr Segment kSegments[] = {{0, 2, 0, 0, false}, {2, 1, 2, -1, false}, {3, 1, -1, 2, false}};
  static constexpr int kPieces[][3] = {{0, 0, 2}, {3, 2, 1}};

  template <class M>
  static void finish(int, bool, const GradRow<E>& g, const T* acc, int64_t u0, int units, int64_t H,
                     const M& masks) {
    each_vector<V>(units, [&](int u, auto n) {
      const int64_t at = u0 + u;
      V dh = incoming<E>(g, acc, at, u, n, masks);
      const V z = load_as<V>(g.tape + H + at, n), c = load_as<V>(g.tape + 2 * H + at, n);
      const V un = load_as<V>(g.tape + 3 * H + at, n), h_prev = load_as<V>(g.h_prev + at, n);
      GruGrad<V> r;
      if constexpr (M::on) {
        const V old = zoned<Math>(dh, at, masks);
        r = gru_backward<Math>(load_as<V>(g.tape + at, n), z, c, un, h_prev, dh, masks.update(0, at));
        r.h_prev = r.h_prev + old;
      } else {
        r = gru_backward<Math>(load_as<V>(g.tape + at, n), z, c, un, h_prev, dh);
      }
      store_as<V>(g.dg + at, r.r, n);
      store_as<V>(g.dg + H + at, r.z, n);
      store_as<V>(g.dg + 2 * H + at, r.n, n);
      store_as<V>(g.dg + 3 * H + at, r.un, n);
      store_as<V>(g.dh_out + at, r.h_prev, n);
    });
  }
  static void activate(int, const T* acc, const T* gx, T* tape, const typename E::IO*, T*, int64_t u0,
                       int units, int64_t H) {
    each_vector<V>(units, [&](int u, auto n) {
      T* out = tape + u0 + u;
      V un = load_as<V>(acc + 2 * units + u, n);
      V r = Math::sigmoid(load_as<V>(acc + u, n) + load_as<V>(gx + u, n));
      store_as<V>(out, r, n);
      store_as<V>(out + H, Math::sigmoid(load_as<V>(acc + units + u, n) + load_as<V>(gx + units + u, n)), n);
      store_as<V>(out + 2 * H, Math::tanh(V::fma(r, un, load_as<V>(gx + 2 * units + u, n))), n);
      store_as<V>(out + 3 * H, un, n);
    });
  }
};

template <class E, bool Linear>
struct GruResetBeforeGradCpu {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  static constexpr bool kCellState = false, kCarryH = true, kTwoStage = true;
  static constexpr int kSlots = 3, kTape = 3;
  static constexpr Segment kSegments[] = {{0, 2, 0, 0, false}, {2, 1, 2, 2, true}};
  static constexpr int kPieces[][3] = {{0, 0, 2}};

  template <class M>
  static void finish(int stage, bool, const GradRow<E>& g, const T* acc, int64_t u0, int units, int64_t H,
                     const M& masks) {
    each_vector<V>(units, [&](int u, auto n) {
      const int64_t at = u0 + u;
      V h_prev = load_as<V>(g.h_prev + at, n);
      if (stage == 0) {
        V dh = incoming<E>(g, acc, at, u, n, masks);
        V z = load_as<V>(g.tape + H + at, n), c = load_as<V>(g.tape + 2 * H + at, n);
        V dn = dh * (Math::one() - z) * Math::dtanh(c), carry = dh * z;
        if constexpr (M::on) {
          const V old = zoned<Math>(dh, at, masks), update = masks.update(0, at);
          dn = dh * (Math::one() - z) * update * Math::dtanh(c);
          carry = V::fma(dh, z, old);
          c = c * update;
        }
        store_as<V>(g.dg + H + at, dh * (h_prev - c) * Math::dsigmoid(z), n);
        store_as<V>(g.dg + 2 * H + at, dn, n);
        store_as<V>(g.dh_out + at, carry, n);
      } else {
        V r = load_as<V>(g.tape + at, n), drh = load_as<V>(acc + u, n), r_in = r;
        if constexpr (M::on) {
          const V m = masks.state_now(0, at);
          h_prev = h_prev * m;
          r_in = r * m;
        }
        store_as<V>(g.mid + at, r * h_prev, n);
        store_as<V>(g.dg + at, drh * h_prev * Math::dsigmoid(r), n);
        store_as<V>(g.dh_out + at, V::fma(drh, r_in, load_as<V>(g.dh_out + at, n)), n);
      }
    });
  }
  static void activate(int stage, const T* acc, const T*, T* tape, const typename E::IO* h_prev, T* mid,
                       int64_t u0, int units, int64_t H) {
    each_vector<V>(units, [&](int u, auto n) {
      T* out = tape + u0 + u;
      if (stage == 0) {
        V r = Math::sigmoid(load_as<V>(acc + u, n));
        store_as<V>(out, r, n);
        store_as<V>(mid + u0 + u, r * load_as<V>(h_prev + u0 + u, n), n);
        store_as<V>(out + H, Math::sigmoid(load_as<V>(acc + units + u, n)), n);
      } else {
        store_as<V>(out + 2 * H, Math::tanh(load_as<V>(acc + u, n)), n);
      }
    });
  }
};

template <class E, bool Linear, bool Relu>
struct RnnGradCpu {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  static constexpr bool kCellState = false, kCarryH = false, kTwoStage = false;
  static constexpr int kSlots = 1, kTape = 0;
  static constexpr Segment kSegments[] = {{0, 1, 0, 0, false}};
  static constexpr int kPieces[][3] = {{0, 0, 1}};

  template <class M>
  static void finish(int, bool, const GradRow<E>& g, const T* acc, int64_t u0, int units, int64_t,
                     const M& masks) {
    each_vector<V>(units, [&](int u, auto n) {
      const int64_t at = u0 + u;
      V dh = incoming<E>(g, acc, at, u, n, masks), h;
      if constexpr (M::on) {
        const V old = zoned<Math>(dh, at, masks);
        if (masks.plan.zones_h()) store_as<V>(g.dh_out + at, old, n);
        // A drawn mask leaves h_t whole or sends its unit no gradient; an expectation mixes it.
        h = masks.plan.noise.mixes() ? load_as<V>(g.tape + at, n) : load_as<V>(g.h + at, n);
      } else {
        h = load_as<V>(g.h + at, n);
      }
      store_as<V>(g.dg + at, rnn_backward<Math, Relu>(h, dh), n);
    });
  }
  static void activate(int, const T* acc, const T*, T* tape, const typename E::IO*, T*, int64_t u0, int units,
                       int64_t) {
    each_vector<V>(units, [&](int u, auto n) {
      V a[1] = {load_as<V>(acc + u, n)};
      if constexpr (Relu)
        a[0] = Math::relu(a[0]);
      else
        Math::tanhs(a);
      store_as<V>(tape + u0 + u, a[0], n);
    });
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
