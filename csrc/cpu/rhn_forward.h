// Forward of one Recurrent Highway layer: all micro-steps of all steps, both directions, inside one team call.
//
// As forward.h: the input term of a chunk of steps goes first, into a scratch; a micro-step is a matmul against
// packed weights plus the pointwise part on an L1-resident tile. Threads own blocks of units (a barrier after
// each micro-step) or rows of the batch (none). Intermediate states live in two buffers that take turns.
#pragma once
#include "ahead.h"
#include "claims.h"
#include "rhn_cells.h"
#include "rhn_pack.h"
#include "sequence.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int kMaxParts = 3;

template <class E>
class RhnForward {
  using T = typename E::T;
  static_assert(std::is_same<typename E::A, T>::value && std::is_same<typename E::IO, T>::value,
                "tensors are of the compute type");

 public:
  static size_t workspace(const RhnForwardArgs& args) {
    Arena arena;
    RhnForward f(args, arena);
    return arena.used;
  }
  static void run(const RhnForwardArgs& args) {
    Arena arena{static_cast<char*>(args.workspace), 0};
    RhnForward f(args, arena);
    team(f.plan_.threads, [&](int tid, int nt) { f.work(tid, nt); });
  }

 private:
  struct Lane {  // per thread
    RowList list;
    const T** x_rows;  // per group of x's masks
    const T** u_rows;  // operands of the matmul, per group of the state's masks
    RhnRow<T>* rows;
    T* scratch;
    T* x_copy;
    Division division;
    Lane(Arena& a, const RhnForward& f)
        : list(a, f.steps_, f.args_.N),
          x_rows(a.take<const T*>(f.x_parts_ * f.steps_ * f.args_.N)),
          u_rows(a.take<const T*>(f.u_parts_ * f.args_.N)),
          rows(a.take<RhnRow<T>>(f.args_.N)),
          scratch(f.plan_.units ? nullptr : a.take<T>(f.scratch_size())),
          x_copy(a.take<T>(f.args_.x_groups * f.steps_ * f.args_.N * f.args_.I)) {}
  };
  struct Direction {
    char* packed;
    T* s;        // two buffers (N, H)
    T* u;        // masked states: two buffers (groups, N, H)
    T* u_first;  // masked initial states (groups, N, H)
    T* scratch;  // input terms of a chunk, where threads divide the units
    Claim* claims;
    Barrier barrier;
  };

  const RhnForwardArgs& args_;
  const Plan plan_;
  const RhnLayout<E> layout_;
  const RhnCell<E> cell_;
  const Sequence seq_;
  const int64_t steps_;  // per chunk
  const int x_parts_, u_parts_;
  const RhnTapes<T> tapes_;
  T* zero_;
  Direction dir_[2];
  Arena lanes_;
  size_t lane_bytes_ = 0;
  Barrier all_;

  RhnForward(const RhnForwardArgs& args, Arena& arena)
      : args_(args),
        plan_(rhn_plan(args)),
        layout_(args),
        cell_(RhnCell<E>::of(args.gates, args.linear)),
        seq_(args, arena),
        steps_(imin(args.T, imax(1, kChunkRows / args.N))),
        x_parts_(args.x_groups ? args.x_groups : 1),
        u_parts_(args.s_groups ? args.s_groups : 1),
        tapes_(args, seq_) {
    const int64_t NH = args.N * args.H;
    zero_ = arena.take<T>(args.H);
    if (arena.base) std::memset(zero_, 0, args.H * sizeof(T));
    for (int d = 0; d < args.directions; d++) {
      dir_[d].packed = args.packed ? static_cast<char*>(const_cast<void*>(args.packed)) + d * layout_.bytes
                                   : arena.take<char>(layout_.bytes);
      dir_[d].s = arena.take<T>(2 * NH);
      dir_[d].u = arena.take<T>(2 * args.s_groups * NH);
      dir_[d].u_first = arena.take<T>(args.s_groups * NH);
      dir_[d].scratch = plan_.units ? arena.take<T>(scratch_size()) : nullptr;
      dir_[d].claims = Division::room(arena, plan_.threads);
    }
    Arena sizing;
    Lane measure(sizing, *this);
    lane_bytes_ = sizing.used;
    lanes_ = {arena.take<char>(lane_bytes_ * plan_.threads), 0};
  }

  int64_t scratch_size() const { return steps_ * args_.N * layout_.parts * layout_.panels.total(); }

