// Forward of a layer-normalised layer: all steps, both directions, inside one team call.
//
// A step is the recurrent matmul, spread over threads as in forward.h, and then, row by row, the statistics, the
// gates and the cell: a row's terms are a few thousand values that stay in L1. Where threads divide the units
// they divide the rows of the second half, and meet once more a step.
#pragma once
#include "forward.h"
#include "norm_cells.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class E, class C>
class NormForward : Forward<E, C> {
  using Base = Forward<E, C>;
  using typename Base::Lane;
  using T = typename E::T;
  static_assert(std::is_same<T, typename E::IO>::value && std::is_same<T, typename E::A>::value,
                "rows are normalised in the tensors' own type");
  using Base::all_, Base::args_, Base::dir_, Base::lane_bytes_, Base::lanes_, Base::layout_, Base::noise_,
      Base::once_, Base::plan_, Base::seq_, Base::steps_, Base::time;

 public:
  static size_t workspace(const ForwardArgs& args) {
    Arena arena;
    NormForward f(args, arena);
    return arena.used;
  }
  static void run(const ForwardArgs& args) {
    Arena arena{static_cast<char*>(args.workspace), 0};
    NormForward f(args, arena);
    team(f.plan_.threads, [&](int tid, int nt) { f.work(tid, nt); });
  }

 private:
  struct Terms {  // of one direction
    T *x, *h;     // a chunk's input terms and a step's recurrent ones, width_ elements a row
    NormParams<E> params;
  };
  const Stage<E>& gates_;
  const int64_t width_;
  Terms terms_[2];
  T* scratch_;

  NormForward(const ForwardArgs& args, Arena& arena)
      : Base(args, arena), gates_(layout_.stage[0]), width_(gates_.panels.total()) {
    for (int d = 0; d < args.directions; d++) {
      T* bias = arena.take<T>(C::kBiases * args.H);
      if (arena.base) NormParams<E>::template fill_bias<C>(args.weights[d], args.H, bias);
      terms_[d] = {arena.take<T>(steps_ * args.N * width_), arena.take<T>(args.N * width_),
                   NormParams<E>(args.weights[d], bias)};
    }
    scratch_ = arena.take<T>(plan_.threads * scratch_size());
  }
  int64_t scratch_size() const { return align64(2 * args_.H); }

  void work(int tid, int nt) {
    if (!args_.packed) {
      for (int d = 0; d < args_.directions; d++)
        pack_direction<E>(args_, layout_, args_.weights[d], dir_[d].packed, tid, nt, !once_);
      all_.wait(nt);
    }
    Arena mine{lanes_.base + tid * lane_bytes_, 0};
    Lane lane(mine, *this);
    const Share share(args_.directions, tid, nt);
    for (int d = share.direction_first; d < share.direction_last; d++)
      direction(d, share, lane, scratch_ + tid * scratch_size());
  }

  void direction(int d, const Share& share, Lane& lane, T* scratch) {
    const bool split = plan_.units && share.count > 1;
    const int64_t N = args_.N;
    const int64_t i0 = share.first(N), i1 = share.last(N);
    const int64_t n0 = split ? 0 : i0, n1 = split ? N : i1;
    Base::begin_masks(d, n0, i0, i1, lane);
    Base::init_states(d, i0, i1, lane);
    Base::clear_frozen(d, i0, i1);
    lane.division.begin(dir_[d].claims, share, args_);
    if (split) dir_[d].barrier.wait(share.count);
    // Rows of a thread lie apart from those of others.
    T *x = terms_[d].x + steps_ * n0 * width_, *h = terms_[d].h + n0 * width_;
    for (int64_t s0 = 0; s0 < args_.T; s0 += steps_) {
      const int64_t steps = imin(steps_, args_.T - s0);
      lane.list.fill(seq_, steps, n0, n1, [&](int64_t i) { return time(d, s0 + i); });
      Base::input_rows(d, lane, s0, steps);
      const PanelRuns own = lane.division.own(gates_.panels, split);
      for (int64_t b = own.b0; b < own.b1; b++)
        panel<E>(lane.x_rows, lane.list.rows, Base::weights(d, gates_, true, b, lane), gates_.Kx,
                 gates_.panels.vectors(b), nullptr, 0, x + gates_.panels.offset(b), width_);
      Base::draw_masks(d, share, split, lane, s0, steps);
      for (int64_t i = 0; i < steps; i++)
        step(d, share, split, lane, s0 + i, lane.list.start[i], lane.list.count(i),
             x + lane.list.start[i] * width_, h, scratch);
    }
    Base::final_states(d, i0, i1);
  }

