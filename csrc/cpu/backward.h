// Backward of one layer: all steps, both directions, all gradients, inside one team call.
//
// Steps are taken in chunks of about kGradRows rows. A chunk's gate gradients stay in cache; when the recurrent part of the
// chunk is done they meet the weights (dx) and the inputs and previous states (weight gradients). The tape is only read, so a graph can be walked twice.
// Without a tape the chunk's gates are recomputed from x and y, which are all known: one matmul.
#pragma once
#include <algorithm>

#include "backward_input.h"
#include "recompute.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class E, class C>
class Backward : protected BackwardInput<E, C> {
 protected:
  using State = BackwardState<E, C>;
  using Input = BackwardInput<E, C>;
  using typename State::Direction;
  using typename State::Lane;
  using T = typename E::T;
  using IO = typename E::IO;
  using V = typename E::V;
  static_assert(std::is_same<typename E::A, T>::value, "gradients are computed in the compute type");
  using Input::add_second_dx, Input::input_grad;
  using State::all_, State::args_, State::dir_, State::direct_, State::gates_, State::hh_, State::hr_,
      State::ih_;
  using State::carry_h_, State::far_, State::first_time, State::noise_;
  using State::kCast, State::kMaxSegments, State::kTape, State::lane_bytes_, State::lanes_, State::layout_,
      State::plan_, State::whole_;
  using State::recompute_, State::seq_, State::steps_, State::time, State::zero_;

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

