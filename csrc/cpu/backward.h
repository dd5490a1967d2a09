// Backward of one layer: all steps, both directions, all gradients, inside one team call.
//
// Steps are taken in chunks of about kGradRows rows. A chunk's gate gradients live in one buffer that stays in
// cache; when the recurrent part of the chunk is done they meet the weights (dx) and the inputs and
// previous states (weight gradients). The tape is only read, so a graph can be walked twice.
// Without a tape the chunk's gates are recomputed from x and y, which are all known: one matmul.
#pragma once
#include "cells_cpu_backward.h"
#include "plan.h"
#include "recompute.h"
#include "sequence.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int64_t kGradRows = 512;

template <class E, class C>
class Backward {
  using T = typename E::T;
  using IO = typename E::IO;
  using V = typename E::V;
  static_assert(std::is_same<typename E::A, T>::value, "gradients are computed in the compute type");
  static constexpr bool kCast = !std::is_same<IO, T>::value;

 public:
  static size_t workspace(const BackwardArgs& args) {
    Arena arena;
    Backward b(args, arena);
    return arena.used;
  }
  static void run(const BackwardArgs& args) {
    Arena arena{static_cast<char*>(args.workspace), 0};
    Backward b(args, arena);
    team(b.plan_.threads, [&](int tid, int nt) { b.work(tid, nt); });
  }

 private:
  static constexpr int kMaxSegments = 4;
  static constexpr int kTape = C::kTape ? C::kTape : 1;  // RNN: where noise mixes
  struct Lane {                                          // per thread
    RowList list;
    const T** next;  // gate gradients of each batch row's next step, or zeros
    const T** a_rows;
    const T** b_rows;
    GradRow<E>* rows;
    T* tile;
    const IO** x;  // per row of the chunk
    const IO** h_prev;
    const IO** h_in;  // what the recurrent matmul took: h_prev, or its masked copy
    void** dx;
    MaskBits<E> masks;
    UnitRange units;
    Lane(Arena& a, const Backward& b)
        : list(a, b.steps_, b.args_.N),
          next(a.take<const T*>(b.args_.N)),
          a_rows(a.take<const T*>(b.steps_ * b.args_.N)),
          b_rows(a.take<const T*>(b.steps_ * b.args_.N)),
          rows(a.take<GradRow<E>>(b.args_.N)),
          tile(a.take<T>(2 * kMaxRows * kMaxVectors * E::W)),
          x(a.take<const IO*>(b.steps_ * b.args_.N)),
          h_prev(a.take<const IO*>(b.steps_ * b.args_.N)),
          h_in(b.noise_.state() ? a.take<const IO*>(b.steps_ * b.args_.N) : h_prev),
          dx(a.take<void*>(b.steps_ * b.args_.N)),
          masks(a, b.noise_, b.args_.N) {}
  };
  struct Direction {
    char* gates = nullptr;  // forward packing, only to recompute
    T *w_hh = nullptr, *w_ih = nullptr, *w_hr = nullptr;
    T *dg, *carry, *c0 = nullptr, *dc = nullptr, *dh, *dh_rows = nullptr, *mid = nullptr;
    T *x_cast = nullptr, *h_cast = nullptr, *dx = nullptr;
    IO* h_in = nullptr;
    T *d_ih = nullptr, *d_hh = nullptr, *d_hr = nullptr, *sums = nullptr;
    T *outer = nullptr, *operand[3] = {};
    Barrier barrier;
  };

  const BackwardArgs& args_;
  const Plan plan_;
  const PackedLayout<E> layout_;
  const Sequence seq_;
  const int gates_;
  const int64_t steps_;
  const MaskPlan<T> noise_;
  const bool recompute_;
  const bool carry_h_;  // h_{t-1} has gradients beside the matmul's
  Panels<E> hh_, ih_, hr_;
  char* zero_;
  Direction dir_[2];
  Arena lanes_;
  size_t lane_bytes_ = 0;
  Barrier all_;

