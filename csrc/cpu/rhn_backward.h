// Backward of one Recurrent Highway layer: all steps, both directions, all gradients, inside one team call.
//
// As backward.h, with `depth` products in each step: the product of a micro-step's gate gradients with its
// weights is followed, tile by tile, by the pointwise part of the micro-step below. Intermediate states are
// recomputed upward from y_{t-1}: solving s_l for s_{l-1} would divide by 1 - t. Without a tape the chunk's gates
// are recomputed too, one matmul per micro-step over all rows of the chunk.
#pragma once
#include "rhn_backward_state.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class E>
class RhnBackward : RhnBackwardState<E> {
  using State = RhnBackwardState<E>;
  using typename State::Direction;
  using typename State::Lane;
  using T = typename E::T;
  using V = typename E::V;
  using State::all_, State::args_, State::capacity_, State::cell_, State::dir_, State::hh_, State::ih_,
      State::kStateBlocks, State::kTile, State::lane_bytes_, State::lanes_, State::layout_, State::plan_,
      State::recompute_, State::s_pieces_, State::seq_, State::steps_, State::tapes_, State::width_,
      State::x_pieces_, State::zero_;
  using State::mask_row, State::operands, State::recurrent, State::state_mask, State::time;

 public:
  static size_t workspace(const RhnBackwardArgs& args) {
    Arena arena;
    RhnBackward b(args, arena);
    return arena.used;
  }
  static void run(const RhnBackwardArgs& args) {
    Arena arena{static_cast<char*>(args.workspace), 0};
    RhnBackward b(args, arena);
    team(b.plan_.threads, [&](int tid, int nt) { b.work(tid, nt); });
  }

 private:
  using State::State;

  void work(int tid, int nt) {
    const bool past =
        int64_t(sizeof(T)) * args_.directions * args_.depth * hh_.elements(width_) >= kStreamedWeights;
    for (int d = 0; d < args_.directions; d++) {
      const RhnWeights& w = args_.weights[d];
      for (int l = 0; l < args_.depth; l++)
        pack_rows<E, T>(hh_, static_cast<const T*>(w.w_hh) + l * width_ * args_.H, args_.H, width_,
                        recurrent(d, l), hh_.blocks * tid / nt, hh_.blocks * (tid + 1) / nt, past);
      if (dir_[d].w_ih)
        pack_rows<E, T>(ih_, static_cast<const T*>(w.w_ih), args_.I, width_, dir_[d].w_ih,
                        ih_.blocks * tid / nt, ih_.blocks * (tid + 1) / nt);
      if (recompute_) pack_rhn<E>(layout_, w, dir_[d].packed, tid, nt);
    }
    end_streams();
    all_.wait(nt);
    Arena mine{lanes_.base + tid * lane_bytes_, 0};
    Lane lane(mine, *this);
    const Share share(args_.directions, tid, nt);
    for (int d = share.direction_first; d < share.direction_last; d++) direction(d, share, lane);
    if (args_.directions == 2 && args_.dx.data) {
      all_.wait(nt);
      add_direction<E>(seq_, args_.dx, dir_[1].dx, args_.I, tid, nt);
    }
  }

  void direction(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H;
    const int64_t i0 = share.first(N), i1 = share.last(N);
    if (args_.dh_n)
      std::memcpy(dir.ds + i0 * H, static_cast<const T*>(args_.dh_n) + (d * N + i0) * H,
                  (i1 - i0) * H * sizeof(T));
    else
      std::memset(dir.ds + i0 * H, 0, (i1 - i0) * H * sizeof(T));
    for (int64_t n = 0; n < N; n++) lane.next[n] = nullptr;
    lane.division.begin(dir.claims, share, args_);
    if (d == 0 && args_.lengths && args_.dx.data)
      for (int64_t n = i0; n < i1; n++)
        for (int64_t t = seq_.length(n); t < args_.T; t++)
          std::memset(seq_.template at<T>(args_.dx, t, n), 0, args_.I * sizeof(T));
    dir.barrier.wait(share.count);

    bool add = false;
    for (int64_t end = args_.T; end > 0; end -= steps_) {
      const int64_t begin = imax(0, end - steps_), steps = end - begin;
      // Chunk rows in the forward direction's processing order, all of the batch.
      lane.list.fill(seq_, steps, 0, N, [&](int64_t i) { return time(d, begin + i); });
      chunk_operands(d, share, lane, begin, steps);
      if (recompute_) {
        dir.barrier.wait(share.count);  // masked inputs of all rows
        recompute(d, share, lane);
        dir.barrier.wait(share.count);
      }
      for (int64_t i = steps; i-- > 0;) step(d, share, lane, begin, i);
      dir.barrier.wait(share.count);
      keep_boundary(dir, share, lane);
      if (args_.dx.data) input_grad(d, lane);
      if (begin == 0 && args_.dh0) initial_grads(d, lane, i0, i1);
      if (args_.want_weights)
        for (int l = 0; l < args_.depth; l++) weight_grads(d, l, lane, add);
      add = add || lane.list.rows > 0;  // steps past the end of every row write nothing
      dir.barrier.wait(share.count);
    }
  }

