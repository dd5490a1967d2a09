// Forward of one layer: all steps, both directions, inside one team call.
//
// The input term of about kChunkRows rows at a time goes through the same micro-kernel into a scratch
// that the recurrent steps read back while it is in cache: the pre-activations of a whole sequence
// never exist. A step is one or two stages (a matmul against packed weights plus the cell's pointwise
// part, from an L1-resident tile). Threads own blocks of units, with one barrier per stage, and take over
// from one another (claims.h), or rows of the batch, with none.
#pragma once
#include "cells_cpu.h"
#include "claims.h"
#include "norm.h"
#include "plan.h"
#include "sequence.h"
#include "team.h"
#include "weave.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int64_t kFarBytes = 8 << 20;  // inputs of so many bytes come from memory

template <class E, class C>
class Forward {
  using T = typename E::T;
  using IO = typename E::IO;
  using A = typename E::A;
  static constexpr bool kShadow = !std::is_same<A, IO>::value;  // operand differs from the tensor
  static constexpr int kTape = C::kSlots ? C::kSlots : 1;       // RNN: where noise mixes

 public:
  static size_t workspace(const ForwardArgs& args) {
    Arena arena;
    Forward f(args, arena);
    return arena.used;
  }
  static void run(const ForwardArgs& args) {
    Arena arena{static_cast<char*>(args.workspace), 0};
    Forward f(args, arena);
    team(f.plan_.threads, [&](int tid, int nt) { f.work(tid, nt); });
  }

 protected:
  // Where the asking for the next chunk's inputs has come to.
  struct InputsAhead {
    int64_t s = 0, row = 0, rows = 0, n0 = 0, width = 0;
    Lines left;
  };
  struct Lane {  // per thread
    RowList list;
    const A** x_rows;
    const A** h_rows;
    const A** mid_rows;
    RowState<E>* states;
    T* scratch;
    A* x_copy;
    MaskBits<E> masks;
    Division division;
    A* panel;  // the block of weights in use, where each is used once
    InputsAhead inputs;
    Lane(Arena& a, const Forward& f)
        : list(a, f.steps_, f.args_.N),
          x_rows(a.take<const A*>(f.steps_ * f.args_.N)),
          h_rows(a.take<const A*>(f.args_.N)),
          mid_rows(a.take<const A*>(f.args_.N)),
          states(a.take<RowState<E>>(f.args_.N)),
          scratch(f.plan_.units ? nullptr : a.take<T>(f.scratch_)),
          x_copy(kShadow ? a.take<A>(f.steps_ * f.args_.N * f.args_.I) : nullptr),
          masks(a, f.noise_, f.args_.N),
          panel(f.once_ ? a.take<A>(f.panel_elements()) : nullptr) {}
  };
  struct Direction {
    char* packed;
    T *c, *z;
    A *mid, *shadow;
    T* scratch;  // input terms of a chunk, where threads divide the units
    MaskRoom masks;
    Claim* claims;
    Barrier barrier;
  };

  const ForwardArgs& args_;
  const Plan plan_;
  const bool once_;  // every panel is used once: packed when its turn comes, by the thread that uses it
  const PackedLayout<E> layout_;
  const Sequence seq_;
  const int64_t steps_;  // per chunk
  const MaskPlan<T> noise_;
  const bool own_lines_;  // no cache line of a row belongs to two threads
  const bool far_;        // the inputs of a sequence are too many to stay in cache
  size_t scratch_ = 0;
  Arena lanes_;
  size_t lane_bytes_ = 0;
  char* zero_;
  Direction dir_[2];
  Barrier all_;

