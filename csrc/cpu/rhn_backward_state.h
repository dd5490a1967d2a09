// What a Recurrent Highway backward call holds: its plan, and where its buffers lie in the workspace.
#pragma once
#include "outer.h"
#include "rhn_forward.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class E>
struct RhnBackwardState {
  using T = typename E::T;
  static constexpr int64_t kTile = kMaxRows * kMaxVectors * E::W;
  static constexpr int64_t kStateBlocks = 8;  // whose states a thread makes at a time
  struct Lane {                               // per thread
    RowList list;
    const T** next;  // first micro-step's gate gradients of each batch row's next step, or zeros
    const T** a_rows;
    const T** x;  // per row of the chunk
    const T** first;
    T** dx;
    RhnGradRow<T>* rows;
    RhnStateRow<T>* states;
    RhnRow<T>* forward;  // only to recompute
    const T** operand;
    T* tile;
    Division division;
    Lane(Arena& a, const RhnBackwardState& b)
        : list(a, b.steps_, b.args_.N),
          next(a.take<const T*>(b.args_.N)),
          a_rows(a.take<const T*>(b.capacity_)),
          x(a.take<const T*>(b.capacity_)),
          first(a.take<const T*>(b.capacity_)),
          dx(a.take<T*>(b.capacity_)),
          rows(a.take<RhnGradRow<T>>(b.args_.N)),
          states(a.take<RhnStateRow<T>>(b.args_.N)),
          forward(a.take<RhnRow<T>>(b.recompute_ ? b.capacity_ : 0)),
          operand(a.take<const T*>(b.recompute_ ? 2 * kMaxParts * b.capacity_ : 0)),
          tile(a.take<T>(2 * kMaxParts * kTile)) {}
  };
  struct Direction {
    char* packed = nullptr;  // forward packing, only to recompute
    T *w_hh, *w_ih = nullptr;
    int64_t lent = 0;  // micro-steps whose packed weights lie where their gradients will be
    T* dz;             // (depth, rows, G H), recomputed gates until they are gradients
    T *s, *u;  // states before each micro-step (depth, rows, H), their masked copies (depth, groups, rows, H)
    T *carry, *ds;
    T *x_masked, *dx = nullptr;
    T *outer, *operand[2 * kMaxParts];
    Claim* claims;
    Barrier barrier;
  };

  const RhnBackwardArgs& args_;
  const Plan plan_;
  const RhnLayout<E> layout_;
  const RhnCell<E> cell_;
  const Sequence seq_;
  const RhnTapes<const T> tapes_;
  const int64_t width_;             // G H
  const int64_t steps_, capacity_;  // of a chunk: steps, rows
  const bool recompute_;
  const int s_pieces_, x_pieces_;  // products apart, where each gate has its own mask
  Panels<E> hh_, ih_;
  T* zero_;
  Direction dir_[2];
  Arena lanes_;
  size_t lane_bytes_ = 0;
  Barrier all_;

  RhnBackwardState(const RhnBackwardArgs& args, Arena& arena)
      : args_(args),
        plan_(rhn_plan(args)),
        layout_(args),
        cell_(RhnCell<E>::of(args.gates, args.linear)),
        seq_(args, arena),
        tapes_(args, seq_),
        width_(args.gates * args.H),
        steps_(rhn_chunk_steps(args, args.want_weights)),
        capacity_(steps_ * args.N),
        recompute_(!args.tape),
        s_pieces_(args.s_groups > 1 ? args.gates : 1),
        x_pieces_(args.x_groups > 1 ? args.gates : 1),
        hh_(even_panels<E>(1, args.H, plan_.units ? imax(1, plan_.threads / args.directions) : 1)),
        ih_(1, args.I, kNarrow) {
    const int64_t N = args.N, H = args.H, I = args.I, L = args.depth;
    zero_ = arena.take<T>(width_);
    if (arena.base) std::memset(zero_, 0, width_ * sizeof(T));
    for (int d = 0; d < args.directions; d++) {
      Direction& r = dir_[d];
      r.claims = Division::room(arena, plan_.threads);
      if (recompute_) r.packed = arena.take<char>(layout_.bytes);
      // One chunk's weights have served before a gradient is written; padding may make them longer.
      const int64_t packed = hh_.elements(width_);
      if (args.want_weights && steps_ == args.T) r.lent = L * width_ * H / packed;
      r.w_hh = arena.take<T>((L - r.lent) * packed);
      if (args.dx.data) r.w_ih = arena.take<T>(ih_.elements(width_));
      r.dz = arena.take<T>(L * capacity_ * width_);
      r.s = arena.take<T>(L * capacity_ * H);
      r.u = args.s_groups ? arena.take<T>(L * args.s_groups * capacity_ * H) : r.s;
      r.carry = arena.take<T>(N * width_);
      r.ds = arena.take<T>(N * H);
      r.x_masked = arena.take<T>(args.x_groups * capacity_ * I);
      // The second direction's dx is added when both are complete.
      if (args.dx.data && d == 1) r.dx = arena.take<T>(args.T * N * I);
      if (!args.want_weights) continue;
      const int64_t K = imin(kOuterK, capacity_);
      r.outer = arena.take<T>(outer_elements(plan_.threads, K));
      for (int o = 0; o < operands(true); o++)
        r.operand[o] = arena.take<T>(((o < x_pieces_ ? I : H) + kMaxVectors * E::W) * K);
    }
    Arena sizing;
    Lane measure(sizing, *this);
    lane_bytes_ = sizing.used;
    lanes_ = {arena.take<char>(lane_bytes_ * plan_.threads), 0};
  }

  int operands(bool with_x) const { return s_pieces_ + (with_x ? x_pieces_ : 0); }
  int64_t time(int d, int64_t s) const { return d ? args_.T - 1 - s : s; }
  const T* mask_row(const void* mask, int groups, int64_t width, int d, int64_t n, int p = 0) const {
    return static_cast<const T*>(mask) + ((int64_t(d) * groups + p) * args_.N + n) * width;
  }
  T* recurrent(int d, int64_t l) const {  // packed weights of micro-step l
    const int64_t lent = dir_[d].lent, size = hh_.elements(width_);
    return l < lent ? static_cast<T*>(args_.grads[d].w_hh) + l * size : dir_[d].w_hh + (l - lent) * size;
  }
  const T* state_mask(int d, int64_t n) const {
    return args_.s_groups ? mask_row(args_.s_mask, args_.s_groups, args_.H, d, n) : zero_;
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