  Backward(const BackwardArgs& args, Arena& arena)
      : args_(args),
        plan_(choose_plan(args)),
        layout_(args),
        seq_(args, arena),
        gates_(gate_count(args.cell)),
        steps_(imin(args.T, imax(1, kGradRows / args.N))),
        noise_(args, C::kTwoStage),
        recompute_(!args.gates && (C::kTape > 0 || args.noise.mixes())),
        carry_h_(C::kCarryH || noise_.zones_h()),
        hh_(1, args.O, block_vectors(args.O)),
        ih_(1, args.I),
        hr_(1, args.H, block_vectors(args.H)) {
    const int64_t N = args.N, H = args.H, O = args.O, I = args.I;
    const int64_t M = steps_ * N, G = gates_ * H, S = C::kSlots * H;
    // Pointers are null while sizes are added up: conditions below must not test them.
    const bool has_mid = args.projected || C::kTwoStage;
    const size_t zeros = imax(S, O) * sizeof(T);
    zero_ = arena.take<char>(zeros);
    if (arena.base) std::memset(zero_, 0, zeros);
    for (int d = 0; d < args.directions; d++) {
      Direction& r = dir_[d];
      if (recompute_) r.gates = arena.take<char>(layout_.bytes);
      r.w_hh = arena.take<T>(hh_.elements(G));
      if (args.dx.data) r.w_ih = arena.take<T>(ih_.elements(G));
      if (args.projected) r.w_hr = arena.take<T>(hr_.elements(O));
      r.dg = arena.take<T>(M * S);
      r.carry = arena.take<T>(N * S);
      r.dh = arena.take<T>(N * O);
      if (C::kCellState) r.dc = arena.take<T>(N * H);
      if (C::kCellState && kCast) r.c0 = arena.take<T>(N * H);
      if (noise_.state()) r.h_in = arena.take<IO>(M * O);
      if (args.projected) r.dh_rows = arena.take<T>(M * O);
      if (has_mid) r.mid = arena.take<T>(M * H);
      if (kCast && recompute_) {
        r.x_cast = arena.take<T>(M * I);
        r.h_cast = arena.take<T>(M * O);
      }
      // The second direction's dx is added when both are complete; a 16-bit dx is accumulated in T.
      if (args.dx.data && d == 1) r.dx = arena.take<T>(args.T * N * I);
      if (args.want_weights) {
        r.sums = arena.take<T>(S);
        r.d_ih = kCast ? arena.take<T>(G * I) : static_cast<T*>(args.grads[d].w_ih);
        r.d_hh = kCast ? arena.take<T>(G * O) : static_cast<T*>(args.grads[d].w_hh);
        if (args.projected) r.d_hr = kCast ? arena.take<T>(O * H) : static_cast<T*>(args.grads[d].w_hr);
        const int64_t K = imin(kOuterK, M);
        const int64_t columns = S + O + (kMaxSegments + 1) * kOuterRows;
        r.outer = arena.take<T>(columns * K);
        const int64_t widths[3] = {I, O, has_mid ? H : 0};
        for (int o = 0; o < 3; o++) r.operand[o] = arena.take<T>((widths[o] + kMaxVectors * E::W) * K);
      }
    }
    Arena sizing;
    Lane measure(sizing, *this);
    lane_bytes_ = sizing.used;
    lanes_ = {arena.take<char>(lane_bytes_ * plan_.threads), 0};
  }

  // Threads that divide a narrow matrix get half-width blocks, else some would have none.
  int block_vectors(int64_t width) const { return plan_.units && width <= 8 * E::W ? 2 : kMaxVectors; }
  int64_t time(int d, int64_t s) const { return d ? args_.T - 1 - s : s; }

  void work(int tid, int nt) {
    pack(tid, nt);
    all_.wait(nt);
    Arena mine{lanes_.base + tid * lane_bytes_, 0};
    Lane lane(mine, *this);
    const Share share(args_.directions, tid, nt);
    for (int d = share.direction_first; d < share.direction_last; d++) direction(d, share, lane);
    if (args_.directions == 2 && args_.dx.data) {
      all_.wait(nt);
      add_second_dx(tid, nt);
    }
  }