  Forward(const ForwardArgs& args, Arena& arena)
      : args_(args),
        plan_(choose_plan(args)),
        once_(args.T == 1 && !args.packed),
        layout_(args, !once_),
        seq_(args, arena),
        steps_(imin(args.T, imax(1, kChunkRows / args.N))),
        noise_(args, C::kStages == 2),
        own_lines_(!plan_.units || args.H * int64_t(sizeof(T)) % 64 == 0),
        far_(args.T * args.N * args.I * int64_t(sizeof(IO)) >= kFarBytes) {
    const int64_t NH = args.N * args.H, NO = args.N * args.O;
    zero_ = arena.take<char>(imax(args.H, args.O) * sizeof(double));
    if (arena.base) std::memset(zero_, 0, imax(args.H, args.O) * sizeof(double));
    for (int d = 0; d < args.directions; d++) {
      dir_[d].packed = args.packed ? static_cast<char*>(const_cast<void*>(args.packed)) + d * layout_.bytes
                                   : arena.take<char>(layout_.bytes);
      dir_[d].c = C::kCellState ? arena.take<T>(NH) : nullptr;
      dir_[d].z = C::kStages == 2 && !args.projected ? arena.take<T>(NH) : nullptr;
      dir_[d].mid = layout_.stages == 2 ? arena.take<A>(NH) : nullptr;
      dir_[d].shadow = kShadow || noise_.state() ? arena.take<A>(3 * NO) : nullptr;
    }
    // The team may come out smaller than asked for, so every thread could need all the units.
    for (int i = 0; i < layout_.stages && !kWholeRows<C>; i++)
      if (layout_.stage[i].from_x) scratch_ += steps_ * args.N * layout_.stage[i].panels.total();
    for (int d = 0; d < args.directions; d++) {
      dir_[d].scratch = plan_.units ? arena.take<T>(scratch_) : nullptr;
      dir_[d].masks = MaskRoom(arena, noise_, steps_ * args.N, args.N);
      dir_[d].claims = Division::room(arena, plan_.threads);
    }
    Arena sizing;
    Lane measure(sizing, *this);
    lane_bytes_ = sizing.used;
    lanes_ = {arena.take<char>(lane_bytes_ * plan_.threads), 0};
  }

  void work(int tid, int nt) {
    if (!args_.packed) {
      for (int d = 0; d < args_.directions; d++)
        pack_direction<E>(args_, layout_, args_.weights[d], dir_[d].packed, tid, nt, !once_);
      all_.wait(nt);
    }
    Arena mine{lanes_.base + tid * lane_bytes_, 0};
    Lane lane(mine, *this);
    const Share share(args_.directions, tid, nt);
    for (int d = share.direction_first; d < share.direction_last; d++) direction(d, share, lane);
  }

  int64_t time(int d, int64_t s) const { return d ? args_.T - 1 - s : s; }

  void direction(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const bool split_units = plan_.units && share.count > 1;
    const int64_t N = args_.N;
    const int64_t n0 = split_units ? 0 : share.first(N);
    const int64_t n1 = split_units ? N : share.last(N);
    // Initial states in compute type; rows split over the group either way.
    const int64_t i0 = share.first(N), i1 = share.last(N);
    lane.division.begin(dir.claims, share, args_);
    begin_masks(d, n0, i0, i1, lane);
    init_states(d, i0, i1, lane);
    clear_frozen(d, i0, i1);
    if (plan_.units) lane.scratch = dir.scratch;
    if (split_units) dir.barrier.wait(share.count);

    for (int64_t s0 = 0; s0 < args_.T; s0 += steps_) {
      const int64_t steps = imin(steps_, args_.T - s0);
      lane.list.fill(seq_, steps, n0, n1, [&](int64_t i) { return time(d, s0 + i); });
      input_term(d, share, split_units, lane, s0, steps);
      const int64_t coming = far_ ? imin(steps_, args_.T - s0 - steps) : 0;
      lane.inputs = {s0 + steps, 0, coming * (n1 - n0), n0, n1 - n0, {}};
      for (int64_t i = 0; i < steps; i++) step(d, share, split_units, lane, s0, i);
    }
    final_states(d, i0, i1);
  }