  void chunk_operands(int d, const Share& share, Lane& lane, int64_t begin, int64_t steps) {
    const int64_t M = lane.list.rows, I = args_.I;
    const int64_t m0 = share.first(M), m1 = share.last(M);
    for (int64_t i = 0; i < steps; i++) {
      const int64_t s = begin + i, t = time(d, s), before = time(d, s - 1);
      for (int64_t m = lane.list.start[i]; m < lane.list.start[i + 1]; m++) {
        const int64_t n = lane.list.n[m];
        const bool begins = s == 0 || (d && seq_.ragged() && t == seq_.length(n) - 1);
        lane.x[m] = seq_.template at<const T>(args_.x, t, n);
        if (args_.dx.data)
          lane.dx[m] = d == 0 ? seq_.template at<T>(args_.dx, t, n) : dir_[d].dx + seq_.index(t, n) * I;
        lane.first[m] = seq_.resets(t, n) ? zero_
                        : begins          ? static_cast<const T*>(args_.h0) + (d * args_.N + n) * args_.H
                                          : seq_.template at<const T>(args_.y, before, n) + d * args_.H;
        if (m < m0 || m >= m1) continue;
        for (int p = 0; p < args_.x_groups; p++)
          scale_row<E>(dir_[d].x_masked + (p * capacity_ + m) * I, lane.x[m],
                       mask_row(args_.x_mask, args_.x_groups, I, d, n, p), I);
      }
    }
  }

  RhnStateRow<T> state_row(int d, const Lane& lane, int64_t m, int64_t number) const {
    const Direction& dir = dir_[d];
    const int64_t H = args_.H;
    return {lane.first[m], number, dir.s + m * H, state_mask(d, lane.list.n[m]), dir.u + m * H};
  }
  RhnStates<T> states_of(const RhnStateRow<T>* row, int64_t rows, const RhnTape<const T>& tape,
                         int64_t tape_stride, int depth, int64_t u0, int64_t u1) const {
    const int64_t CH = capacity_ * args_.H;
    return {row, rows,           tape,  tape_stride, CH, args_.s_groups * CH, args_.N * args_.H,
            CH,  args_.s_groups, depth, u0,          u1};
  }

  // Gates, states and their masked copies of this thread's share of the chunk's rows.
  void recompute(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const Panels<E>& panels = layout_.panels;
    const int64_t M = lane.list.rows, H = args_.H, I = args_.I, C = capacity_;
    const int64_t m0 = share.first(M), m1 = share.last(M);
    auto weights = [&](size_t at) { return reinterpret_cast<const T*>(dir.packed + at); };
    const T** x_rows = lane.operand;
    const T** u_rows = lane.operand + kMaxParts * C;
    for (int64_t m = m0; m < m1; m++) {
      const RhnStateRow<T> row = state_row(d, lane, m, m);
      cell_.states(states_of(&row, 1, {}, 0, 1, 0, H));
      for (int p = 0; p < x_pieces_; p++)
        x_rows[p * C + m] = args_.x_groups ? dir.x_masked + (p * C + m) * I : lane.x[m];
    }
    constexpr int64_t kRows = 16 * kMaxRows;
    for (int64_t from = m0; from < m1; from += kRows) {
      const int64_t to = imin(m1, from + kRows);
      for (int l = 0; l < args_.depth; l++) {
        for (int64_t m = from; m < to; m++) {
          const bool top = l + 1 == args_.depth;
          lane.forward[m] = {
              dir.s + (l * C + m) * H, top ? nullptr : dir.s + ((l + 1) * C + m) * H, m,
              state_mask(d, lane.list.n[m]),
              top || !args_.s_groups ? nullptr : dir.u + ((l + 1) * args_.s_groups * C + m) * H};
          for (int p = 0; p < s_pieces_; p++)
            u_rows[p * C + m] = dir.u + ((l * imax(1, args_.s_groups) + p) * C + m) * H;
        }
        for (int64_t b = 0; b < panels.blocks; b++) {
          const int nv = panels.vectors(b), units = panels.units(b);
          const int64_t cols = panels.columns(b);
          row_blocks(to - from, nv, [&](int64_t at, int r) {
            const int64_t m = from + at;
            auto fn = tile_for<E>(r, nv);
            for (int part = 0; part < layout_.parts; part++) {
              const T* bias = weights(layout_.bias(l, part)) + panels.offset(b);
              T* gx = lane.tile + kMaxParts * kTile;
              if (l == 0)
                fn(x_rows + (x_pieces_ > 1 ? part : 0) * C + m,
                   weights(layout_.x(part)) + panels.stream(b, I), I, bias, 0, gx, cols);
              fn(u_rows + (s_pieces_ > 1 ? part : 0) * C + m,
                 weights(layout_.h(l, part)) + panels.stream(b, H), H, l ? bias : gx, l ? 0 : cols,
                 lane.tile + part * kTile, cols);
            }
            cell_.finish({lane.forward + m, r, lane.tile, cols, layout_.parts > 1 ? kTile : units,
                          panels.first(b), units, H, args_.s_groups, args_.N * H, C * H,
                          RhnTape<T>{dir.dz + l * C * width_, kOneGroup, C, args_.gates, H}, false});
          });
        }
      }
    }
  }