 protected:
  using Input::Input;
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
      if (dir_[d].w_hh) share(hh_, w.w_hh, G, dir_[d].w_hh);
      if (dir_[d].w_ih) share(ih_, w.w_ih, G, dir_[d].w_ih);
      if (dir_[d].w_hr) share(hr_, w.w_hr, args_.O, dir_[d].w_hr);
      if (recompute_) pack_direction<E>(args_, layout_, w, dir_[d].gates, tid, nt);
    }
  }

  // Before the first chunk: gradients of the final states of rows [i0, i1), and what a lane keeps of a direction.
  void begin(int d, Lane& lane, int64_t i0, int64_t i1) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H, O = args_.O;
    init_grads(dir.dh, args_.dh_n, d, O, i0, i1);
    if (C::kCellState) init_grads(dir.dc, args_.dc_n, d, H, i0, i1);
    if (dir.c0) init_grads(dir.c0, args_.c0, d, H, i0, i1);
    for (int64_t n = 0; n < N; n++) lane.next[n] = nullptr;
    lane.masks.begin(dir.masks, 0, d, i0, i1, [&](int64_t n) { return first_time(d, n); });
    if (d == 0 && args_.lengths && args_.dx.data)
      for (int64_t n = i0; n < i1; n++)
        for (int64_t t = seq_.length(n); t < args_.T; t++)
          std::memset(seq_.template at<IO>(args_.dx, t, n), 0, args_.I * sizeof(IO));
  }

  void direction(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H;
    const int64_t i0 = share.first(N), i1 = share.last(N);
    lane.division.begin(dir.claims, share, args_);
    begin(d, lane, i0, i1);
    dir.barrier.wait(share.count);

    bool add = false;
    for (int64_t end = args_.T; end > 0; end -= steps_) {
      const int64_t begin = imax(0, end - steps_), steps = end - begin;
      // Chunk rows in the forward direction's processing order, all of the batch.
      lane.list.fill(seq_, steps, 0, N, [&](int64_t i) { return time(d, begin + i); });
      chunk_operands(d, lane, begin, steps);
      if (noise_.draws()) draw_masks(d, share, lane, begin, steps);
      if (recompute_) recompute(dir, share, lane);
      if (recompute_ || noise_.draws()) dir.barrier.wait(share.count);
      for (int64_t i = steps; i-- > 0;) step(d, share, lane, begin, i);
      dir.barrier.wait(share.count);
      keep_boundary(dir, share, lane);
      if (args_.dx.data) input_grad(d, share, lane, dir.dg, C::kSlots * H);
      if (begin == 0) initial_grads(d, share, lane, i0, i1);
      if (args_.want_weights) weight_grads(d, lane, add);
      add = add || lane.list.rows > 0;  // steps past the end of every row write nothing
      dir.barrier.wait(share.count);
    }
    if (args_.want_weights) finish_weights(d, share);
  }

  void init_grads(T* dst, const void* src, int d, int64_t width, int64_t i0, int64_t i1) {
    if (src)
      convert_row(dst + i0 * width, static_cast<const IO*>(src) + (d * args_.N + i0) * width,
                  (i1 - i0) * width);
    else
      std::memset(dst + i0 * width, 0, (i1 - i0) * width * sizeof(T));
  }

  bool begins(int d, int64_t s, int64_t t, int64_t n) const {
    return s == 0 || (d && seq_.ragged() && t == seq_.length(n) - 1);
  }

  void chunk_operands(int d, Lane& lane, int64_t begin, int64_t steps) {
    for (int64_t i = 0; i < steps; i++) {
      const int64_t s = begin + i, t = time(d, s), before = time(d, s - 1);
      for (int64_t m = lane.list.start[i]; m < lane.list.start[i + 1]; m++) {
        const int64_t n = lane.list.n[m];
        lane.x[m] = seq_.template at<const IO>(args_.x, t, n);
        if (args_.dx.data)
          lane.dx[m] = d == 0 ? static_cast<void*>(seq_.template at<IO>(args_.dx, t, n))
                              : dir_[d].dx + seq_.index(t, n) * args_.I;
        lane.h_prev[m] = seq_.resets(t, n)    ? reinterpret_cast<const IO*>(zero_)
                         : begins(d, s, t, n) ? static_cast<const IO*>(args_.h0) + (d * args_.N + n) * args_.O
                                              : seq_.template at<const IO>(args_.y, before, n) + d * args_.O;
      }
    }
  }

  // Masks of the chunk's rows, and masked copies of their previous states: this thread's share, complete for all at the next barrier.
  void draw_masks(int d, const Share& share, Lane& lane, int64_t begin, int64_t steps) {
    const int64_t M = lane.list.rows, O = args_.O;
    const int64_t m0 = share.first(M), m1 = share.last(M);
    lane.masks.draw(lane.list, steps, m0, m1, d, [&](int64_t i) { return time(d, begin + i); });
    if (!noise_.state()) return;
    for (int64_t i = 0; i < steps; i++)
      for (int64_t m = lane.list.start[i]; m < lane.list.start[i + 1]; m++) {
        IO* copy = dir_[d].h_in + m * O;
        lane.h_in[m] = copy;
        if (m < m0 || m >= m1) continue;
        const uint64_t* bits = lane.masks.drop(d, time(d, begin + i), lane.list.n[m]);
        lane.masks.mask_state(copy, lane.h_prev[m], bits);
      }
  }

  void recompute(Direction& dir, const Share& share, Lane& lane) {
    const int64_t m0 = share.first(lane.list.rows);
    const int64_t m1 = share.last(lane.list.rows);
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
      g.dy = args_.dy.data ? seq_.template at<const IO>(args_.dy, t, n) + d * O : nullptr;
      g.dh_out = dir.dh + n * O;
      g.dh_in = last || (carry_h_ && !cut) ? g.dh_out : zero;
      g.h = seq_.template at<const IO>(args_.y, t, n) + d * O;
      g.h_prev = lane.h_prev[m];
      g.tape = args_.gates
                   ? static_cast<const T*>(args_.gates) + (d * seq_.rows() + seq_.index(t, n)) * kTape * H
                   : g.dg;
      if constexpr (C::kCellState) {
        g.dc_out = dir.dc + n * H;
        g.dc_in = cut ? zero : g.dc_out;
        g.dcells = args_.dcells.data ? seq_.template at<const T>(args_.dcells, t, n) + d * H : nullptr;
        g.c = seq_.template at<const T>(args_.cells, t, n) + d * H;
        g.c_prev = seq_.resets(t, n)    ? zero
                   : begins(d, s, t, n) ? initial_cell(d, n)
                                        : seq_.template at<const T>(args_.cells, before, n) + d * H;
      }
      g.dh = dir.dh_rows ? dir.dh_rows + m * O : nullptr;
      g.mid = dir.mid ? dir.mid + m * H : nullptr;
      if (noise_.on) lane.masks.step(i, m);
    }
  }
  // The rows of step i of the chunk that this thread works on: all of them where units are split.
  void own_rows(const Share& share, const Lane& lane, int64_t i, int64_t& first, int64_t& last) const {
    first = lane.list.start[i];
    last = lane.list.start[i + 1];
    if (plan_.units || share.count == 1) return;
    const int64_t n0 = share.first(args_.N), n1 = share.last(args_.N);
    while (first < last && lane.list.n[first] < n0) first++;
    while (first < last && lane.list.n[last - 1] >= n1) last--;
  }

  void step(int d, const Share& share, Lane& lane, int64_t begin, int64_t i) {
    Direction& dir = dir_[d];
    const bool split_units = plan_.units && share.count > 1;
    int64_t first, last;
    own_rows(share, lane, i, first, last);
    const int64_t count = last - first, H = args_.H;
    gather(d, lane, begin + i, first, count);
    sweep(
        split_units, hh_, dir.w_hh, gates_ * H, count, i, lane,
        [&](int64_t b, int panels, int64_t m, int r, const Coming<E>& coming) {
          for (int q = 0; far_ && q < panels * r; q++)
            prefetch_row<E, C>(lane.rows[m + q % r], hh_.first(b + q / r), hh_.units(b + q / r), H);
          state_product(dir, lane, b, panels, m, r, coming);
        },
        [&](int64_t b, int64_t m, const T* acc) { finish(0, lane, m, acc, hh_, b); });
    if (args_.projected || C::kTwoStage) {
      if (split_units) dir.barrier.wait(share.count);
      const Panels<E>& p = args_.projected ? hr_ : hh_;
      const T* w = args_.projected ? dir.w_hr : dir.w_hh;
      const int64_t K = args_.projected ? args_.O : gates_ * H, k0 = args_.projected ? 0 : 2 * H;
      sweep(
          split_units, p, w, K, count, i, lane,
          [&](int64_t b, int panels, int64_t m, int r, const Coming<E>& coming) {
            const T* a[kMaxRows];
            for (int q = 0; q < r; q++)
              a[q] = args_.projected ? lane.rows[m + q].dh : lane.rows[m + q].dg + 2 * H;
            multiply_blocks(p, w, K, b, panels, a, r, k0, K - k0, nullptr, lane.tile, coming, m);
          },
          [&](int64_t b, int64_t m, const T* acc) { finish(1, lane, m, acc, p, b); });
    }
    if (split_units) dir.barrier.wait(share.count);
  }

  void finish(int stage, Lane& lane, int64_t m, const T* acc, const Panels<E>& p, int64_t b) const {
    const int64_t u0 = p.first(b), H = args_.H;
    const int units = p.units(b);
    const GradRow<E>& row = lane.rows[m];
    if (noise_.on)
      C::finish(stage, args_.projected, row, acc, u0, units, H, MaskRows<E>{noise_, lane.masks.rows + m});
    else
      C::finish(stage, args_.projected, row, acc, u0, units, H, Quiet{});
  }

  // Gate gradients of lane.a_rows[m .. m + r) times blocks [b, b + panels) of weight_hh, into lane.tile.
  void state_product(const Direction& dir, Lane& lane, int64_t b, int panels, int64_t m, int r,
                     const Coming<E>& coming) const {
    const int64_t H = args_.H;
    const T* const zero = reinterpret_cast<const T*>(zero_);
    if (std::all_of(lane.a_rows + m, lane.a_rows + m + r, [&](const T* a) { return a == zero; })) {
      std::memset(lane.tile, 0, panels * r * hh_.columns(b) * sizeof(T));  // the last step of these rows
      return;
    }
    const T* init = nullptr;
    for (const auto& piece : C::kPieces) {
      const T* a[kMaxRows];
      for (int q = 0; q < r; q++) {
        a[q] = lane.a_rows[m + q];
        if (a[q] != zero) a[q] += piece[0] * H;
      }
      multiply_blocks(hh_, dir.w_hh, gates_ * H, b, panels, a, r, piece[1] * H, piece[2] * H, init, lane.tile,
                      init ? Coming<E>{} : coming, m);
      init = lane.tile;
    }
  }

  // Over this thread's blocks, back and forth: multiply(block, blocks, first row, rows, what is coming) into lane.tile, then use(block, row, its part).
  template <class M, class F>
  void sweep(bool split_units, const Panels<E>& p, const T* w, int64_t K, int64_t count, int64_t i,
             Lane& lane, M&& multiply, F&& use) {
    const PanelRuns own = lane.division.own(p, split_units);
    const bool ahead =
        w && asks_ahead(p, own.b0, own.b1, K, count);  // a lone step has none where it meets zeros
    lane.division.panels(p, K, count, {split_units, split_units, i % 2 != 0},
                         [&](int64_t b, int panels, int64_t next) {
                           const int64_t cols = p.columns(b);
                           const T* coming = ahead && next >= 0 ? w + p.stream(next, K) : nullptr;
                           const Coming<E> next_panel{coming, coming ? p.columns(next) * K : 0, count};
                           row_blocks(count, p.vectors(b), [&](int64_t m, int r) {
                             multiply(b, panels, m, r, next_panel);
                             for (int q = 0; q < panels * r; q++)
                               use(b + q / r, m + q % r, lane.tile + q * cols);
                           });
                         });
  }

  // Rows whose latest gate gradients lie in the chunk buffer, which the next chunk overwrites, are saved.
  void keep_boundary(Direction& dir, const Share& share, Lane& lane) {
    const int64_t N = args_.N, S = C::kSlots * args_.H;
    // With rows split a thread has seen only its own rows: the last appearance is found from the list.
    for (int64_t m = lane.list.rows; m-- > 0;) lane.next[lane.list.n[m]] = dir.dg + m * S;
    if (whole_) return;
    for (int64_t n = 0; n < N; n++) {
      if (!lane.next[n] || lane.next[n] == dir.carry + n * S) continue;
      if (n >= share.first(N) && n < share.last(N))
        std::memcpy(dir.carry + n * S, lane.next[n], S * sizeof(T));
      lane.next[n] = dir.carry + n * S;
    }
  }

  void weight_grads(int d, Lane& lane, bool add) {
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
    outer(d, lane, jobs, count, add);
  }

  // The products of the jobs, which have room for one more, and that of a projection.
  void outer(int d, Lane& lane, OuterJob<E>* jobs, int count, bool add) {
    Direction& dir = dir_[d];
    const int64_t H = args_.H;
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
    outer_products<E>(jobs, count, operands, dir.mid ? 3 : 2, lane.list.rows, dir.outer, add, lane.division,
                      dir.barrier);
  }

  // dh0 and dc0 of rows [i0, i1): one more step of the recurrent matmul, cut where the first step resets.
  void initial_grads(int d, const Share& share, Lane& lane, int64_t i0, int64_t i1) {
    if (!args_.dh0 && !args_.dc0) return;
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H;
    const T* zero = reinterpret_cast<const T*>(zero_);
    if (C::kCellState)
      for (int64_t n = i0; n < i1; n++)
        convert_row(static_cast<IO*>(args_.dc0) + (d * N + n) * H, cut_at_start(d, n) ? zero : dir.dc + n * H,
                    H);
    if (noise_.state())
      for (int64_t n = 0; n < N; n++) lane.masks.rows[n] = lane.masks.first(n);
    if (direct_) return direct_initial_grads(d, share, lane);
    for (int64_t n = i0; n < i1; n++) lane.a_rows[n] = cut_at_start(d, n) ? zero : lane.next[n];
    for (int64_t b = 0; b < hh_.blocks; b++) {
      row_blocks(i1 - i0, hh_.vectors(b), [&](int64_t first, int r) {
        const int64_t n = i0 + first;
        state_product(dir, lane, b, 1, n, r, {});
        for (int q = 0; q < r; q++)
          put_initial_grad(d, lane, n + q, hh_.first(b), hh_.units(b), lane.tile + q * hh_.columns(b));
      });
    }
  }
  bool cut_at_start(int d, int64_t n) const { return seq_.resets(first_time(d, n), n); }

  // `width` columns of row n's dh0 from u0 on: the product, and what reached h_0 beside it.
  void put_initial_grad(int d, const Lane& lane, int64_t n, int64_t u0, int64_t width, const T* product) {
    IO* dh0 = static_cast<IO*>(args_.dh0) + (d * args_.N + n) * args_.O + u0;
    const bool carry = carry_h_ && !cut_at_start(d, n);
    each_vector<V>(static_cast<int>(width), [&](int u, auto w) {
      V v = load_as<V>(product + u, w);
      if (noise_.state()) v = v * MaskRows<E>{noise_, lane.masks.rows + n}.state(0, u0 + u);
      if (carry) v = v + load_as<V>(dir_[d].dh + n * args_.O + u0 + u, w);
      store_as<V>(dh0 + u, v, w);
    });
  }

  void direct_initial_grads(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H, O = args_.O;
    const int64_t c0 = first_column(O, share.id, share.count),
                  c1 = first_column(O, share.id + 1, share.count);
    const auto* w = static_cast<const IO*>(args_.weights[d].w_hh);
    bool add = false;
    for (const auto& piece : C::kPieces) {
      for (int64_t n = 0; n < N; n++) lane.a_rows[n] = lane.next[n] + piece[0] * H;
      direct_product<E>(lane.a_rows, N, w + piece[1] * H * O, O, piece[2] * H, c0, c1, dir.dh_row, O, add);
      add = true;
    }
    for (int64_t n = 0; n < N; n++) {
      if (cut_at_start(d, n)) std::memset(dir.dh_row + n * O + c0, 0, (c1 - c0) * sizeof(T));
      put_initial_grad(d, lane, n, c0, c1 - c0, dir.dh_row + n * O + c0);
    }
  }

  // Bias gradients from the column sums, and 16-bit copies of what was accumulated in T.
  void finish_weights(int d, const Share& share) {
    Direction& dir = dir_[d];
    const auto& out = args_.grads[d];
    const int64_t H = args_.H, G = gates_ * H;
    if constexpr (kCast) {
      auto part = [&](void* dst, const T* src, int64_t n) {
        const int64_t a = share.first(n), b = share.last(n);
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