  // Step s of the lane's `count` rows from `first` on; x and h: their input terms, and room for the recurrent ones.
  void step(int d, const Share& share, bool split, Lane& lane, int64_t s, int64_t first, int64_t count,
            const T* x, T* h, T* scratch) {
    Base::gather(d, lane, s, first, count);
    const Panels<E>& p = gates_.panels;
    Base::sweep(d, gates_, split, s, count, lane,
                [&](int64_t b, int panels, int64_t, const T* w, int64_t m, int r, const Coming<E>& coming) {
                  T* out = h + m * width_ + p.offset(b);
                  if (panels == 1)
                    multiply_tile<E>(coming, m, lane.h_rows + m, r, w, gates_.Kh, p.vectors(b), nullptr, 0,
                                     out, width_);
                  else
                    multiply_panels<E>(panels, lane.h_rows + m, r, w, gates_.Kh, gates_.Kh, p.vectors(b),
                                       nullptr, 0, 0, out, width_, p.columns(b));
                });
    if (split) dir_[d].barrier.wait(share.count);
    const int64_t k0 = split ? share.first(count) : 0;
    const int64_t k1 = split ? share.last(count) : count;
    for (int64_t k = k0; k < k1; k++) {
      const NormTerms<E> terms(x + k * width_, h + k * width_, p, terms_[d].params);
      const RowState<E>& st = lane.states[k];
      if (noise_.on)
        C::row(terms, st, args_.projected, scratch, MaskRows<E>{noise_, lane.masks.rows + k});
      else
        C::row(terms, st, args_.projected, scratch, Quiet{});
      if (st.tape) {
        const int64_t values = p.gates * args_.H;
        std::memcpy(st.tape, terms.x, values * sizeof(T));
        std::memcpy(st.tape + values, terms.h, values * sizeof(T));
      }
    }
    if constexpr (C::kCellState)
      if (args_.projected) project(d, share, split, lane, s, count);
    if (split) dir_[d].barrier.wait(share.count);
  }

  void project(int d, const Share& share, bool split, Lane& lane, int64_t s, int64_t count) {
    if (split) dir_[d].barrier.wait(share.count);
    const Stage<E>& st = layout_.stage[1];
    const Panels<E>& p = st.panels;
    alignas(64) T out[kMaxRows * kMaxVectors * E::W];
    Base::sweep(
        d, st, split, s, count, lane,
        [&](int64_t b, int panels, int64_t, const T* w, int64_t m, int r, const Coming<E>& coming) {
          const int64_t cols = p.columns(b);
          if (panels == 1)
            multiply_tile<E>(coming, m, lane.mid_rows + m, r, w, st.Kh, p.vectors(b), nullptr, 0, out, cols);
          else
            multiply_panels<E>(panels, lane.mid_rows + m, r, w, st.Kh, st.Kh, p.vectors(b), nullptr, 0, 0,
                               out, cols, r * cols);
          for (int q = 0; q < panels; q++) {
            const TileRows<E> tile{lane.states + m, r, out + q * r * cols, nullptr, cols, p.first(b + q),
                                   p.units(b + q)};
            if (noise_.on)
              C::project(tile, MaskRows<E>{noise_, lane.masks.rows + m});
            else
              C::project(tile, Quiet{});
          }
        });
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