  void init_states(int d, int64_t i0, int64_t i1, const Lane& lane) {
    const int64_t H = args_.H, O = args_.O, N = args_.N;
    if constexpr (C::kCellState)
      convert_row(dir_[d].c + i0 * H, static_cast<const IO*>(args_.c0) + (d * N + i0) * H, (i1 - i0) * H);
    const IO* h0 = static_cast<const IO*>(args_.h0) + d * N * O;
    if (noise_.state())
      for (int64_t n = i0; n < i1; n++)
        lane.masks.mask_state(dir_[d].shadow + (2 * N + n) * O, h0 + n * O, lane.masks.first(n));
    else if constexpr (kShadow)
      convert_row(dir_[d].shadow + (2 * N + i0) * O, h0 + i0 * O, (i1 - i0) * O);
  }
  int64_t first_time(int d, int64_t n) const { return d && seq_.ragged() ? seq_.length(n) - 1 : time(d, 0); }

  // A thread's chunks begin with batch row n0; it draws the own masks of [i0, i1).
  void begin_masks(int d, int64_t n0, int64_t i0, int64_t i1, Lane& lane) const {
    lane.masks.begin(dir_[d].masks, steps_ * n0, d, i0, i1, [&](int64_t n) { return first_time(d, n); });
  }
  // Masks of a chunk: of all rows of a thread's own, or its share of the group's, which are complete at the next barrier.
  void draw_masks(int d, const Share& share, bool split, Lane& lane, int64_t s0, int64_t steps) const {
    const int64_t M = lane.list.rows;
    lane.masks.draw(lane.list, steps, split ? share.first(M) : 0, split ? share.last(M) : M, d,
                    [&](int64_t i) { return time(d, s0 + i); });
  }

  // Outputs past the ends of rows [i0, i1) are zero.
  void clear_frozen(int d, int64_t i0, int64_t i1) {
    if (!args_.lengths) return;
    for (int64_t n = i0; n < i1; n++)
      for (int64_t t = seq_.length(n); t < args_.T; t++) {
        std::memset(seq_.at<IO>(args_.y, t, n) + d * args_.O, 0, args_.O * sizeof(IO));
        if (args_.cells.data)
          std::memset(seq_.at<T>(args_.cells, t, n) + d * args_.H, 0, args_.H * sizeof(T));
      }
  }

  // The inputs of a chunk's rows as the micro-kernel takes them.
  void input_rows(int d, Lane& lane, int64_t s0, int64_t steps) {
    const int64_t I = args_.I;
    for (int64_t i = 0; i < steps; i++) {
      const int64_t t = time(d, s0 + i);
      for (int64_t m = lane.list.start[i]; m < lane.list.start[i + 1]; m++) {
        const IO* x = seq_.at<const IO>(args_.x, t, lane.list.n[m]);
        if constexpr (kShadow) {
          convert_row(lane.x_copy + m * I, x, I);
          lane.x_rows[m] = lane.x_copy + m * I;
        } else {
          lane.x_rows[m] = x;
        }
      }
    }
  }

  void input_term(int d, const Share& share, bool split_units, Lane& lane, int64_t s0, int64_t steps) {
    input_rows(d, lane, s0, steps);
    T* out = lane.scratch;
    const int64_t M = lane.list.rows;
    for (int j = 0; j < layout_.stages; j++) {
      const Stage<E>& st = layout_.stage[j];
      if (!st.from_x) continue;
      const T* bias = reinterpret_cast<const T*>(dir_[d].packed + st.bias);
      const PanelRuns own = lane.division.own(st.panels, split_units);
      const bool ahead = !once_ && runs_ahead(st.panels, own.b0, own.b1, st.Kx, M);
      lane.division.panels(
          st.panels, st.Kx, M, {split_units, split_units, false, true}, [&](int64_t b, int, int64_t next) {
            const A* w = weights(d, st, true, b, lane);
            const A* coming = ahead && next >= 0 ? weights(d, st, true, next, lane) : nullptr;
            panel_ahead<E>(lane.x_rows, M, w, st.Kx, st.panels.vectors(b), bias + st.panels.offset(b),
                           out + M * st.panels.offset(b), st.panels.columns(b), coming,
                           coming ? st.panels.columns(next) * st.Kx : 0);
          });
      out += M * st.panels.total();
      // Before the products the same drawing cost a GRU 3 to 6% of its forward: what the steps before have written is still on its way.
      if (j == 0) draw_masks(d, share, split_units, lane, s0, steps);
      if (split_units) dir_[d].barrier.wait(share.count);
    }
  }

