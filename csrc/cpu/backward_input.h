// The backward's dx: gate gradients of a chunk's rows times weight_ih.
#pragma once
#include "backward_state.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class E, class C>
class BackwardInput : protected BackwardState<E, C> {
 protected:
  using State = BackwardState<E, C>;
  using typename State::Direction;
  using typename State::Lane;
  using T = typename E::T;
  using IO = typename E::IO;
  using V = typename E::V;
  using State::args_, State::dir_, State::direct_, State::gates_, State::ih_, State::seq_;
  using State::State;

  // dx of the chunk's rows from their gate gradients dg, `stride` elements a row.
  void input_grad(int d, const Share& share, Lane& lane, const T* dg, int64_t stride) {
    const int64_t M = lane.list.rows;
    for (int64_t m = 0; m < M; m++) lane.a_rows[m] = dg + m * stride;
    if (direct_) return direct_input_grad(d, share, lane);
    if (!lane.panels) {
      return lane.division.run(
          true,
          [&](int id) { return ceil_div(M * (id + 1) / share.count - M * id / share.count, kInputRows); },
          [&](int id, int64_t i) {
            const int64_t m = M * id / share.count + i * kInputRows;
            input_columns(d, lane, ih_, dir_[d].w_ih, 0, m, imin(m + kInputRows, M * (id + 1) / share.count));
          });
    }
    // Wide weights are packed a few blocks at a time, by the thread whose columns of dx they make.
    const auto* w = static_cast<const IO*>(args_.weights[d].w_ih);
    const auto first = [&](int id) { return ih_.blocks * id / share.count; };
    lane.division.run(
        true, [&](int id) { return ceil_div(first(id + 1) - first(id), this->stream_); },
        [&](int id, int64_t i) {
          const int64_t b = first(id) + i * this->stream_, n = imin(this->stream_, first(id + 1) - b);
          const int64_t u0 = ih_.first(b);
          const Panels<E> part(1, imin(n * ih_.unit, args_.I - u0), kNarrow);
          pack_rows<E, IO>(part, w + u0, args_.I, gates_ * args_.H, lane.panels, 0, n);
          input_columns(d, lane, part, lane.panels, u0, 0, M);
        });
  }

  // Columns of dx from `column` on, which the panels p of w make, of rows [m0, m1).
  void input_columns(int d, Lane& lane, const Panels<E>& p, const T* w, int64_t column, int64_t m0,
                     int64_t m1) {
    const int64_t G = gates_ * args_.H, kRows = 16 * kMaxRows;
    for (int64_t from = m0; from < m1; from += kRows) {
      const int64_t to = imin(m1, from + kRows);
      const bool ahead = runs_ahead(p, 0, p.blocks, G, to - from);
      for (int64_t b = 0; b < p.blocks; b++) {
        const int nv = p.vectors(b), units = p.units(b);
        const int64_t cols = p.columns(b), u0 = column + p.first(b);
        // After the last panel the next rows meet the first one.
        const int64_t next = b + 1 < p.blocks ? b + 1 : 0;
        const Coming<E> coming{ahead ? w + p.stream(next, G) : nullptr, p.columns(next) * G, to - from};
        row_blocks(to - from, nv, [&](int64_t first, int r) {
          const int64_t m = from + first;
          multiply_tile<E>(coming, first, lane.a_rows + m, r, w + p.stream(b, G), G, nv, nullptr, 0,
                           lane.tile, cols);
          for (int q = 0; q < r; q++) put_input_grad(d, lane.dx[m + q], u0, lane.tile + q * cols, units);
        });
      }
    }
  }

  // The second direction's dx is kept in the compute type.
  static void put_input_grad(int d, void* dx, int64_t u0, const T* src, int64_t units) {
    if (d == 0)
      convert_row(static_cast<IO*>(dx) + u0, src, units);
    else
      convert_row(static_cast<T*>(dx) + u0, src, units);
  }

  void direct_input_grad(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const int64_t I = args_.I, M = lane.list.rows, G = gates_ * args_.H;
    const int64_t c0 = first_column(I, share.id, share.count);
    const int64_t c1 = first_column(I, share.id + 1, share.count);
    const auto* w = static_cast<const IO*>(args_.weights[d].w_ih);
    if constexpr (State::kCast) {
      direct_product<E>(lane.a_rows, M, w, I, G, c0, c1, dir.dx_row, I, false);
      for (int64_t m = 0; m < M; m++) put_input_grad(d, lane.dx[m], c0, dir.dx_row + m * I + c0, c1 - c0);
    } else {
      direct_product<E>(lane.a_rows, M, w, I, G, c0, c1, static_cast<T*>(lane.dx[0]),
                        d == 0 ? args_.dx.stride_n : I, false);
    }
  }

  void add_second_dx(int tid, int nt) {
    const int64_t I = args_.I, T0 = args_.T * tid / nt, T1 = args_.T * (tid + 1) / nt;
    for (int64_t t = T0; t < T1; t++)
      for (int64_t n = 0; n < seq_.count(t); n++) {
        if (!seq_.alive(t, n)) continue;
        IO* dst = seq_.template at<IO>(args_.dx, t, n);
        const T* src = dir_[1].dx + seq_.index(t, n) * I;
        each_vector<V>(static_cast<int>(I), [&](int u, auto w) {
          store_as<V>(dst + u, load_as<V>(dst + u, w) + load_as<V>(src + u, w), w);
        });
      }
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