  void pack(int tid, int nt) {
    const int64_t G = gates_ * args_.H;
    auto share = [&](const Panels<E>& p, const void* w, int64_t K, T* dst) {
      pack_rows<E, IO>(p, static_cast<const IO*>(w), p.width, K, dst, p.blocks * tid / nt,
                       p.blocks * (tid + 1) / nt);
    };
    for (int d = 0; d < args_.directions; d++) {
      const Weights& w = args_.weights[d];
      share(hh_, w.w_hh, G, dir_[d].w_hh);
      if (dir_[d].w_ih) share(ih_, w.w_ih, G, dir_[d].w_ih);
      if (dir_[d].w_hr) share(hr_, w.w_hr, args_.O, dir_[d].w_hr);
      if (recompute_) pack_direction<E>(args_, layout_, w, dir_[d].gates, tid, nt);
    }
  }

  void direction(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H, O = args_.O;
    const int64_t i0 = N * share.id / share.count, i1 = N * (share.id + 1) / share.count;
    init_grads(dir.dh, args_.dh_n, d, O, i0, i1);
    if (C::kCellState) init_grads(dir.dc, args_.dc_n, d, H, i0, i1);
    if (dir.c0) init_grads(dir.c0, args_.c0, d, H, i0, i1);
    for (int64_t n = 0; n < N; n++) lane.next[n] = nullptr;
    lane.units = unit_range(share);
    lane.masks.begin(d, 0, N, lane.units);
    if (d == 0 && args_.lengths && args_.dx.data)
      for (int64_t n = i0; n < i1; n++)
        for (int64_t t = seq_.length(n); t < args_.T; t++)
          std::memset(seq_.at<IO>(args_.dx, t, n), 0, args_.I * sizeof(IO));
    dir.barrier.wait(share.count);

    bool add = false;
    for (int64_t end = args_.T; end > 0; end -= steps_) {
      const int64_t begin = imax(0, end - steps_), steps = end - begin;
      // Chunk rows in the forward direction's processing order, all of the batch.
      lane.list.fill(seq_, steps, 0, N, [&](int64_t i) { return time(d, begin + i); });
      chunk_operands(d, lane, begin, steps);
      if (noise_.state()) mask_states(d, share, lane, begin, steps);
      if (recompute_) {
        recompute(dir, share, lane);
        dir.barrier.wait(share.count);
      }
      for (int64_t i = steps; i-- > 0;) step(d, share, lane, begin, i);
      dir.barrier.wait(share.count);
      keep_boundary(dir, share, lane);
      if (args_.dx.data) input_grad(d, share, lane);
      if (args_.want_weights) weight_grads(d, share, lane, add);
      add = true;
      dir.barrier.wait(share.count);
    }
    if (args_.dh0 || args_.dc0) initial_grads(d, lane, i0, i1);
    if (args_.want_weights) finish_weights(d, share);
  }

  void init_grads(T* dst, const void* src, int d, int64_t width, int64_t i0, int64_t i1) {
    if (src)
      convert_row(dst + i0 * width, static_cast<const IO*>(src) + (d * args_.N + i0) * width,
                  (i1 - i0) * width);
    else
      std::memset(dst + i0 * width, 0, (i1 - i0) * width * sizeof(T));
  }

  int64_t first_time(int d, int64_t n) const { return d && seq_.ragged() ? seq_.length(n) - 1 : time(d, 0); }
  bool begins(int d, int64_t s, int64_t t, int64_t n) const {
    return s == 0 || (d && seq_.ragged() && t == seq_.length(n) - 1);
  }

  void chunk_operands(int d, Lane& lane, int64_t begin, int64_t steps) {
    for (int64_t i = 0; i < steps; i++) {
      const int64_t s = begin + i, t = time(d, s), before = time(d, s - 1);
      for (int64_t m = lane.list.start[i]; m < lane.list.start[i + 1]; m++) {
        const int64_t n = lane.list.n[m];
        lane.x[m] = seq_.at<const IO>(args_.x, t, n);
        if (args_.dx.data)
          lane.dx[m] = d == 0 ? static_cast<void*>(seq_.at<IO>(args_.dx, t, n))
                              : dir_[d].dx + seq_.index(t, n) * args_.I;
        lane.h_prev[m] = seq_.resets(t, n)    ? reinterpret_cast<const IO*>(zero_)
                         : begins(d, s, t, n) ? static_cast<const IO*>(args_.h0) + (d * args_.N + n) * args_.O
                                              : seq_.at<const IO>(args_.y, before, n) + d * args_.O;
      }
    }
  }