  void work(int tid, int nt) {
    if (!args_.packed) {
      for (int d = 0; d < args_.directions; d++)
        pack_rhn<E>(layout_, args_.weights[d], dir_[d].packed, tid, nt);
      all_.wait(nt);
    }
    Arena mine{lanes_.base + tid * lane_bytes_, 0};
    Lane lane(mine, *this);
    const Share share(args_.directions, tid, nt);
    for (int d = share.direction_first; d < share.direction_last; d++) direction(d, share, lane);
    end_streams();
  }

  int64_t time(int d, int64_t s) const { return d ? args_.T - 1 - s : s; }
  const T* weights(int d, size_t at) const { return reinterpret_cast<const T*>(dir_[d].packed + at); }

  void direction(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const bool split_units = plan_.units && share.count > 1;
    const int64_t N = args_.N, H = args_.H;
    const int64_t i0 = share.first(N), i1 = share.last(N);
    const int64_t n0 = split_units ? 0 : i0, n1 = split_units ? N : i1;
    for (int p = 0; p < args_.s_groups; p++)
      for (int64_t n = i0; n < i1; n++)
        scale_row<E>(dir.u_first + (p * N + n) * H, static_cast<const T*>(args_.h0) + (d * N + n) * H,
                     mask_row(args_.s_mask, args_.s_groups, H, d, p, n), H);
    clear_frozen(d, i0, i1);
    if (plan_.units) lane.scratch = dir.scratch;
    lane.division.begin(dir.claims, share, args_);
    if (split_units) dir.barrier.wait(share.count);

    for (int64_t s0 = 0; s0 < args_.T; s0 += steps_) {
      const int64_t steps = imin(steps_, args_.T - s0);
      lane.list.fill(seq_, steps, n0, n1, [&](int64_t i) { return time(d, s0 + i); });
      input_term(d, share, split_units, lane, s0, steps);
      for (int64_t i = 0; i < steps; i++) step(d, share, split_units, lane, s0, i);
    }
    for (int64_t n = i0; n < i1; n++) {
      const int64_t t = d ? 0 : seq_.length(n) - 1;
      std::memcpy(static_cast<T*>(args_.h_n) + (d * N + n) * H, seq_.at<const T>(args_.y, t, n) + d * H,
                  H * sizeof(T));
    }
  }

  const T* mask_row(const void* mask, int groups, int64_t width, int d, int p, int64_t n) const {
    return static_cast<const T*>(mask) + ((int64_t(d) * groups + p) * args_.N + n) * width;
  }

  // Outputs past the ends of rows [i0, i1) are zero.
  void clear_frozen(int d, int64_t i0, int64_t i1) {
    if (!args_.lengths) return;
    for (int64_t n = i0; n < i1; n++)
      for (int64_t t = seq_.length(n); t < args_.T; t++)
        std::memset(seq_.at<T>(args_.y, t, n) + d * args_.H, 0, args_.H * sizeof(T));
  }

  // Into lane.scratch: for each part and block, (rows, columns).
  void input_term(int d, const Share& share, bool split_units, Lane& lane, int64_t s0, int64_t steps) {
    const int64_t I = args_.I, M = lane.list.rows, stride = steps_ * args_.N;
    for (int64_t i = 0; i < steps; i++)
      for (int64_t m = lane.list.start[i]; m < lane.list.start[i + 1]; m++) {
        const int64_t n = lane.list.n[m];
        const T* x = seq_.at<const T>(args_.x, time(d, s0 + i), n);
        for (int p = 0; p < x_parts_; p++) {
          T* copy = lane.x_copy + (p * stride + m) * I;
          if (args_.x_groups) scale_row<E>(copy, x, mask_row(args_.x_mask, args_.x_groups, I, d, p, n), I);
          lane.x_rows[p * stride + m] = args_.x_groups ? copy : x;
        }
      }
    const Panels<E>& panels = layout_.panels;
    const PanelRuns own = lane.division.own(panels, split_units);
    const bool ahead = runs_ahead(panels, own.b0, own.b1, I, M);
    for (int part = 0; part < layout_.parts; part++) {
      const T *w = weights(d, layout_.x(part)), *bias = weights(d, layout_.bias(0, part));
      T* out = lane.scratch + part * M * panels.total();
      lane.division.panels(
          panels, I, M, {split_units, split_units, false, true}, [&](int64_t b, int, int64_t next) {
            const T* coming = ahead && next >= 0 ? w + panels.stream(next, I) : nullptr;
            panel_ahead<E>(lane.x_rows + (x_parts_ > 1 ? part : 0) * stride, M, w + panels.stream(b, I), I,
                           panels.vectors(b), bias + panels.offset(b), out + M * panels.offset(b),
                           panels.columns(b), coming, coming ? panels.columns(next) * I : 0);
          });
      if (split_units) dir_[d].barrier.wait(share.count);
    }
  }