  void step(int d, const Share& share, Lane& lane, int64_t begin, int64_t i) {
    Direction& dir = dir_[d];
    const bool split_units = plan_.units && share.count > 1;
    const int64_t N = args_.N, H = args_.H, C = capacity_, t = time(d, begin + i);
    int64_t first = lane.list.start[i], last = lane.list.start[i + 1];
    if (!split_units && share.count > 1) {
      const int64_t n0 = share.first(N), n1 = share.last(N);
      while (first < last && lane.list.n[first] < n0) first++;
      while (first < last && lane.list.n[last - 1] >= n1) last--;
    }
    const int64_t tape_stride = (recompute_ ? C : seq_.rows()) * width_;
    RhnTape<const T> tape = tapes_.at(args_.tape, d, 0, t);
    if (recompute_) tape = {dir.dz, kOneGroup, C, args_.gates, H};
    for (int64_t m = first; m < last; m++) {
      const int64_t n = lane.list.n[m], q = m - first;
      const bool ends = !lane.next[n];  // no later step of this row: h_n is its state
      const bool cut = !ends && seq_.resets(time(d, begin + i + 1), n);
      lane.a_rows[q] = ends || cut ? zero_ : lane.next[n];
      lane.next[n] = dir.dz + m * width_;
      T* ds = dir.ds + n * H;
      lane.rows[q] = {args_.dy.data ? seq_.template at<const T>(args_.dy, t, n) + d * H : nullptr,
                      cut ? zero_ : ds,
                      ds,
                      recompute_ ? m : n,
                      dir.s + m * H,
                      dir.dz + m * width_,
                      state_mask(d, n)};
      lane.states[q] = state_row(d, lane, m, n);
    }
    if (!recompute_) {
      const auto runs = [&](int of) { return lane.division.runs(hh_, split_units, of); };
      const auto pieces = [&](int of) { return ceil_div(runs(of).count(), kStateBlocks); };
      const int64_t products =
          (last - first) * args_.depth * kStateBlocks * hh_.unit * 16;  // as long as so many
      lane.division.run(split_units && lane.division.worth_claiming(products), pieces,
                        [&](int of, int64_t piece) {
                          const int64_t b0 = runs(of).b0 + piece * kStateBlocks,
                                        b1 = imin(b0 + kStateBlocks, runs(of).b1) - 1;
                          cell_.states(states_of(lane.states, last - first, tape, tape_stride, args_.depth,
                                                 hh_.first(b0), hh_.first(b1) + hh_.units(b1)));
                        });
      if (split_units) dir.barrier.wait(share.count);
    }
    tape.data += (args_.depth - 1) * tape_stride;
    for (int64_t q = 0; q < last - first; q++) {  // to the last micro-step
      lane.rows[q].s += (args_.depth - 1) * C * H;
      lane.rows[q].dz += (args_.depth - 1) * C * width_;
    }
    for (int l = args_.depth - 1;; l--) {
      micro_step(d, (l + 1) % args_.depth, split_units, last - first, tape, lane);
      if (split_units) dir.barrier.wait(share.count);
      if (l == 0) return;
      tape.data -= tape_stride;
      for (int64_t q = 0; q < last - first; q++) {
        RhnGradRow<T>& row = lane.rows[q];
        lane.a_rows[q] = row.dz;
        row.dy = nullptr;
        row.ds_in = row.ds;
        row.s -= C * H;
        row.dz -= C * width_;
      }
    }
  }