  // Masked copies of the previous states: this thread's share, complete for all at the next barrier.
  void mask_states(int d, const Share& share, Lane& lane, int64_t begin, int64_t steps) {
    const int64_t M = lane.list.rows, O = args_.O;
    const int64_t m0 = M * share.id / share.count, m1 = M * (share.id + 1) / share.count;
    for (int64_t i = 0; i < steps; i++)
      for (int64_t m = lane.list.start[i]; m < lane.list.start[i + 1]; m++) {
        IO* copy = dir_[d].h_in + m * O;
        lane.h_in[m] = copy;
        if (m >= m0 && m < m1)
          lane.masks.mask_state(copy, lane.h_prev[m], d, time(d, begin + i), lane.list.n[m]);
      }
  }

  // The units that a thread computes where units are split.
  UnitRange unit_range(const Share& share) const {
    const bool split = plan_.units && share.count > 1;
    auto range = [&](const Panels<E>& p, int64_t& first, int64_t& last) {
      const int64_t b0 = split ? p.blocks * share.id / share.count : 0;
      const int64_t b1 = split ? p.blocks * (share.id + 1) / share.count : p.blocks;
      first = p.first(b0);
      last = b1 > b0 ? p.first(b1 - 1) + p.units(b1 - 1) : first;
    };
    UnitRange r;
    range(hh_, r.o_first, r.o_last);
    range(args_.projected ? hr_ : hh_, r.h_first, r.h_last);
    return r;
  }

  void recompute(Direction& dir, const Share& share, Lane& lane) {
    const int64_t m0 = lane.list.rows * share.id / share.count;
    const int64_t m1 = lane.list.rows * (share.id + 1) / share.count;
    for (int64_t m = m0; m < m1; m++) {
      lane.a_rows[m] = operand_row(lane.x[m], dir.x_cast + m * args_.I, args_.I);
      lane.b_rows[m] = operand_row(lane.h_in[m], dir.h_cast + m * args_.O, args_.O);
    }
    recompute_gates<E, C>(layout_, args_.cell, dir.gates, args_.H, m0, m1, lane.a_rows, lane.b_rows,
                          lane.h_in, dir.dg, dir.mid, lane.tile);
  }
  static const T* operand_row(const IO* src, T* copy, int64_t n) {
    if constexpr (kCast) {
      convert_row(copy, src, n);
      return copy;
    } else {
      return src;
    }
  }

  const T* initial_cell(int d, int64_t n) const {
    if constexpr (kCast) return dir_[d].c0 + n * args_.H;
    return static_cast<const T*>(args_.c0) + (d * args_.N + n) * args_.H;
  }

