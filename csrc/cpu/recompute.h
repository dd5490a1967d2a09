// Gates of a chunk's rows from inputs and previous states, which are all known when the backward runs: one
// matmul over many steps, in the order of k that the forward used, so the gates have the forward's bits.
#pragma once
#include "cells_cpu_backward.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Rows [m0, m1) of `tape` (C::kSlots * H wide). x_rows and h_rows hold the operands of each row, h_rows is overwritten
// for a second stage; `weights` is one direction packed for the forward; `scratch` holds two tiles.
template <class E, class C>
static void recompute_gates(const PackedLayout<E>& layout, Cell cell, const char* weights, int64_t H,
                            int64_t m0, int64_t m1, const typename E::T** x_rows,
                            const typename E::T** h_rows, const typename E::IO* const* h_prev,
                            typename E::T* tape, typename E::T* mid, typename E::T* scratch) {
  using T = typename E::T;
  T* gx = scratch + kMaxRows * kMaxVectors * E::W;
  const bool apart = cell == Cell::gru;  // n's recurrent term stays apart from its input term
  for (int j = 0; j < layout.stages && layout.stage[j].from_x; j++) {
    const Stage<E>& st = layout.stage[j];
    if (j == 1)
      for (int64_t m = m0; m < m1; m++) h_rows[m] = mid + m * H;
    const T* wx = reinterpret_cast<const T*>(weights + st.x);
    const T* wh = reinterpret_cast<const T*>(weights + st.h);
    const T* bias = reinterpret_cast<const T*>(weights + st.bias);
    const T* h_bias = reinterpret_cast<const T*>(weights + st.h_bias);
    for (int64_t b = 0; b < st.panels.blocks; b++) {
      const int nv = st.panels.vectors(b), units = st.panels.units(b);
      const int64_t cols = st.panels.columns(b), u0 = st.panels.first(b), o = st.panels.offset(b);
      row_blocks(m1 - m0, nv, [&](int64_t first, int r) {
        const int64_t m = m0 + first;
        auto fn = tile_for<E>(r, nv);
        fn(x_rows + m, wx + st.panels.stream(b, st.Kx), st.Kx, bias + o, 0, gx, cols);
        fn(h_rows + m, wh + st.panels.stream(b, st.Kh), st.Kh, apart ? h_bias + o : gx, apart ? 0 : cols,
           scratch, cols);
        for (int q = 0; q < r; q++)
          C::activate(j, scratch + q * cols, gx + q * cols, tape + (m + q) * C::kSlots * H, h_prev[m + q],
                      mid ? mid + (m + q) * H : nullptr, u0, units, H);
      });
    }
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
