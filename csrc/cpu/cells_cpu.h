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
#include "weave.h"

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

// Calls f(u, n) over a block's units, a vector of n <= W at a time; n is a constant where the vector is whole.
template <class V, class F>
FASTRNN_INLINE void each_vector(int units, F&& f) {
  int u = 0;
  for (; u + V::W <= units; u += V::W) f(u, std::integral_constant<int, V::W>{});
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
  // Where what is at row(r) belongs: the row of the step, and its first unit.
  int index(int r) const { return r; }
  int64_t unit(int) const { return first_unit; }
};

// Several blocks of as many units each that one row met at once, in the place of rows, for cells with kPhases. A type of its own: indices
// that know of rows and of blocks cost rows 2 to 6%.
template <class E>
struct RowBlocks {
  const RowState<E>* state;
  int rows;
  typename E::T* acc;
  const typename E::T* gx;
  int64_t stride, input_stride, first_unit;
  int units;
  typename E::T* row(int b) const { return acc + b * stride; }
  const typename E::T* input(int b) const { return gx + b * input_stride; }
  int index(int) const { return 0; }
  int64_t unit(int b) const { return first_unit + b * units; }
};

// Calls f(Q, row) for Q of the rows at a time, so that their activations overlap.
template <int Most, class F>
FASTRNN_INLINE void groups_of(int rows, F&& f) {
  int r = 0;
  for (; r + Most <= rows; r += Most) f(std::integral_constant<int, Most>{}, r);
  if constexpr (Most > 1)
    for (; r < rows; r++) f(std::integral_constant<int, 1>{}, r);
}
// As many as the registers hold where a row has several.
constexpr int kSideBySide = kRegisters == 32 ? 2 : 1;
template <class F>
FASTRNN_INLINE void side_by_side(int rows, F&& f) {
  groups_of<kSideBySide>(rows, f);
}

// Calls f(Q, row, u, n) for Q vectors at a time: the same units of Q rows.
template <class E, class F>
FASTRNN_INLINE void each_rows(const TileRows<E>& t, F&& f) {
  each_vector<typename E::V>(
      t.units, [&](int u, auto n) { side_by_side(t.rows, [&](auto q, int r) { f(q, r, u, n); }); });
}
// Calls f(most, rows, u, n) for the same units of all rows, of which there are at most `most`: one, whose values then stay in
// registers from one activation to those that need it, or several, whose independent activations follow each other in a loop.
template <class E, class Tile, class F>
FASTRNN_INLINE void in_phases(const Tile& t, F&& f) {
  each_vector<typename E::V>(t.units, [&](int u, auto n) {
    if (t.rows == 1)
      f(std::integral_constant<int, 1>{}, 1, u, n);
    else
      f(std::integral_constant<int, kMaxRows>{}, t.rows, u, n);
  });
}