  void gather(int d, Lane& lane, int64_t s, int64_t first, int64_t count) {
    Direction& dir = dir_[d];
    const int64_t t = time(d, s), before = time(d, s - 1), after = time(d, s + 1);
    const int64_t H = args_.H, O = args_.O, S = C::kSlots * H;
    const T* zero = reinterpret_cast<const T*>(zero_);
    for (int64_t i = 0; i < count; i++) {
      const int64_t m = first + i, n = lane.list.n[m];
      GradRow<E>& g = lane.rows[i];
      const bool last = !lane.next[n];  // no later step of this row: h_n and c_n are its states
      const bool cut = !last && seq_.resets(after, n);
      lane.a_rows[i] = last || cut ? zero : lane.next[n];
      lane.next[n] = dir.dg + m * S;
      g.dg = dir.dg + m * S;
      g.dy = args_.dy.data ? seq_.at<const IO>(args_.dy, t, n) + d * O : nullptr;
      g.dh_out = dir.dh + n * O;
      g.dh_in = last || (carry_h_ && !cut) ? g.dh_out : zero;
      g.h = seq_.at<const IO>(args_.y, t, n) + d * O;
      g.h_prev = lane.h_prev[m];
      g.tape = args_.gates
                   ? static_cast<const T*>(args_.gates) + (d * seq_.rows() + seq_.index(t, n)) * kTape * H
                   : g.dg;
      if constexpr (C::kCellState) {
        g.dc_out = dir.dc + n * H;
        g.dc_in = cut ? zero : g.dc_out;
        g.dcells = args_.dcells.data ? seq_.at<const T>(args_.dcells, t, n) + d * H : nullptr;
        g.c = seq_.at<const T>(args_.cells, t, n) + d * H;
        g.c_prev = seq_.resets(t, n)    ? zero
                   : begins(d, s, t, n) ? initial_cell(d, n)
                                        : seq_.at<const T>(args_.cells, before, n) + d * H;
      }
      g.dh = dir.dh_rows ? dir.dh_rows + m * O : nullptr;
      g.mid = dir.mid ? dir.mid + m * H : nullptr;
      if (noise_.on) lane.masks.step(i, d, t, after, n, lane.units);
    }
  }
  void step(int d, const Share& share, Lane& lane, int64_t begin, int64_t i) {
    Direction& dir = dir_[d];
    const bool split_units = plan_.units && share.count > 1;
    int64_t first = lane.list.start[i], last = lane.list.start[i + 1];
    if (!split_units && share.count > 1) {
      const int64_t n0 = args_.N * share.id / share.count, n1 = args_.N * (share.id + 1) / share.count;
      while (first < last && lane.list.n[first] < n0) first++;
      while (first < last && lane.list.n[last - 1] >= n1) last--;
    }
    const int64_t count = last - first, H = args_.H;
    gather(d, lane, begin + i, first, count);
    sweep(split_units, share, hh_, dir.w_hh, gates_ * H, count, i,
          [&](int64_t b, int, int64_t cols, int64_t m, int r) {
            state_product(dir, lane, b, m, r);
            for (int q = 0; q < r; q++) finish(0, lane, m + q, lane.tile + q * cols, hh_, b);
          });
    if (args_.projected || C::kTwoStage) {
      if (split_units) dir.barrier.wait(share.count);
      const Panels<E>& p = args_.projected ? hr_ : hh_;
      const T* w = args_.projected ? dir.w_hr : dir.w_hh;
      const int64_t K = args_.projected ? args_.O : gates_ * H, k0 = args_.projected ? 0 : 2 * H;
      sweep(split_units, share, p, w, K, count, i, [&](int64_t b, int nv, int64_t cols, int64_t m, int r) {
        const T* a[kMaxRows];
        for (int q = 0; q < r; q++)
          a[q] = args_.projected ? lane.rows[m + q].dh : lane.rows[m + q].dg + 2 * H;
        tile_for<E>(r, nv)(a, w + p.stream(b, K, k0), K - k0, nullptr, 0, lane.tile, cols);
        for (int q = 0; q < r; q++) finish(1, lane, m + q, lane.tile + q * cols, p, b);
      });
    }
    if (split_units) dir.barrier.wait(share.count);
  }

  void finish(int stage, Lane& lane, int64_t m, const T* acc, const Panels<E>& p, int64_t b) const {
    const int64_t u0 = p.first(b), H = args_.H;
    const int units = p.units(b);
    if (noise_.on)
      C::finish(stage, args_.projected, lane.rows[m], acc, u0, units, H,
                MaskRows<E>{noise_, lane.masks.rows + m});
    else
      C::finish(stage, args_.projected, lane.rows[m], acc, u0, units, H, Quiet{});
  }

  // Gate gradients of lane.a_rows[m .. m + r) times block b of weight_hh, into lane.tile.
  void state_product(const Direction& dir, Lane& lane, int64_t b, int64_t m, int r) const {
    const int64_t H = args_.H, cols = hh_.columns(b);
    const T* init = nullptr;
    for (const auto& piece : C::kPieces) {
      const T* a[kMaxRows];
      for (int q = 0; q < r; q++) {
        a[q] = lane.a_rows[m + q];
        if (a[q] != reinterpret_cast<const T*>(zero_)) a[q] += piece[0] * H;
      }
      tile_for<E>(r, hh_.vectors(b))(a, dir.w_hh + hh_.stream(b, gates_ * H, piece[1] * H), piece[2] * H,
                                     init, cols, lane.tile, cols);
      init = lane.tile;
    }
  }

