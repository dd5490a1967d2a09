// The micro-step of csrc/cells/rhn.h bound to rows in memory, forward and backward.
// The drivers call these through pointers, once per tile, so that they are compiled once per number type.
#pragma once
#include "../cells/rhn.h"
#include "cells_cpu.h"
#include "rhn_tape.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class E>
static void scale_row(typename E::T* dst, const typename E::T* src, const typename E::T* by, int64_t width) {
  using V = typename E::V;
  each_vector<V>(static_cast<int>(width), [&](int u, auto n) {
    store_as<V>(dst + u, load_as<V>(src + u, n) * load_as<V>(by + u, n), n);
  });
}

// Thread tid's share of adding the rows of `src`, numbered as a tape's, to those of `dst`.
template <class E>
static void add_direction(const Sequence& seq, const Grid& dst, const typename E::T* src, int64_t width,
                          int tid, int nt) {
  using V = typename E::V;
  using T = typename E::T;
  const int64_t steps = seq.p->T;
  for (int64_t t = steps * tid / nt; t < steps * (tid + 1) / nt; t++)
    for (int64_t n = 0; n < seq.count(t); n++) {
      if (!seq.alive(t, n)) continue;
      T* to = seq.at<T>(dst, t, n);
      const T* from = src + seq.index(t, n) * width;
      each_vector<V>(static_cast<int>(width), [&](int u, auto w) {
        store_as<V>(to + u, load_as<V>(to + u, w) + load_as<V>(from + u, w), w);
      });
    }
}

template <class T>
struct RhnRow {
  const T* s;
  T* out;          // s of the next micro-step, or null
  int64_t number;  // in the tape
  const T* mask;   // first group's row, or null
  T* masked;       // first group's masked copy of out, or null
};

// Pre-activations of a few rows and one block of units: gate g of unit u of row r is
// acc[r * stride + g * gate_stride + u].
template <class T>
struct RhnTile {
  const RhnRow<T>* row;
  int rows;
  const T* acc;
  int64_t stride, gate_stride, first_unit;
  int units;
  int64_t H;
  int groups;              // masks, each group_stride after the one before
  int64_t group_stride;    // of masks
  int64_t masked_stride;   // of masked copies
  const RhnTape<T>& tape;  // without data: none
  bool stream;             // past the caches
};

template <class E, bool Coupled, bool Linear, int Q>
FASTRNN_INLINE void rhn_rows(const RhnTile<typename E::T>& t,
                             const typename RhnTape<typename E::T>::Place& tape, int r, int u, int n) {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  constexpr int S = Coupled ? 1 : 2;  // sigmoids a unit
  V gate[S * Q], h[Q];
  FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
    const T* acc = t.acc + (r + i) * t.stride + u;
    h[i] = load_as<V>(acc, n);
    FASTRNN_UNROLL for (int k = 0; k < S; k++) gate[S * i + k] = load_as<V>(acc + (k + 1) * t.gate_stride, n);
  }
  Math::both(gate, h);
  FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
    const RhnRow<T>& row = t.row[r + i];
    const int64_t at = t.first_unit + u;
    if (t.tape.data) {
      T* to = tape.first + row.number * tape.row;
      const auto put = [&](T* p, V a) {
        if (t.stream && tape.gate == kTapeGroup)
          stream_as<V>(p, a);
        else
          store_as<V>(p, a, n);
      };
      put(to, h[i]);
      FASTRNN_UNROLL for (int k = 0; k < S; k++) put(to + (k + 1) * tape.gate, gate[S * i + k]);
    }
    if (!row.out) continue;
    const V s = load_as<V>(row.s + at, n);
    V next;
    if constexpr (Coupled)
      next = rhn_state<Math>(h[i], gate[i], s);
    else
      next = rhn_state<Math>(h[i], gate[2 * i], gate[2 * i + 1], s);
    store_as<V>(row.out + at, next, n);
    if (!row.masked) continue;
    for (int p = 0; p < t.groups; p++)
      store_as<V>(row.masked + p * t.masked_stride + at,
                  next * load_as<V>(row.mask + p * t.group_stride + at, n), n);
  }
}

template <class E, bool Coupled, bool Linear>
static void rhn_finish(const RhnTile<typename E::T>& t) {
  static_assert(kTapeGroup % E::W == 0, "no vector crosses a group's end");
  each_vector<typename E::V>(t.units, [&](int u, auto n) {
    typename RhnTape<typename E::T>::Place tape{};
    if (t.tape.data) tape = t.tape.of(t.first_unit + u);
    side_by_side(t.rows,
                 [&](auto q, int r) { rhn_rows<E, Coupled, Linear, decltype(q)::value>(t, tape, r, u, n); });
  });
}

template <class T>
struct RhnStateRow {
  const T* first;  // s_0
  int64_t number;  // in the tape
  T* s;
  const T* mask;
  T* masked;
};