  // The product of lane.a_rows with the weights of micro-step `above`, then the pointwise part below it.
  void micro_step(int d, int above, bool split_units, int64_t count, const RhnTape<const T>& tape,
                  Lane& lane) {
    const T* w = recurrent(d, above);
    const PanelRuns own = lane.division.own(hh_, split_units);
    const bool ahead = asks_ahead(hh_, own.b0, own.b1, args_.depth * width_, count);
    const T* below = recurrent(d, (above + args_.depth - 1) % args_.depth);
    lane.division.panels(
        hh_, width_, count, {split_units, split_units}, [&](int64_t b, int run, int64_t after) {
          // The panel after these; after the last, the next micro-step's first.
          const int64_t cols = hh_.columns(b), next = after < 0 ? own.b0 : after;
          const T* coming = (after < 0 ? below : w) + hh_.stream(next, width_);
          row_blocks(count, hh_.vectors(b), [&](int64_t m, int r) {
            if (ahead && s_pieces_ == 1)
              multiply_ahead<E>(lane.a_rows + m, r, w + hh_.stream(b, width_), width_, hh_.vectors(b),
                                nullptr, 0, lane.tile, cols, coming, hh_.columns(next) * width_, m, count);
            else
              product(lane.a_rows + m, r, w, b, run, lane.tile);
            for (int q = 0; q < run; q++)
              cell_.grad({lane.rows + m, r, lane.tile + q * r * cols, cols, kTile, hh_.first(b + q),
                          hh_.units(b + q), args_.H, args_.s_groups, args_.N * args_.H, tape});
          });
        });
  }

  // Gate gradients times `run` blocks from b on of one micro-step's weights: one product, or one per gate.
  void product(const T* const* rows, int r, const T* w, int64_t b, int run, T* out) const {
    const int64_t K = width_ / s_pieces_;
    for (int p = 0; p < s_pieces_; p++) {
      const T* a[kMaxRows];
      for (int q = 0; q < r; q++) a[q] = rows[q] == zero_ ? zero_ : rows[q] + p * K;
      multiply_blocks(hh_, w, width_, b, run, a, r, p * K, K, nullptr, out + p * kTile, {}, 0);
    }
  }

  // Rows whose latest gate gradients lie in the chunk buffer, which the next chunk overwrites, are saved.
  void keep_boundary(Direction& dir, const Share& share, Lane& lane) {
    const int64_t N = args_.N;
    // With rows split a thread has seen only its own rows: the last appearance is found from the list.
    for (int64_t m = lane.list.rows; m-- > 0;) lane.next[lane.list.n[m]] = dir.dz + m * width_;
    for (int64_t n = 0; n < N; n++) {
      if (!lane.next[n] || lane.next[n] == dir.carry + n * width_) continue;
      if (n >= share.first(N) && n < share.last(N))
        std::memcpy(dir.carry + n * width_, lane.next[n], width_ * sizeof(T));
      lane.next[n] = dir.carry + n * width_;
    }
  }

  void input_grad(int d, Lane& lane) {
    Direction& dir = dir_[d];
    const int64_t M = lane.list.rows, I = args_.I, K = width_ / x_pieces_;
    const auto first = [&](int id) { return M * id / lane.division.count; };
    const auto pieces = [&](int id) { return ceil_div(first(id + 1) - first(id), kInputRows); };
    lane.division.run(true, pieces, [&](int id, int64_t piece) {
      const int64_t from = first(id) + piece * kInputRows, to = imin(first(id + 1), from + kInputRows);
      for (int64_t b = 0; b < ih_.blocks; b++) {
        const int nv = ih_.vectors(b), units = ih_.units(b);
        const int64_t cols = ih_.columns(b), u0 = ih_.first(b);
        row_blocks(to - from, nv, [&](int64_t at, int r) {
          const int64_t m = from + at;
          for (int p = 0; p < x_pieces_; p++) {
            const T* a[kMaxRows];
            for (int q = 0; q < r; q++) a[q] = dir.dz + (m + q) * width_ + p * K;
            tile_for<E>(r, nv)(a, dir.w_ih + ih_.stream(b, width_, p * K), K, nullptr, 0,
                               lane.tile + p * kTile, cols);
          }
          for (int q = 0; q < r; q++) {
            const T* mask =
                args_.x_groups ? mask_row(args_.x_mask, args_.x_groups, I, d, lane.list.n[m + q]) : zero_;
            each_vector<V>(units, [&](int u, auto n) {
              store_as<V>(lane.dx[m + q] + u0 + u,
                          rhn_incoming<E>(lane.tile + q * cols + u, kTile, mask + u0 + u, args_.x_groups,
                                          args_.N * I, n),
                          n);
            });
          }
        });
      }
    });
  }