  // f(block, vectors, columns, first row, rows) over this thread's blocks, alternating the direction of travel.
  template <class F>
  void sweep(bool split_units, const Share& share, const Panels<E>& p, const T* w, int64_t K, int64_t count,
             int64_t i, F&& f) {
    const int64_t b0 = split_units ? p.blocks * share.id / share.count : 0;
    const int64_t b1 = split_units ? p.blocks * (share.id + 1) / share.count : p.blocks;
    const bool ahead = b1 > b0 && count >= kPrefetchRows &&
                       (p.offset(b1 - 1) - p.offset(b0)) * K * sizeof(T) >= kPrefetchBytes;
    for (int64_t k = b0; k < b1; k++) {
      const int64_t b = i % 2 ? b1 - 1 - (k - b0) : k, next = i % 2 ? b - 1 : b + 1;
      const T* coming = ahead && k + 1 < b1 ? w + p.stream(next, K) : nullptr;
      row_blocks(count, p.vectors(b), [&](int64_t m, int r) {
        if (coming) prefetch_part(coming, p.columns(next) * K * sizeof(T), m, m + r, count);
        f(b, p.vectors(b), p.columns(b), m, r);
      });
    }
  }

  // Rows whose latest gate gradients lie in the chunk buffer, which the next chunk overwrites, are saved.
  void keep_boundary(Direction& dir, const Share& share, Lane& lane) {
    const int64_t N = args_.N, S = C::kSlots * args_.H;
    // With rows split a thread has seen only its own rows: the last appearance is found from the list.
    for (int64_t m = lane.list.rows; m-- > 0;) lane.next[lane.list.n[m]] = dir.dg + m * S;
    for (int64_t n = 0; n < N; n++) {
      if (!lane.next[n] || lane.next[n] == dir.carry + n * S) continue;
      if (n >= N * share.id / share.count && n < N * (share.id + 1) / share.count)
        std::memcpy(dir.carry + n * S, lane.next[n], S * sizeof(T));
      lane.next[n] = dir.carry + n * S;
    }
  }

  void input_grad(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const int64_t H = args_.H, S = C::kSlots * H, G = gates_ * H, M = lane.list.rows;
    const int64_t m0 = M * share.id / share.count, m1 = M * (share.id + 1) / share.count;
    for (int64_t m = m0; m < m1; m++) lane.a_rows[m] = dir.dg + m * S;
    const int64_t kRows = 16 * kMaxRows;
    for (int64_t from = m0; from < m1; from += kRows) {
      const int64_t to = imin(m1, from + kRows);
      for (int64_t b = 0; b < ih_.blocks; b++) {
        const int nv = ih_.vectors(b), units = ih_.units(b);
        const int64_t cols = ih_.columns(b), u0 = ih_.first(b);
        row_blocks(to - from, nv, [&](int64_t first, int r) {
          const int64_t m = from + first;
          tile_for<E>(r, nv)(lane.a_rows + m, dir.w_ih + ih_.stream(b, G), G, nullptr, 0, lane.tile, cols);
          for (int q = 0; q < r; q++) {
            const T* src = lane.tile + q * cols;
            if (d == 0)
              convert_row(static_cast<IO*>(lane.dx[m + q]) + u0, src, units);
            else
              convert_row(static_cast<T*>(lane.dx[m + q]) + u0, src, units);
          }
        });
      }
    }
  }

  void add_second_dx(int tid, int nt) {
    const int64_t I = args_.I, T0 = args_.T * tid / nt, T1 = args_.T * (tid + 1) / nt;
    for (int64_t t = T0; t < T1; t++)
      for (int64_t n = 0; n < seq_.count(t); n++) {
        if (!seq_.alive(t, n)) continue;
        IO* dst = seq_.at<IO>(args_.dx, t, n);
        const T* src = dir_[1].dx + seq_.index(t, n) * I;
        each_vector<V>(static_cast<int>(I), [&](int u, int w) {
          store_as<V>(dst + u, load_as<V>(dst + u, w) + load_as<V>(src + u, w), w);
        });
      }
  }