  // Rows and operands of micro-step l of step s.
  void gather(int d, Lane& lane, int64_t s, int l, int64_t first, int64_t count) {
    const Direction& dir = dir_[d];
    const int64_t t = time(d, s), before = time(d, s - 1), H = args_.H, N = args_.N, NH = N * H;
    const int64_t turn = s * args_.depth + l;
    const T* masked = dir.u + turn % 2 * args_.s_groups * NH;
    T* masks_next = dir.u + (turn + 1) % 2 * args_.s_groups * NH;
    for (int64_t i = 0; i < count; i++) {
      const int64_t n = lane.list.n[first + i];
      RhnRow<T>& row = lane.rows[i];
      const bool reset = l == 0 && seq_.resets(t, n);
      const bool begins = l == 0 && (s == 0 || (d && seq_.ragged() && t == seq_.length(n) - 1));
      row.s = reset    ? zero_
              : begins ? static_cast<const T*>(args_.h0) + (d * N + n) * H
              : l == 0 ? seq_.at<const T>(args_.y, before, n) + d * H
                       : dir.s + l % 2 * NH + n * H;
      row.out = l + 1 == args_.depth ? seq_.at<T>(args_.y, t, n) + d * H : dir.s + (l + 1) % 2 * NH + n * H;
      row.number = n;
      row.mask = row.masked = nullptr;
      lane.u_rows[i] = row.s;
      if (!args_.s_groups) continue;
      row.mask = mask_row(args_.s_mask, args_.s_groups, H, d, 0, n);
      row.masked = masks_next + n * H;
      for (int p = 0; p < args_.s_groups; p++)
        lane.u_rows[p * N + i] = reset ? zero_ : (begins ? dir.u_first : masked) + p * NH + n * H;
    }
  }

  void step(int d, const Share& share, bool split_units, Lane& lane, int64_t s0, int64_t i) {
    const Panels<E>& panels = layout_.panels;
    const int64_t first = lane.list.start[i], count = lane.list.count(i), H = args_.H, N = args_.N;
    const PanelRuns own = lane.division.own(panels, split_units);
    const int64_t M = lane.list.rows;
    const int64_t columns =
        own.b1 > own.b0 ? panels.offset(own.b1 - 1) + panels.columns(own.b1 - 1) - panels.offset(own.b0) : 0;
    const bool ahead = asks_ahead(args_.depth * layout_.parts * columns * H * int64_t(sizeof(T)), count);
    constexpr int64_t kTile = kMaxRows * kMaxVectors * E::W;
    alignas(64) T tile_out[kMaxParts * kTile];
    for (int l = 0; l < args_.depth; l++) {
      gather(d, lane, s0 + i, l, first, count);
      const RhnTape<T> tape = tapes_.at(args_.tape, d, l, time(d, s0 + i));
      const bool stream = tapes_.template streams<typename E::V>(tape);
      lane.division.panels(
          panels, layout_.parts * H, count, {split_units, split_units},
          [&](int64_t b, int run, int64_t after) {
            // The panel after these; after the last, the next micro-step's first.
            const int64_t next = after < 0 ? own.b0 : after;
            const int next_l = (l + (after < 0)) % args_.depth;
            const int64_t cols = panels.columns(b);
            const int nv = panels.vectors(b);
            row_blocks(count, nv, [&](int64_t m, int r) {
              for (int part = 0; part < layout_.parts; part++) {
                const T* init =
                    l ? weights(d, layout_.bias(l, part)) + panels.offset(b)
                      : lane.scratch + M * (part * panels.total() + panels.offset(b)) + (first + m) * cols;
                const T* const* operand = lane.u_rows + (u_parts_ > 1 ? part : 0) * N + m;
                const T* w = weights(d, layout_.h(l, part)) + panels.stream(b, H);
                const T* coming = weights(d, layout_.h(next_l, part)) + panels.stream(next, H);
                T* out = tile_out + part * kTile;
                if (ahead)
                  multiply_ahead<E>(operand, r, w, H, nv, init, l ? 0 : cols, out, cols, coming,
                                    panels.columns(next) * H, m, count);
                else
                  multiply_panels<E>(run, operand, r, w, H, H, nv, init, l ? 0 : cols, l ? cols : M * cols,
                                     out, cols, r * cols);
              }
              for (int q = 0; q < run; q++)
                cell_.finish({lane.rows + m, r, tile_out + q * r * cols, cols,
                              layout_.parts > 1 ? kTile : panels.units(b + q), panels.first(b + q),
                              panels.units(b + q), H, args_.s_groups, N * H, N * H, tape, stream});
            });
          });
      if (split_units) dir_[d].barrier.wait(share.count);
    }
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
