// The cells of csrc/cells bound to rows in memory: what happens to a tile of pre-activations.
// `finish` works on a few rows of one block: `units` units from u0 on, gates densely side by side in acc.
// Activations of two rows, and the tanh of the new cell apart from the gates, go side by side: one after the
// other, their latencies cost as much as a matmul of K = 64.
#pragma once
#include <type_traits>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "../cells/zoneout.h"
#include "math.h"
#include "noise.h"
#include "pack.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class E>
struct RowState {
  const typename E::IO* h_prev;
  const typename E::T* c_prev;
  typename E::IO* y;
  typename E::T* c;
  typename E::A* mid;     // operand of the second stage: o * tanh(c), or r * h
  typename E::A* shadow;  // y as the next step's operand, where the types differ
  typename E::T* tape;
  typename E::T* z;
};

// Calls f(u, n) over a block's units, a vector of n <= W at a time.
template <class V, class F>
FASTRNN_INLINE void each_vector(int units, F&& f) {
  int u = 0;
  for (; u + V::W <= units; u += V::W) f(u, V::W);
  if (u < units) f(u, units - u);
}

// The rows of a tile: acc and gx have `stride` elements a row; acc is scratch and may be overwritten.
template <class E>
struct TileRows {
  const RowState<E>* state;
  int rows;
  typename E::T* acc;
  const typename E::T* gx;
  int64_t stride, first_unit;
  int units;
  typename E::T* row(int r) const { return acc + r * stride; }
  const typename E::T* input(int r) const { return gx + r * stride; }
};

// Calls f.template operator()<Q>(row, column, u, n) for Q vectors at a time: the same units of Q rows, where
// registers allow it, so that their activations overlap.
constexpr int kSideBySide = kRegisters == 32 ? 2 : 1;
template <class E, class F>
FASTRNN_INLINE void each_rows(const TileRows<E>& t, F&& f) {
  each_vector<typename E::V>(t.units, [&](int u, int n) {
    int r = 0;
    for (; r + kSideBySide <= t.rows; r += kSideBySide)
      f(std::integral_constant<int, kSideBySide>{}, r, u, n);
    for (; r < t.rows; r++) f(std::integral_constant<int, 1>{}, r, u, n);
  });
}

// Writes h_t of row r; with noise, h is the new value, before zoneout.
template <class E, class Math, class M>
FASTRNN_INLINE void put_state(const TileRows<E>& tile, int r, int64_t at, typename E::V h, int n,
                              const M& masks) {
  using V = typename E::V;
  constexpr bool kShadow = !std::is_same<typename E::A, typename E::IO>::value;
  const RowState<E>& st = tile.state[r];
  if constexpr (M::on) {
    if (masks.plan.zones_h()) h = zoneout<Math>(masks.zoneout_h(r, at), h, load_as<V>(st.h_prev + at, n));
    store_as<V>(st.y + at, h, n);
    // From y as it was rounded, which is what the backward has.
    if (masks.plan.state())
      store_as<V>(st.shadow + at, load_as<V>(st.y + at, n) * masks.state(r, at), n);
    else if constexpr (kShadow)
      store_as<V>(st.shadow + at, h, n);
  } else {
    store_as<V>(st.y + at, h, n);
    if constexpr (kShadow) store_as<V>(st.shadow + at, h, n);
  }
}

// h_t of a tile that a projection has made.
template <class E, class Math, class M>
FASTRNN_INLINE void put_projected(const TileRows<E>& tile, const M& masks) {
  each_rows<E>(tile, [&](auto q, int r, int u, int n) {
    for (int i = 0; i < q; i++)
      put_state<E, Math>(tile, r + i, tile.first_unit + u, load_as<typename E::V>(tile.row(r + i) + u, n), n,
                         masks);
  });
}

template <class E, bool Linear>
struct LstmCpu {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  static constexpr bool kCellState = true, kApart = false;
  static constexpr int kSlots = 4, kStages = 1;

  template <class M>
  static void finish(int stage, bool projected, const TileRows<E>& tile, int64_t H, const M& masks) {
    const int64_t w = tile.units;
    if (stage == 1) return put_projected<E, Math>(tile, masks);
    each_rows<E>(tile, [&](auto q, int r, int u, int n) {
      constexpr int Q = decltype(q)::value;
      const int64_t at = tile.first_unit + u;
      V s[3 * Q], g[Q];
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const T* acc = tile.row(r + i) + u;
        s[3 * i] = load_as<V>(acc, n);
        s[3 * i + 1] = load_as<V>(acc + w, n);
        g[i] = load_as<V>(acc + 2 * w, n);
        s[3 * i + 2] = load_as<V>(acc + 3 * w, n);
      }
      Math::both(s, g);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const RowState<E>& st = tile.state[r + i];
        const V c_prev = load_as<V>(st.c_prev + at, n);
        V c;
        if constexpr (M::on) {
          c = lstm_cell<Math>(s[3 * i], s[3 * i + 1], g[i], c_prev, masks.update(r + i, at),
                              masks.cell(r + i, at));
          store_as<V>(tile.row(r + i) + 2 * w + u, c, n);  // h_t is made of the new cell
          if (masks.plan.zones_c()) c = zoneout<Math>(masks.zoneout_c(r + i, at), c, c_prev);
        } else {
          c = lstm_cell<Math>(s[3 * i], s[3 * i + 1], g[i], c_prev);
        }
        store_as<V>(st.c + at, c, n);
        store_as<V>(tile.row(r + i) + 3 * w + u, s[3 * i + 2], n);
        if (st.tape) {
          store_as<V>(st.tape + at, s[3 * i], n);
          store_as<V>(st.tape + H + at, s[3 * i + 1], n);
          store_as<V>(st.tape + 2 * H + at, g[i], n);
          store_as<V>(st.tape + 3 * H + at, s[3 * i + 2], n);
        }
      }
    });
    each_rows<E>(tile, [&](auto q, int r, int u, int n) {
      constexpr int Q = decltype(q)::value;
      const int64_t at = tile.first_unit + u;
      V c[Q];
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) c[i] =
          load_as<V>(M::on ? tile.row(r + i) + 2 * w + u : tile.state[r + i].c + at, n);
      Math::tanhs(c);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const RowState<E>& st = tile.state[r + i];
        V h = load_as<V>(tile.row(r + i) + 3 * w + u, n) * c[i];
        if (projected)
          store_as<V>(st.mid + at, h, n);
        else
          put_state<E, Math>(tile, r + i, at, h, n, masks);
      }
    });
  }
};