  // Micro-step l's: its gate gradients meet the (masked) states before it, the first one's also the inputs.
  void weight_grads(int d, int l, Lane& lane, bool add) {
    Direction& dir = dir_[d];
    const auto& out = args_.grads[d];
    const int64_t H = args_.H, I = args_.I, C = capacity_;
    const int inputs = l == 0 ? x_pieces_ : 0, parts = static_cast<int>(imax(s_pieces_, x_pieces_));
    const int64_t columns = width_ / parts;
    OuterJob<E> jobs[kMaxParts];
    for (int p = 0; p < parts; p++) {
      OuterJob<E>& j = jobs[p];
      j.column = p * columns;
      j.columns = columns;
      j.lda = width_;
      if (out.bias) j.sums = static_cast<T*>(out.bias) + l * width_;
      const int x = x_pieces_ > 1 ? p : 0, s = s_pieces_ > 1 ? p : 0;
      if (l == 0) j.to[0] = {x, static_cast<T*>(out.w_ih) + j.column * I, I};
      j.to[1] = {inputs + s, static_cast<T*>(out.w_hh) + (l * width_ + j.column) * H, H};
    }
    // Even pieces, each of one FMA chain an output: the gradients are still in L3 when the next one adds to them.
    const int64_t M = lane.list.rows, pieces = ceil_div(M, kOuterK);
    for (int64_t i = 0; i < pieces; i++) {
      const int64_t m = M * i / pieces;
      OuterOperand<E> operand[2 * kMaxParts];
      for (int p = 0; p < inputs; p++)
        operand[p] = {I, args_.x_groups ? nullptr : lane.x + m, dir.x_masked + (p * C + m) * I,
                      dir.operand[p]};
      for (int p = 0; p < s_pieces_; p++)
        operand[inputs + p] = {H, nullptr, dir.u + ((l * imax(1, args_.s_groups) + p) * C + m) * H,
                               dir.operand[x_pieces_ + p]};
      for (int p = 0; p < parts; p++) jobs[p].a = dir.dz + (l * C + m) * width_;
      outer_products<E>(jobs, parts, operand, inputs + s_pieces_, M * (i + 1) / pieces - m, dir.outer,
                        add || i, lane.division, dir.barrier);
    }
  }

  // dh0 of rows [i0, i1): the product below the first micro-step, cut where the first step resets.
  void initial_grads(int d, Lane& lane, int64_t i0, int64_t i1) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H;
    for (int64_t n = i0; n < i1; n++)
      lane.a_rows[n] =
          seq_.resets(d && seq_.ragged() ? seq_.length(n) - 1 : time(d, 0), n) ? zero_ : lane.next[n];
    for (int64_t b = 0; b < hh_.blocks; b++) {
      const int64_t cols = hh_.columns(b), u0 = hh_.first(b);
      row_blocks(i1 - i0, hh_.vectors(b), [&](int64_t first, int r) {
        product(lane.a_rows + i0 + first, r, recurrent(d, 0), b, 1, lane.tile);
        for (int q = 0; q < r; q++) {
          const int64_t n = i0 + first + q;
          T* dh0 = static_cast<T*>(args_.dh0) + (d * N + n) * H + u0;
          const T* carry = (lane.a_rows[n] == zero_ ? zero_ : dir.ds + n * H) + u0;
          each_vector<V>(hh_.units(b), [&](int u, auto w) {
            const V acc = rhn_incoming<E>(lane.tile + q * cols + u, kTile, state_mask(d, n) + u0 + u,
                                          args_.s_groups, N * H, w);
            store_as<V>(dh0 + u, acc + load_as<V>(carry + u, w), w);
          });
        }
      });
    }
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
