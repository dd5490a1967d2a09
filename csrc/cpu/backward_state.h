// What a backward call holds: its plan, where its buffers lie in the workspace, and what each thread owns.
#pragma once
#include "ahead.h"
#include "cells_cpu_backward.h"
#include "claims.h"
#include "direct.h"
#include "norm.h"
#include "plan.h"
#include "sequence.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int64_t kGradRows = 512;

// From this size on weight_ih is packed a few blocks at a time, as many as stay in L2, where each thread has some.
constexpr int64_t kStreamBytes = 1 << 20, kStreamBlocks = 4, kRunBytes = 512 << 10;

template <class E, class C>
struct BackwardState {
  using T = typename E::T;
  using IO = typename E::IO;
  static constexpr bool kCast = !std::is_same<IO, T>::value;
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
    Division division;
    T* panels;  // of the blocks of weight_ih in use, where they are packed when their turn comes
    Lane(Arena& a, const BackwardState& b)
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
          masks(a, b.noise_, b.args_.N),
          panels(b.stream_ ? a.take<T>(b.stream_ * b.ih_.columns(0) * b.gates_ * b.args_.H) : nullptr) {}
  };
  struct Direction {
    char* gates = nullptr;  // forward packing, only to recompute
    T *w_hh = nullptr, *w_ih = nullptr, *w_hr = nullptr;
    T *dg, *carry = nullptr, *c0 = nullptr, *dc = nullptr, *dh, *dh_rows = nullptr, *mid = nullptr;
    T *x_cast = nullptr, *h_cast = nullptr, *dx = nullptr;
    IO* h_in = nullptr;
    T *d_ih = nullptr, *d_hh = nullptr, *d_hr = nullptr, *sums = nullptr;
    T *dx_row = nullptr,
      *dh_row = nullptr;  // what a product with unpacked weights makes, before it is rounded
    T *outer = nullptr, *operand[3] = {};
    MaskRoom masks;
    Claim* claims;
    Barrier barrier;
  };

  const BackwardArgs& args_;
  const Plan plan_;
  const PackedLayout<E> layout_;
  const Sequence seq_;
  const int gates_;
  const int64_t steps_;  // of a chunk
  const bool whole_;     // one chunk: weight gradients come when the weights have served
  const MaskPlan<T> noise_;
  const bool recompute_;
  const bool carry_h_;  // h_{t-1} has gradients beside the matmul's
  const bool far_;      // the tape lies beyond L2: asked for ahead
  const bool once_;    // one step: weight_ih is used once, weight_hh only where initial states have gradients
  const bool direct_;  // one step of few rows: nothing is packed
  Panels<E> hh_, ih_, hr_;
  const int64_t stream_;  // blocks of weight_ih that are packed at a time, or 0: all at the start
  char* zero_;
  Direction dir_[2];
  Arena lanes_;
  size_t lane_bytes_ = 0;
  Barrier all_;

  BackwardState(const BackwardArgs& args, Arena& arena)
      : args_(args),
        plan_(choose_plan(args)),
        layout_(args),
        seq_(args, arena),
        gates_(gate_count(args.cell)),
        steps_(even_steps(args.T, imax(1, kGradRows / args.N))),
        whole_(steps_ >= args.T),
        noise_(args, C::kTwoStage),
        recompute_(!args.gates && (C::kTape > 0 || args.noise.mixes())),
        carry_h_(C::kCarryH || noise_.zones_h()),
        far_(prefetches(kTape * args.H * sizeof(T), args.N, args.T)),
        once_(args.T == 1 && !args.projected && !C::kTwoStage),
        direct_(once_ && args.N <= kDirectRows),
        hh_(1, args.O, block_vectors(args.O)),
        ih_(1, args.I, kNarrow),
        hr_(1, args.H, block_vectors(args.H)),
        stream_(blocks_at_once()) {
    const int64_t N = args.N, H = args.H, O = args.O, I = args.I;
    const int64_t M = steps_ * N, G = gates_ * H, S = C::kSlots * H;
    // Pointers are null while sizes are added up: conditions below must not test them.
    const bool has_mid = args.projected || C::kTwoStage;
    const size_t zeros = imax(S, O) * sizeof(T);
    zero_ = arena.take<char>(zeros);
    if (arena.base) std::memset(zero_, 0, zeros);
    for (int d = 0; d < args.directions; d++) {
      Direction& r = dir_[d];
      r.masks = MaskRoom(arena, noise_, M, N);
      r.claims = Division::room(arena, plan_.threads);
      if (recompute_) r.gates = arena.take<char>(layout_.bytes);
      if (args.want_weights) {
        r.sums = arena.take<T>(S);
        r.d_ih = kCast ? arena.take<T>(G * I) : static_cast<T*>(args.grads[d].w_ih);
        r.d_hh = kCast ? arena.take<T>(G * O) : static_cast<T*>(args.grads[d].w_hh);
        if (args.projected) r.d_hr = kCast ? arena.take<T>(O * H) : static_cast<T*>(args.grads[d].w_hr);
        const int64_t K = imin(kOuterK, M);
        r.outer = arena.take<T>(outer_elements(plan_.threads, K));
        const int64_t widths[3] = {I, O, has_mid ? H : 0};
        for (int o = 0; o < 3; o++) r.operand[o] = arena.take<T>((widths[o] + kMaxVectors * E::W) * K);
      }
      auto packed = [&](const Panels<E>& p, int64_t K, T* gradient) {
        return in_gradient(p) ? gradient : arena.take<T>(p.elements(K));
      };
      if (direct_) {
        r.dh_row = arena.take<T>(N * O);
        if (kCast) r.dx_row = arena.take<T>(N * I);
      } else {
        if (!once_ || args.dh0 || args.dc0) r.w_hh = packed(hh_, G, r.d_hh);
        if (args.dx.data && !stream_) r.w_ih = packed(ih_, G, r.d_ih);
      }
      if (args.projected) r.w_hr = packed(hr_, O, r.d_hr);
      r.dg = arena.take<T>(M * S);
      if (!whole_) r.carry = arena.take<T>(N * S);
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
    }
    Arena sizing;
    Lane measure(sizing, *this);
    lane_bytes_ = sizing.used;
    lanes_ = {arena.take<char>(lane_bytes_ * plan_.threads), 0};
  }

  // Chunks of at most `most` steps, as even as can be: their buffers are then no larger than they have to be.
  static int64_t even_steps(int64_t T, int64_t most) { return ceil_div(T, ceil_div(T, most)); }
  // Whether a packed matrix lies where its gradient will be: as large as that, and not needed again.
  bool in_gradient(const Panels<E>& p) const { return whole_ && args_.want_weights && p.total() == p.width; }
  int64_t blocks_at_once() const {
    const int64_t block = ih_.columns(0) * gates_ * args_.H * sizeof(T);
    if (!args_.dx.data || direct_ || (in_gradient(ih_) && !once_)) return 0;
    if (ih_.blocks < kStreamBlocks * plan_.threads) return 0;
    if (!once_ && ih_.blocks * block < kStreamBytes) return 0;
    return imax(2, imin(8, kRunBytes / block));
  }
  // Threads that divide a narrow matrix get half-width blocks, else some would have none.
  int block_vectors(int64_t width) const { return plan_.units && width <= 8 * E::W ? 2 : kNarrow; }
  int64_t time(int d, int64_t s) const { return d ? args_.T - 1 - s : s; }
  int64_t first_time(int d, int64_t n) const { return d && seq_.ragged() ? seq_.length(n) - 1 : time(d, 0); }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