  void weight_grads(int d, const Share& share, Lane& lane, bool add) {
    Direction& dir = dir_[d];
    const int64_t H = args_.H, S = C::kSlots * H;
    OuterJob<E> jobs[kMaxSegments + 1];
    int count = 0;
    for (const Segment& seg : C::kSegments) {
      OuterJob<E>& j = jobs[count++];
      j.column = seg.slot * H;
      j.columns = seg.slots * H;
      j.a = dir.dg;
      j.lda = S;
      j.sums = dir.sums;
      if (seg.x_gate >= 0) j.to[0] = {0, dir.d_ih + seg.x_gate * H * args_.I, args_.I};
      if (seg.h_gate >= 0) j.to[1] = {seg.mid ? 2 : 1, dir.d_hh + seg.h_gate * H * args_.O, args_.O};
    }
    if (args_.projected) {
      OuterJob<E>& j = jobs[count++];
      j.columns = args_.O;
      j.a = dir.dh_rows;
      j.lda = args_.O;
      j.to[0] = {2, dir.d_hr, H};
    }
    OuterOperand<E> operands[3];
    operands[0] = {args_.I, lane.x, nullptr, dir.operand[0]};
    operands[1] = {args_.O, lane.h_in, nullptr, dir.operand[1]};
    operands[2] = {H, nullptr, dir.mid, dir.operand[2]};
    outer_products<E>(jobs, count, operands, dir.mid ? 3 : 2, lane.list.rows, dir.outer, add, share.id,
                      share.count, dir.barrier);
  }

  // dh0 and dc0 of rows [i0, i1): one more step of the recurrent matmul, cut where the first step resets.
  void initial_grads(int d, Lane& lane, int64_t i0, int64_t i1) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H, O = args_.O;
    const T* zero = reinterpret_cast<const T*>(zero_);
    for (int64_t n = i0; n < i1; n++) {
      const bool cut = seq_.resets(first_time(d, n), n);
      lane.a_rows[n] = cut ? zero : lane.next[n];
      if (noise_.state()) lane.masks.step(n, d, first_time(d, n), first_time(d, n), n, {0, H, 0, O});
      if (C::kCellState)
        convert_row(static_cast<IO*>(args_.dc0) + (d * N + n) * H, cut ? zero : dir.dc + n * H, H);
    }
    for (int64_t b = 0; b < hh_.blocks; b++) {
      const int nv = hh_.vectors(b), units = hh_.units(b);
      const int64_t cols = hh_.columns(b), u0 = hh_.first(b);
      row_blocks(i1 - i0, nv, [&](int64_t first, int r) {
        const int64_t n = i0 + first;
        state_product(dir, lane, b, n, r);
        for (int q = 0; q < r; q++) {
          IO* dh0 = static_cast<IO*>(args_.dh0) + (d * N + n + q) * O + u0;
          const bool carry = carry_h_ && lane.a_rows[n + q] != zero;
          each_vector<V>(units, [&](int u, int w) {
            V v = load_as<V>(lane.tile + q * cols + u, w);
            if (noise_.state()) v = v * MaskRows<E>{noise_, lane.masks.rows + n + q}.state(0, u0 + u);
            if (carry) v = v + load_as<V>(dir.dh + (n + q) * O + u0 + u, w);
            store_as<V>(dh0 + u, v, w);
          });
        }
      });
    }
  }

  // Bias gradients from the column sums, and 16-bit copies of what was accumulated in T.
  void finish_weights(int d, const Share& share) {
    Direction& dir = dir_[d];
    const auto& out = args_.grads[d];
    const int64_t H = args_.H, G = gates_ * H;
    if constexpr (kCast) {
      auto part = [&](void* dst, const T* src, int64_t n) {
        const int64_t a = n * share.id / share.count, b = n * (share.id + 1) / share.count;
        if (dst) convert_row(static_cast<IO*>(dst) + a, src + a, b - a);
      };
      part(out.w_ih, dir.d_ih, G * args_.I);
      part(out.w_hh, dir.d_hh, G * args_.O);
      if (args_.projected) part(out.w_hr, dir.d_hr, args_.O * H);
    }
    if (share.id != 0 || !out.b_ih) return;
    for (const Segment& seg : C::kSegments) {
      if (seg.x_gate >= 0)
        convert_row(static_cast<IO*>(out.b_ih) + seg.x_gate * H, dir.sums + seg.slot * H, seg.slots * H);
      if (seg.h_gate >= 0)
        convert_row(static_cast<IO*>(out.b_hh) + seg.h_gate * H, dir.sums + seg.slot * H, seg.slots * H);
    }
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