// States of all micro-steps from the first one's tape on: units [u0, u1) of s_0 .. s_{depth-1} and the masked copies.
template <class T>
struct RhnStates {
  const RhnStateRow<T>* row;
  int64_t rows;
  const RhnTape<const T>& tape;
  int64_t tape_stride, s_stride, masked_stride;  // from one micro-step to the next
  int64_t group_stride, masked_group_stride;     // from one group to the next
  int groups, depth;
  int64_t u0, u1;
};

template <class E, bool Coupled, bool Linear>
static void rhn_states(const RhnStates<typename E::T>& t) {
  using V = typename E::V;
  using Math = Act<V, Linear>;
  each_vector<V>(static_cast<int>(t.u1 - t.u0), [&](int u, auto n) {
    const int64_t at = t.u0 + u;
    typename RhnTape<const typename E::T>::Place place{};
    if (t.depth > 1) place = t.tape.of(at);
    for (int64_t i = 0; i < t.rows; i++) {
      const auto& row = t.row[i];
      V s = load_as<V>(row.first + at, n);
      for (int l = 0;; l++) {
        store_as<V>(row.s + l * t.s_stride + at, s, n);
        for (int p = 0; p < t.groups; p++)
          store_as<V>(row.masked + l * t.masked_stride + p * t.masked_group_stride + at,
                      s * load_as<V>(row.mask + p * t.group_stride + at, n), n);
        if (l + 1 == t.depth) break;
        const auto* tape = place.first + l * t.tape_stride + row.number * place.row;
        const V h = load_as<V>(tape, n), gate = load_as<V>(tape + place.gate, n);
        if constexpr (Coupled)
          s = rhn_state<Math>(h, gate, s);
        else
          s = rhn_state<Math>(h, gate, load_as<V>(tape + 2 * place.gate, n), s);
      }
    }
  });
}

template <class T>
struct RhnGradRow {
  const T* dy;     // gradient of y's row where this micro-step ends a time step, or null
  const T* ds_in;  // what reaches s beside dy and the matmul
  T* ds;           // carried on
  int64_t number;  // in the tape
  const T* s;      // before the micro-step
  T* dz;
  const T* mask;  // of the operand whose gradient the matmul is
};

// acc is the matmul of the later micro-step's dz; with a mask per gate, one such product for each of `groups`.
template <class T>
struct RhnGradTile {
  const RhnGradRow<T>* row;
  int rows;
  const T* acc;
  int64_t stride, part_stride, first_unit;
  int units;
  int64_t H;
  int groups;
  int64_t group_stride;
  const RhnTape<const T>& tape;
};

// Gradient of a state from the products: the mask of each stands between them.
template <class E>
FASTRNN_INLINE typename E::V rhn_incoming(const typename E::T* acc, int64_t part_stride,
                                          const typename E::T* mask, int groups, int64_t group_stride,
                                          int n) {
  using V = typename E::V;
  V sum = load_as<V>(acc, n);
  if (groups) sum = sum * load_as<V>(mask, n);
  for (int p = 1; p < groups; p++)
    sum = V::fma(load_as<V>(acc + p * part_stride, n), load_as<V>(mask + p * group_stride, n), sum);
  return sum;
}

template <class E, bool Coupled, bool Linear>
static void rhn_grad(const RhnGradTile<typename E::T>& t) {
  using V = typename E::V;
  using Math = Act<V, Linear>;
  each_vector<V>(t.units, [&](int u, auto n) {
    const int64_t at = t.first_unit + u;
    const auto place = t.tape.of(at);
    for (int r = 0; r < t.rows; r++) {
      const auto& row = t.row[r];
      const auto* tape = place.first + row.number * place.row;
      V ds = load_as<V>(row.ds_in + at, n) + rhn_incoming<E>(t.acc + r * t.stride + u, t.part_stride,
                                                             row.mask + at, t.groups, t.group_stride, n);
      if (row.dy) ds = ds + load_as<V>(row.dy + at, n);
      const V h = load_as<V>(tape, n), gate = load_as<V>(tape + place.gate, n);
      const V s = load_as<V>(row.s + at, n);
      RhnGrad<V> g;
      if constexpr (Coupled)
        g = rhn_backward<Math>(h, gate, s, ds);
      else
        g = rhn_backward<Math>(h, gate, load_as<V>(tape + 2 * place.gate, n), s, ds);
      store_as<V>(row.dz + at, g.h, n);
      store_as<V>(row.dz + t.H + at, g.t, n);
      if constexpr (!Coupled) store_as<V>(row.dz + 2 * t.H + at, g.c, n);
      store_as<V>(row.ds + at, g.s, n);
    }
  });
}

// The pointwise parts of one variant.
template <class E>
struct RhnCell {
  using T = typename E::T;
  void (*finish)(const RhnTile<T>&);
  void (*states)(const RhnStates<T>&);
  void (*grad)(const RhnGradTile<T>&);

  template <bool Coupled, bool Linear>
  static RhnCell make() {
    return {rhn_finish<E, Coupled, Linear>, rhn_states<E, Coupled, Linear>, rhn_grad<E, Coupled, Linear>};
  }
  static RhnCell of(int gates, bool linear) {
    if (gates == 2) return linear ? make<true, true>() : make<true, false>();
    return linear ? make<false, true>() : make<false, false>();
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