template <class E, bool Linear>
struct GruCpu {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  static constexpr bool kCellState = false, kApart = true;
  static constexpr int kSlots = 4, kStages = 1;

  template <class M>
  static void finish(int, bool, const TileRows<E>& tile, int64_t H, const M& masks) {
    const int64_t w = tile.units;
    each_rows<E>(tile, [&](auto q, int r, int u, int n) {
      constexpr int Q = decltype(q)::value;
      const int64_t at = tile.first_unit + u;
      V s[2 * Q], c[Q];
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const T *acc = tile.row(r + i) + u, *gx = tile.input(r + i) + u;
        s[2 * i] = load_as<V>(acc, n) + load_as<V>(gx, n);
        s[2 * i + 1] = load_as<V>(acc + w, n) + load_as<V>(gx + w, n);
      }
      Math::sigmoids(s);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        V un = load_as<V>(tile.row(r + i) + 2 * w + u, n);
        c[i] = gru_candidate<Math>(s[2 * i], un, load_as<V>(tile.input(r + i) + 2 * w + u, n));
      }
      Math::tanhs(c);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const RowState<E>& st = tile.state[r + i];
        const V h_prev = load_as<V>(st.h_prev + at, n);
        V h;
        if constexpr (M::on)
          h = gru_output<Math>(s[2 * i + 1], c[i], h_prev, masks.update(r + i, at));
        else
          h = gru_output<Math>(s[2 * i + 1], c[i], h_prev);
        put_state<E, Math>(tile, r + i, at, h, n, masks);
        if (st.tape) {
          store_as<V>(st.tape + at, s[2 * i], n);
          store_as<V>(st.tape + H + at, s[2 * i + 1], n);
          store_as<V>(st.tape + 2 * H + at, c[i], n);
          store_as<V>(st.tape + 3 * H + at, load_as<V>(tile.row(r + i) + 2 * w + u, n), n);
        }
      }
    });
  }
};

// Two stages: r and z first, then n from the matmul of r * h_{t-1}.
template <class E, bool Linear>
struct GruResetBeforeCpu {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  static constexpr bool kCellState = false, kApart = false;
  static constexpr int kSlots = 3, kStages = 2;

  template <class M>
  static void finish(int stage, bool, const TileRows<E>& tile, int64_t H, const M& masks) {
    const int64_t w = tile.units;
    each_rows<E>(tile, [&](auto q, int r, int u, int n) {
      const int64_t at = tile.first_unit + u;
      for (int i = 0; i < q; i++) {
        const RowState<E>& st = tile.state[r + i];
        const T* acc = tile.row(r + i) + u;
        V h = load_as<V>(st.h_prev + at, n);
        if (stage == 0) {
          V s[2] = {load_as<V>(acc, n), load_as<V>(acc + w, n)};
          Math::sigmoids(s);
          V h_in = h;
          if constexpr (M::on) h_in = h * masks.state_now(r + i, at);
          store_as<V>(st.mid + at, s[0] * h_in, n);
          store_as<V>(st.z + at, s[1], n);
          if (st.tape) {
            store_as<V>(st.tape + at, s[0], n);
            store_as<V>(st.tape + H + at, s[1], n);
          }
        } else {
          V c = Math::tanh(load_as<V>(acc, n));
          const V z = load_as<V>(st.z + at, n);
          V h_new;
          if constexpr (M::on)
            h_new = gru_output<Math>(z, c, h, masks.update(r + i, at));
          else
            h_new = gru_output<Math>(z, c, h);
          put_state<E, Math>(tile, r + i, at, h_new, n, masks);
          if (st.tape) store_as<V>(st.tape + 2 * H + at, c, n);
        }
      }
    });
  }
};

template <class E, bool Linear, bool Relu>
struct RnnCpu {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  static constexpr bool kCellState = false, kApart = false;
  static constexpr int kSlots = 0, kStages = 1;

  template <class M>
  static void finish(int, bool, const TileRows<E>& tile, int64_t, const M& masks) {
    each_rows<E>(tile, [&](auto q, int r, int u, int n) {
      constexpr int Q = decltype(q)::value;
      V h[Q];
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) h[i] = load_as<V>(tile.row(r + i) + u, n);
      if constexpr (Relu)
        for (V& x : h) x = Math::relu(x);
      else
        Math::tanhs(h);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int64_t at = tile.first_unit + u;
        if constexpr (M::on)
          if (tile.state[r + i].tape) store_as<V>(tile.state[r + i].tape + at, h[i], n);
        put_state<E, Math>(tile, r + i, at, h[i], n, masks);
      }
    });
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