// Writes h_t of a row, the r-th that masks know of; with noise, h is the new value, before zoneout.
template <class E, class Math, class M>
FASTRNN_INLINE void put_state(const RowState<E>& st, int r, int64_t at, typename E::V h, int n,
                              const M& masks) {
  using V = typename E::V;
  constexpr bool kShadow = !std::is_same<typename E::A, typename E::IO>::value;
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

// finish() of a plain cell in parts, for a tile of whole vectors (weave.h): C::part<J>(tile, row, first of its units in the tile, H),
// and C::ask<J>(row, unit, H, writes) for what the next tile's will read and write.
template <class E, class C>
struct WovenTile {
  static constexpr int kParts = C::kParts;
  static constexpr bool weaves(int nv) { return nv == C::kWovenVectors; }
  TileRows<E> tile;
  int64_t H;
  const RowState<E>* next;
  int64_t next_rows, next_unit;
  bool writes;  // asks for what will be written
  Asks asks;
  int64_t pieces() const { return tile.rows * C::kWovenUnits; }
  template <int J>
  FASTRNN_ALWAYS_INLINE void part(int64_t piece) const {
    int64_t r = piece, u = 0;
    if constexpr (C::kWovenUnits > 1) {  // several vectors of units to a row
      r = piece / C::kWovenUnits;
      u = piece % C::kWovenUnits * E::W;
    }
    if (r < next_rows) C::template ask<J>(next[r], next_unit + u, H, writes);
    C::template part<J>(tile, r, u, H);
  }
};

// h_t of a tile that a projection has made.
template <class E, class Math, class M>
FASTRNN_INLINE void put_projected(const TileRows<E>& tile, const M& masks) {
  each_rows<E>(tile, [&](auto q, int r, int u, auto n) {
    for (int i = 0; i < q; i++)
      put_state<E, Math>(tile.state[r + i], r + i, tile.first_unit + u,
                         load_as<typename E::V>(tile.row(r + i) + u, n), n, masks);
  });
}

template <class E, bool Linear>
struct LstmCpu {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  static constexpr bool kCellState = true, kApart = false;
  static constexpr bool kPhases = true;
  static constexpr int kSlots = 4, kStages = 1;

  static constexpr int kParts = 5, kWovenVectors = 4, kWovenUnits = 1;
  // What a part hands to the next stays in the tile.
  template <int J>
  FASTRNN_INLINE void part(const TileRows<E>& tile, int64_t r, int64_t, int64_t H) {
    constexpr int W = V::W;
    T* const acc = tile.row(r);
    const RowState<E>& st = tile.state[r];
    const int64_t at = tile.first_unit;
    if constexpr (J < 4) {
      const V x = J == 2 ? Math::tanh(V::load(acc + J * W)) : Math::sigmoid(V::load(acc + J * W));
      if (st.tape) V::store(st.tape + J * H + at, x);
      V::store(acc + J * W, x);
      if constexpr (J == 3) {
        const V c_prev = load_as<V>(st.c_prev + at, W);
        const V c = lstm_cell<Math>(V::load(acc), V::load(acc + W), V::load(acc + 2 * W), c_prev);
        V::store(st.c + at, c);
        V::store(acc, c);
      }
    } else {
      put_state<E, Math>(st, 0, at, V::load(acc + 3 * W) * Math::tanh(V::load(acc)), W, Quiet{});
    }
  }
  template <int J>
  FASTRNN_INLINE void ask(const RowState<E>& st, int64_t at, int64_t H, bool writes) {
    if (J == 0 && writes) prefetch_write(st.y + at);
    if (J == 1 && writes) prefetch_write(st.c + at);
    if constexpr (J == 2) __builtin_prefetch(st.c_prev + at);
    if (J > 2 && writes && st.tape) {
      prefetch_write(st.tape + (J == 3 ? 0 : 2) * H + at);
      prefetch_write(st.tape + (J == 3 ? 1 : 3) * H + at);
    }
  }

  template <class Tile, class M>
  static void finish(int stage, bool projected, const Tile& tile, int64_t H, const M& masks) {
    const int64_t w = tile.units;
    if constexpr (std::is_same<Tile, TileRows<E>>::value)
      if (stage == 1) return put_projected<E, Math>(tile, masks);
    in_phases<E>(tile, [&](auto most, int rows, int u, auto n) {
      // Kept here as whole vectors: cells that are part of the output are cold lines, and what a masked store writes
      // there comes back only when the line is there.
      V h[most], o[most];
      // A row's four gates fill the registers: eight side by side would spill.
      for (int r = 0; r < rows; r++) {
        const T* acc = tile.row(r) + u;
        V s[3] = {load_as<V>(acc, n), load_as<V>(acc + w, n), load_as<V>(acc + 3 * w, n)};
        V g[1] = {load_as<V>(acc + 2 * w, n)};
        Math::both(s, g);
        const int k = tile.index(r);
        const int64_t at = tile.unit(r) + u;
        const RowState<E>& st = tile.state[k];
        const V c_prev = load_as<V>(st.c_prev + at, n);
        V c;
        if constexpr (M::on) {
          h[r] = c = lstm_cell<Math>(s[0], s[1], g[0], c_prev, masks.update(k, at), masks.cell(k, at));
          if (masks.plan.zones_c()) c = zoneout<Math>(masks.zoneout_c(k, at), c, c_prev);
        } else {
          h[r] = c = lstm_cell<Math>(s[0], s[1], g[0], c_prev);
        }
        store_as<V>(st.c + at, c, n);
        o[r] = s[2];
        if (st.tape) {
          store_as<V>(st.tape + at, s[0], n);
          store_as<V>(st.tape + H + at, s[1], n);
          store_as<V>(st.tape + 2 * H + at, g[0], n);
          store_as<V>(st.tape + 3 * H + at, s[2], n);
        }
      }
      side_by_side(rows, [&](auto q, int r) {
        constexpr int Q = decltype(q)::value;
        V c[Q];
        FASTRNN_UNROLL for (int i = 0; i < Q; i++) c[i] = h[r + i];
        Math::tanhs(c);
        FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
          const V out = o[r + i] * c[i];
          const int k = tile.index(r + i);
          const int64_t at = tile.unit(r + i) + u;
          if (projected)
            store_as<V>(tile.state[k].mid + at, out, n);
          else
            put_state<E, Math>(tile.state[k], k, at, out, n, masks);
        }
      });
    });
  }
};