  // Block b of a stage's input or recurrent matrix, as the micro-kernel reads it.
  const A* weights(int d, const Stage<E>& st, bool input, int64_t b, Lane& lane) const {
    const int64_t K = input ? st.Kx : st.Kh;
    if (!once_)
      return reinterpret_cast<const A*>(dir_[d].packed + (input ? st.x : st.h)) + st.panels.stream(b, K);
    pack_block<E, IO>(st.panels, stage_matrix(st, args_.weights[d], input), K, lane.panel, b);
    return lane.panel;
  }
  size_t panel_elements() const {
    size_t most = 0;
    for (int j = 0; j < layout_.stages; j++) {
      const int64_t K = imax(layout_.stage[j].Kx, layout_.stage[j].Kh) + E::kPair;
      most = imax(most, layout_.stage[j].panels.columns(0) * K);
    }
    return most;
  }

  void gather(int d, Lane& lane, int64_t s, int64_t first, int64_t count) {
    const Direction& dir = dir_[d];
    const int64_t t = time(d, s), before = time(d, s - 1), H = args_.H, O = args_.O, N = args_.N;
    for (int64_t i = 0; i < count; i++) {
      const int64_t n = lane.list.n[first + i];
      RowState<E>& st = lane.states[i];
      const bool begins = s == 0 || (d && seq_.ragged() && t == seq_.length(n) - 1);
      const bool reset = seq_.resets(t, n);
      st.h_prev = reset    ? reinterpret_cast<const IO*>(zero_)
                  : begins ? static_cast<const IO*>(args_.h0) + (d * N + n) * O
                           : seq_.at<const IO>(args_.y, before, n) + d * O;
      st.y = seq_.at<IO>(args_.y, t, n) + d * O;
      if (kShadow || noise_.state()) {
        lane.h_rows[i] = reset    ? reinterpret_cast<const A*>(zero_)
                         : begins ? dir.shadow + (2 * N + n) * O
                                  : dir.shadow + ((s - 1) % 2 * N + n) * O;
        st.shadow = dir.shadow + (s % 2 * N + n) * O;
      } else if constexpr (!kShadow) {
        lane.h_rows[i] = st.h_prev;
      }
      if (noise_.on) lane.masks.step(i, first + i);
      if constexpr (C::kCellState) {
        st.c = dir.c + n * H;
        st.c_prev = st.c;
        if (args_.cells.data) {
          if (!begins) st.c_prev = seq_.at<const T>(args_.cells, before, n) + d * H;
          st.c = seq_.at<T>(args_.cells, t, n) + d * H;
        }
        if (reset) st.c_prev = reinterpret_cast<const T*>(zero_);
      }
      st.mid = dir.mid ? dir.mid + n * H : nullptr;
      lane.mid_rows[i] = st.mid;
      st.z = dir.z ? dir.z + n * H : nullptr;
      st.tape = args_.gates ? static_cast<T*>(args_.gates) + (d * seq_.rows() + seq_.index(t, n)) * kTape * H
                            : nullptr;
    }
  }

  // Up to `most` lines of the next chunk's inputs: they come from far away where there are many.
  Lines next_inputs(int d, InputsAhead& ahead, int64_t most) const {
    if (!ahead.left.count) {
      if (ahead.row == ahead.rows) return {};
      const int64_t i = ahead.row / ahead.width, n = ahead.n0 + ahead.row % ahead.width;
      const IO* x = seq_.at<const IO>(args_.x, time(d, ahead.s + i), n);
      ahead.left = {reinterpret_cast<const char*>(x), ceil_div(args_.I * sizeof(IO), 64)};
      ahead.row++;
    }
    const Lines lines{ahead.left.at, imin(most, ahead.left.count)};
    ahead.left = {lines.at + lines.count * 64, ahead.left.count - lines.count};
    return lines;
  }