template <class E, bool Linear>
struct GruCpu {
  using V = typename E::V;
  using T = typename E::T;
  using Math = Act<V, Linear>;
  static constexpr bool kCellState = false, kApart = true;
  static constexpr bool kPhases = true;
  static constexpr int kSlots = 4, kStages = 1;

  static constexpr int kParts = 3, kWovenVectors = 3, kWovenUnits = 1;
  template <int J>
  FASTRNN_INLINE void part(const TileRows<E>& tile, int64_t r, int64_t, int64_t H) {
    constexpr int W = V::W;
    T* const acc = tile.row(r);
    const T* const gx = tile.input(r);
    const RowState<E>& st = tile.state[r];
    const int64_t at = tile.first_unit;
    if constexpr (J < 2) {
      const V x = Math::sigmoid(V::load(acc + J * W) + V::load(gx + J * W));
      if (st.tape) V::store(st.tape + J * H + at, x);
      V::store(acc + J * W, x);
    } else {
      const V un = V::load(acc + 2 * W);
      const V n = Math::tanh(gru_candidate<Math>(V::load(acc), un, V::load(gx + 2 * W)));
      const V h = gru_output<Math>(V::load(acc + W), n, load_as<V>(st.h_prev + at, W));
      put_state<E, Math>(st, 0, at, h, W, Quiet{});
      if (st.tape) {
        V::store(st.tape + 2 * H + at, n);
        V::store(st.tape + 3 * H + at, un);
      }
    }
  }
  template <int J>
  FASTRNN_INLINE void ask(const RowState<E>& st, int64_t at, int64_t H, bool writes) {
    if (J == 0 && writes) prefetch_write(st.y + at);
    if constexpr (J == 0) __builtin_prefetch(st.h_prev + at);
    if (J > 0 && writes && st.tape) {
      prefetch_write(st.tape + (J == 1 ? 0 : 2) * H + at);
      prefetch_write(st.tape + (J == 1 ? 1 : 3) * H + at);
    }
  }