  // f(block, how many from it on, the next block or -1, their recurrent weights, first row, rows, what is coming) over this thread's
  // blocks of a stage at step s, tile by tile.
  template <class F>
  void sweep(int d, const Stage<E>& st, bool split, int64_t s, int64_t count, Lane& lane, F&& f) {
    const bool ahead = comes_far(st, split, count, lane);
    // Every other step walks the blocks backwards: what the last step left in cache comes first.
    lane.division.panels(st.panels, st.Kh, count, {split, split, s % 2 != 0, once_},
                         [&](int64_t b, int n, int64_t next) {
                           const A* w = weights(d, st, false, b, lane);
                           const A* coming = ahead && next >= 0 ? weights(d, st, false, next, lane) : nullptr;
                           row_blocks(count, st.panels.vectors(b), [&](int64_t m, int r) {
                             const int64_t elements = coming ? st.panels.columns(next) * st.Kh : 0;
                             f(b, n, next, w, m, r, Coming<E>{coming, elements, count});
                           });
                         });
  }
  // Whether a step of `count` rows asks for its weights ahead.
  bool comes_far(const Stage<E>& st, bool split, int64_t count, const Lane& lane) const {
    const PanelRuns own = lane.division.own(st.panels, split);
    return !once_ && asks_ahead(st.panels, own.b0, own.b1, st.Kh, count);
  }

  // Whether a stage's tiles are woven; `ahead`: its weights come from beyond L2, where a tape must be waited for to gain by it.
  bool weaves_steps(const Stage<E>& st, int64_t count, bool ahead) const {
    if constexpr (kWeaves<E> && C::kParts > 0) {
      constexpr int kMost = max_rows(C::kWovenVectors) * C::kWovenUnits * C::kParts;
      return count >= kWovenRows && st.Kh >= kWovenSteps * kMost && st.panels.unit == C::kWovenUnits * E::W &&
             !noise_.on && !args_.projected && !once_ && (!ahead || (args_.gates && own_lines_));
    }
    return false;
  }

  // The product of a tile with the pointwise part of the one before, where it can be woven in.
  void product_woven(int d, const Stage<E>& st, const A* w, const A* const* rows, const T* init,
                     int64_t init_stride, const TileRows<E>& tile, const Lines& near, const Coming<E>& coming,
                     int64_t m, Lane& lane, const TileRows<E>& before) {
    const int nv = static_cast<int>(tile.stride / E::W);
    if (before.rows && before.units == st.panels.unit) {
      WovenTile<E, C> work{before, args_.H, tile.state, tile.rows, tile.first_unit, own_lines_, {}};
      const Lines inputs = next_inputs(d, lane.inputs, work.pieces() * C::kParts / 2);
      work.asks = {share_of(coming, m, tile.rows), near, inputs};
      if (multiply_woven<E>(rows, tile.rows, w, st.Kh, nv, init, init_stride, tile.acc, tile.stride, work))
        return;
    }
    if (before.rows) C::finish(0, false, before, args_.H, Quiet{});
    multiply_tile<E>(coming, m, rows, tile.rows, w, st.Kh, nv, init, init_stride, tile.acc, tile.stride);
  }

  void step(int d, const Share& share, bool split_units, Lane& lane, int64_t s0, int64_t i) {
    const int64_t first = lane.list.start[i], count = lane.list.count(i);
    gather(d, lane, s0 + i, first, count);
    const T* term = lane.scratch;
    constexpr int kTile = kMaxRows * kMaxVectors * E::W;
    alignas(64) T tiles[2 * kTile];
    T* tile_out = tiles;
    TileRows<E> waiting{};  // a tile whose pointwise part comes with the next one's product
    for (int j = 0; j < layout_.stages; j++) {
      const Stage<E>& st = layout_.stage[j];
      const T* h_bias = reinterpret_cast<const T*>(dir_[d].packed + st.h_bias);
      const A* const* rows = j == 0 ? lane.h_rows : lane.mid_rows;
      const int64_t M = lane.list.rows;
      const bool weaves = weaves_steps(st, count, comes_far(st, split_units, count, lane));
      sweep(d, st, split_units, s0 + i, count, lane,
            [&](int64_t b, int panels, int64_t next, const A* w, int64_t m, int r, const Coming<E>& coming) {
              const int64_t cols = st.panels.columns(b);
              const T* gx = term + M * st.panels.offset(b) + (first + m) * cols;
              // The next block's products start from its input terms, which the scratch has lost from L1.
              Lines near;
              if (st.from_x && !C::kApart && next >= 0) {
                const int64_t wide = st.panels.columns(next);
                const T* at = term + M * st.panels.offset(next) + (first + m) * wide;
                near = {reinterpret_cast<const char*>(at), r * wide * int64_t(sizeof(T)) / 64};
              }
              const T* init = !st.from_x ? nullptr : C::kApart ? h_bias + st.panels.offset(b) : gx;
              const int64_t init_stride = C::kApart ? 0 : cols;
              if constexpr (kWeaves<E> && C::kParts > 0) {
                if (weaves) {
                  const TileRows<E> tile{lane.states + m,   r, tile_out, gx, cols, st.panels.first(b),
                                         st.panels.units(b)};
                  product_woven(d, st, w, rows + m, init, init_stride, tile, near, coming, m, lane, waiting);
                  waiting = tile;
                  tile_out = tile_out == tiles ? tiles + kTile : tiles;
                  return;
                }
              }
              for (int64_t l = 0; l < near.count; l++) __builtin_prefetch(near.at + l * 64);
              auto finish = [&](int64_t block, T* acc, const T* input) {
                const TileRows<E> rows_of{lane.states + m,       r, acc, input, cols, st.panels.first(block),
                                          st.panels.units(block)};
                if (noise_.on)
                  C::finish(j, args_.projected, rows_of, args_.H, MaskRows<E>{noise_, lane.masks.rows + m});
                else
                  C::finish(j, args_.projected, rows_of, args_.H, Quiet{});
              };
              if (panels == 1) {
                multiply_tile<E>(coming, m, rows + m, r, w, st.Kh, st.panels.vectors(b), init, init_stride,
                                 tile_out, cols);
                return finish(b, tile_out, gx);
              }
              multiply_panels<E>(panels, rows + m, r, w, st.Kh, st.Kh, st.panels.vectors(b), init,
                                 init_stride, C::kApart ? cols : M * cols, tile_out, cols, r * cols);
              if constexpr (C::kPhases) {
                const int units = st.panels.units(b);
                if (r == 1 && !noise_.on && !args_.projected && st.panels.units(b + panels - 1) == units) {
                  const RowBlocks<E> blocks{lane.states + m,    panels, tile_out, gx, cols, M * cols,
                                            st.panels.first(b), units};
                  return C::finish(j, false, blocks, args_.H, Quiet{});
                }
              }
              for (int p = 0; p < panels; p++) finish(b + p, tile_out + p * r * cols, gx + p * M * cols);
            });
      if (waiting.rows) C::finish(j, false, waiting, args_.H, Quiet{});
      if (st.from_x) term += M * st.panels.total();
      if (split_units) dir_[d].barrier.wait(share.count);
    }
  }

  void final_states(int d, int64_t i0, int64_t i1) {
    const int64_t H = args_.H, O = args_.O, N = args_.N;
    for (int64_t n = i0; n < i1; n++) {
      const int64_t t = d ? 0 : seq_.length(n) - 1;
      std::memcpy(static_cast<IO*>(args_.h_n) + (d * N + n) * O, seq_.at<const IO>(args_.y, t, n) + d * O,
                  O * sizeof(IO));
      if constexpr (C::kCellState) {
        const T* c = args_.cells.data ? seq_.at<const T>(args_.cells, t, n) + d * H : dir_[d].c + n * H;
        convert_row(static_cast<IO*>(args_.c_n) + (d * N + n) * H, c, H);
      }
    }
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