  template <class Tile, class M>
  static void finish(int, bool, const Tile& tile, int64_t H, const M& masks) {
    const int64_t w = tile.units;
    in_phases<E>(tile, [&](auto most, int rows, int u, auto n) {
      V z[most], c[most];
      side_by_side(rows, [&](auto q, int r) {
        constexpr int Q = decltype(q)::value;
        V s[2 * Q];
        FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
          const T *acc = tile.row(r + i) + u, *gx = tile.input(r + i) + u;
          s[2 * i] = load_as<V>(acc, n) + load_as<V>(gx, n);
          s[2 * i + 1] = load_as<V>(acc + w, n) + load_as<V>(gx + w, n);
        }
        Math::sigmoids(s);
        FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
          const V un = load_as<V>(tile.row(r + i) + 2 * w + u, n);
          c[r + i] = gru_candidate<Math>(s[2 * i], un, load_as<V>(tile.input(r + i) + 2 * w + u, n));
          z[r + i] = s[2 * i + 1];
          T* const tape = tile.state[tile.index(r + i)].tape;
          if (!tape) continue;
          const int64_t at = tile.unit(r + i) + u;
          store_as<V>(tape + at, s[2 * i], n);
          store_as<V>(tape + H + at, s[2 * i + 1], n);
          store_as<V>(tape + 3 * H + at, un, n);
        }
      });
      groups_of<2>(rows, [&](auto q, int r) {
        constexpr int Q = decltype(q)::value;
        V t[Q];
        FASTRNN_UNROLL for (int i = 0; i < Q; i++) t[i] = c[r + i];
        Math::tanhs(t);
        FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
          const int k = tile.index(r + i);
          const int64_t at = tile.unit(r + i) + u;
          const RowState<E>& st = tile.state[k];
          const V h_prev = load_as<V>(st.h_prev + at, n);
          V h;
          if constexpr (M::on)
            h = gru_output<Math>(z[r + i], t[i], h_prev, masks.update(k, at));
          else
            h = gru_output<Math>(z[r + i], t[i], h_prev);
          put_state<E, Math>(st, k, at, h, n, masks);
          if (st.tape) store_as<V>(st.tape + 2 * H + at, t[i], n);
        }
      });
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
  static constexpr bool kPhases = false;
  static constexpr int kSlots = 3, kStages = 2;

  static constexpr int kParts = 0;

  template <class M>
  static void finish(int stage, bool, const TileRows<E>& tile, int64_t H, const M& masks) {
    const int64_t w = tile.units;
    each_rows<E>(tile, [&](auto q, int r, int u, auto n) {
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
          put_state<E, Math>(st, r + i, at, h_new, n, masks);
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
  static constexpr bool kPhases = false;
  static constexpr int kSlots = 0, kStages = 1;

  static constexpr int kParts = 1, kWovenVectors = 4, kWovenUnits = 4;
  template <int J>
  FASTRNN_INLINE void part(const TileRows<E>& tile, int64_t r, int64_t u, int64_t) {
    const V x = V::load(tile.row(r) + u), h = Relu ? Math::relu(x) : Math::tanh(x);
    put_state<E, Math>(tile.state[r], 0, tile.first_unit + u, h, V::W, Quiet{});
  }
  template <int J>
  FASTRNN_INLINE void ask(const RowState<E>& st, int64_t at, int64_t, bool writes) {
    if (writes) prefetch_write(st.y + at);
  }

  template <class M>
  static void finish(int, bool, const TileRows<E>& tile, int64_t, const M& masks) {
    each_rows<E>(tile, [&](auto q, int r, int u, auto n) {
      constexpr int Q = decltype(q)::value;
      V h[Q];
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) h[i] = load_as<V>(tile.row(r + i) + u, n);
      if constexpr (Relu)
        for (V& x : h) x = Math::relu(x);
      else
        Math::tanhs(h);
      FASTRNN_UNROLL for (int i = 0; i < Q; i++) {
        const int64_t at = tile.first_unit + u;
        const RowState<E>& st = tile.state[r + i];
        if constexpr (M::on)
          if (st.tape) store_as<V>(st.tape + at, h[i], n);
        put_state<E, Math>(st, r + i, at, h[i], n, masks);
      }
    });
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
