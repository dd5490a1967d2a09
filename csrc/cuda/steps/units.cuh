// The pointwise part of a step for one unit of one row: the cells of core/cells.cuh with their state in global memory, where only
// the thread that has the unit in this launch touches it.
//
// What the next product must read differently is written differently: a state that is reset before the next step, and in backward
// what a reset or a row's end cuts, are zeros in the operand. Products know nothing of sequences.
#pragma once
#include "../core/cells.cuh"
#include "params.h"

namespace fastrnn::cuda {

// A launch's place in a call: step s of one direction is time t. Backward walks against the forward steps.
template <class Params, bool Backward>
struct StepPlace {
  const Params& p;
  const int direction, s;
  const bool reverse;
  const Walk walk;
  const int t;
  FASTRNN_DEVICE StepPlace(const Params& params, int d, int step)
      : p(params),
        direction(d),
        s(step),
        reverse(p.dir[d].reverse),
        walk{p.T, reverse != Backward},
        t(walk.at(s)) {}
  // State of a row, as the cell meets it: (N, width) fp32.
  FASTRNN_DEVICE static int64_t at(int n, int width, int j) { return static_cast<int64_t>(n) * width + j; }
};

FASTRNN_DEVICE Factors factors_at(const Draw& draw, int t, int n, int j) {
  const float drop = draw.drop(t, n, j), one = 1.f;
  return {draw.is(DropKind::update) ? drop : one,
          draw.is(DropKind::cell) ? drop : one,
          draw.is(DropKind::state) ? drop : one,
          draw.factor(Mask::zoneout_h, t, n, j),
          draw.factor(Mask::zoneout_c, t, n, j),
          draw.zones(Mask::zoneout_h),
          draw.zones(Mask::zoneout_c)};
}

template <class D>
FASTRNN_DEVICE float optional_row(const Rows& r, int t, int n, int j) {
  return r.data ? D::load(row_at<const typename D::Elem>(r, t, n) + j) : 0.f;
}

template <class D, bool kLinear = false>
class ForwardUnits {
  using Elem = typename D::Elem;
  using A = Activations<kLinear>;

 public:
  FASTRNN_DEVICE ForwardUnits(const StepsForwardParams& params, int direction, int s)
      : q_(params, direction, s),
        p_(params),
        d_(params.dir[direction]),
        w_(params.work[direction]),
        draw_(params.noise, q_.reverse) {}

  FASTRNN_DEVICE bool live(int n) const { return q_.t < row_length(p_, n); }
  FASTRNN_DEVICE float old_cell(int n, int j) const {
    return reset_at(p_, q_.t, n) ? 0.f : w_.c[q_.at(n, p_.H, j)];
  }
  FASTRNN_DEVICE Factors factors(int n, int j) const { return factors_at(draw_, q_.t, n, j); }
  FASTRNN_DEVICE float input(int n, int row) const {
    if (p_.wx_is_float) return prim::load_constant(row_at<const float>(d_.wx, q_.t, n) + row);
    return D::load(row_at<const Elem>(d_.wx, q_.t, n) + row);
  }

  // Phase `Phase` of a cell; sum(g): the product's g-th gate of this unit.
  template <class Cell, int Phase, class Sum>
  FASTRNN_DEVICE void cell(int n, int j, const Sum& sum) const {
    constexpr GateRun kRun = Cell::kShape.sums[Phase];
    constexpr bool kLast = Phase == Cell::kPhases - 1;
    const int64_t at = q_.at(n, p_.H, j);
    if (!live(n)) {
      if (!kLast) return;
      if (Cell::kHasCell) keep_cell(n, j, 0.f, false);
      if (!p_.projected) dead(n, j);
      return;
    }
    Factors by = factors(n, j);
    if (p_.projected) by.zones_h = false;  // the projection's result is the state
    const bool cleared = reset_at(p_, q_.t, n) && !mutated(Mutation::reset_ignored);
    State state = {};
    if (!p_.projected) state.h = cleared ? 0.f : w_.h[at];
    if (Cell::kHasCell) state.c = cleared ? 0.f : w_.c[at];
    if (Cell::kPhases == 2 && Phase == 1) state.held = w_.held[at];
    float x[4] = {}, r[4] = {}, tape[4];
    FASTRNN_UNROLL
    for (int g = 0; g < kRun.count; g++) {
      x[g] = input(n, (kRun.first + g) * p_.H + j);
      r[g] = sum(g);
    }
    const float bias = d_.bias_n ? prim::load_constant(d_.bias_n + j) : 0.f;
    const float out = Cell::template forward<A, Phase>(state, x, r, bias, tape, by);
    constexpr int kEnd = kLast ? kTapeOf<Cell, true> : kRun.first + kRun.count;
    FASTRNN_UNROLL
    for (int g = kRun.first; g < kEnd; g++) put_tape(n, j, g, tape[g]);
    if (!kLast) {
      w_.held[at] = state.held;
      middle(n, j, out);
      return;
    }
    if (Cell::kHasCell) keep_cell(n, j, state.c, true);
    send(n, j, out);
  }

  FASTRNN_DEVICE void put_tape(int n, int j, int slot, float v) const {
    if (d_.tape.data) D::store(row_at<Elem>(d_.tape, q_.t, n) + slot * p_.H + j, v);
  }
  FASTRNN_DEVICE float zoned_state(int n, int j, float h) const {
    if (!draw_.zones(Mask::zoneout_h)) return h;
    const float old = reset_at(p_, q_.t, n) ? 0.f : w_.h[q_.at(n, p_.O, j)];
    return zoneout<A>(draw_.factor(Mask::zoneout_h, q_.t, n, j), h, old);
  }
  // What the cell makes: the state, or what the projection multiplies.
  FASTRNN_DEVICE void send(int n, int j, float out) const {
    if (!p_.projected) return keep_state(n, j, out);
    middle(n, j, out);
    if (d_.mid.data) D::store(row_at<Elem>(d_.mid, q_.t, n) + j, out);
  }
  FASTRNN_DEVICE void keep_cell(int n, int j, float c, bool live) const {
    const int64_t at = q_.at(n, p_.H, j);
    if (d_.cells.data) prim::store(row_at<float>(d_.cells, q_.t, n) + j, c);
    if (!live) return;
    w_.c[at] = c;
    if (d_.c_n && last(n)) D::store(static_cast<Elem*>(d_.c_n) + at, c);
  }
  // Past a row's end.
  FASTRNN_DEVICE void dead(int n, int j) const { D::store(row_at<Elem>(d_.y, q_.t, n) + j, 0.f); }

  // The projection's result.
  FASTRNN_DEVICE void projection(int n, int j, float sum) const {
    if (live(n)) return keep_state(n, j, zoned_state(n, j, sum));
    dead(n, j);
  }

 private:
  FASTRNN_DEVICE bool last(int n) const { return q_.t == (q_.reverse ? 0 : row_length(p_, n) - 1); }
  FASTRNN_DEVICE void middle(int n, int j, float v) const {
    D::store(static_cast<Elem*>(w_.middle) + q_.at(n, p_.product[1].inner, j), v);
  }
  FASTRNN_DEVICE void keep_state(int n, int j, float h) const {
    const int64_t at = q_.at(n, p_.O, j);
    D::store(row_at<Elem>(d_.y, q_.t, n) + j, h);
    w_.h[at] = h;
    if (last(n)) {
      if (d_.h_n) D::store(static_cast<Elem*>(d_.h_n) + at, h);
      return;
    }
    // As the next step's product takes it: masked after it was rounded, as the weight gradients' operand is.
    const int next = q_.walk.at(q_.s + 1);
    float operand = h;
    if (draw_.is(DropKind::state))
      operand = D::round(h) * draw_.drop(mutated(Mutation::other_step_mask) ? q_.t : next, n, j);
    if (reset_at(p_, next, n) && !mutated(Mutation::reset_ignored)) operand = 0.f;
    D::store(static_cast<Elem*>(w_.operand[(q_.s + 1) & 1]) + q_.at(n, p_.product[0].inner, j), operand);
  }

  const StepPlace<StepsForwardParams, false> q_;
  const StepsForwardParams& p_;
  const StepsForwardDirection& d_;
  const StepsWork& w_;
  const Draw draw_;
};

template <class D, bool kLinear = false>
class BackwardUnits {
  using Elem = typename D::Elem;
  using A = Activations<kLinear>;

 public:
  FASTRNN_DEVICE BackwardUnits(const StepsBackwardParams& params, int direction, int s)
      : q_(params, direction, s),
        p_(params),
        d_(params.dir[direction]),
        w_(params.work[direction]),
        draw_(params.noise, q_.reverse) {}

  FASTRNN_DEVICE bool live(int n) const { return q_.s < p_.T && q_.t < row_length(p_, n); }
  FASTRNN_DEVICE bool cleared(int n) const {
    return reset_at(p_, q_.t, n) && !mutated(Mutation::reset_ignored);
  }
  FASTRNN_DEVICE Factors factors(int n, int j) const { return factors_at(draw_, q_.t, n, j); }

  // All that reaches h_t: what was carried here, what the product of the step walked before sends, dy. sum is the gradient of the
  // masked state that that step read.
  FASTRNN_DEVICE float arriving(int n, int j, float sum) const {
    const int64_t at = q_.at(n, p_.O, j);
    if (q_.s > 0 && draw_.is(DropKind::state)) sum *= draw_.drop(q_.walk.at(q_.s - 1), n, j);
    const float dh = w_.h[at] + sum;
    w_.h[at] = dh;  // stays, where the row has no step or there is none any more
    return live(n) ? dh + optional_row<D>(d_.dy, q_.t, n, j) : dh;
  }
  // What goes to the state before beside the product.
  FASTRNN_DEVICE void carry_h(int n, int j, float dh) const {
    w_.h[q_.at(n, p_.O, j)] = cleared(n) ? 0.f : dh;
  }
  FASTRNN_DEVICE void carry_c(int n, int j, float dc) const {
    w_.c[q_.at(n, p_.H, j)] = cleared(n) ? 0.f : dc;
  }

  // The gradient of the projection's result.
  FASTRNN_DEVICE void projection(int n, int j, float sum) const {
    float dh = arriving(n, j, sum);
    if (q_.s == p_.T) return;
    if (!live(n)) {
      if (d_.dmid.data) D::store(row_at<Elem>(d_.dmid, q_.t, n) + j, 0.f);
      return;
    }
    float old = 0.f;
    if (draw_.zones(Mask::zoneout_h))
      old = zoneout_backward<A>(draw_.factor(Mask::zoneout_h, q_.t, n, j), dh);
    carry_h(n, j, old);
    middle(n, 0, j, dh);
    if (d_.dmid.data) D::store(row_at<Elem>(d_.dmid, q_.t, n) + j, dh);
  }

  // The state of the cell before step t of a live row, as forward had it.
  FASTRNN_DEVICE float old_cell(int n, int j) const {
    const int before = q_.walk.backwards ? q_.t - 1 : q_.t + 1;
    if (cleared(n)) return 0.f;
    if (before >= 0 && before < row_length(p_, n))
      return prim::load_constant(row_at<const float>(d_.cells, before, n) + j);
    return initial(d_.c0, q_.at(n, p_.H, j));
  }
  FASTRNN_DEVICE float tape(int n, int j, int slot) const {
    return D::load(row_at<const Elem>(d_.tape, q_.t, n) + slot * p_.H + j);
  }

  // Phase `Phase` of a cell on a live row: gradients g of its recurrent part's gates; returns n's on the input side.
  template <class Cell, int Phase>
  FASTRNN_DEVICE float cell_gradient(int n, int j, float sum, float (&g)[4]) const {
    const int64_t at = q_.at(n, p_.H, j);
    Carry carry = {};
    Saved saved = {};
    Factors by = factors(n, j);
    float dh = sum;
    if (p_.projected)
      by.zones_h = false;
    else if (Phase == 0)
      dh = arriving(n, j, sum);
    else
      carry.dh = w_.h[at], carry.held = w_.held[at];
    // Without a tape of its own an Elman layer has h_t, which is the same where zoneout is off.
    FASTRNN_UNROLL
    for (int k = 0; k < (Cell::kTape ? Cell::kTape : 1); k++)
      saved.gate[k] =
          Cell::kTape || d_.tape.data ? tape(n, j, k) : D::load(row_at<const Elem>(d_.y, q_.t, n) + j);
    if (Cell::kReadsPrevious) saved.h_prev = old_state(n, j);
    if (Cell::kHasCell) {
      saved.c = prim::load_constant(row_at<const float>(d_.cells, q_.t, n) + j);
      saved.c_prev = old_cell(n, j);
      carry.dc = arriving_c(n, j);
    }
    const float n_input = Cell::template backward<A, Phase>(carry, saved, dh, g, by);
    const bool last = Phase == Cell::kPhases - 1;
    if (Cell::kHasCell) carry_c(n, j, carry.dc);
    if (!p_.projected) w_.h[at] = last && cleared(n) ? 0.f : carry.dh;
    if (!last) w_.held[at] = carry.held;
    return n_input;
  }
  FASTRNN_DEVICE float arriving_c(int n, int j) const {
    const float more =
        d_.dcells.data ? prim::load_constant(row_at<const float>(d_.dcells, q_.t, n) + j) : 0.f;
    return w_.c[q_.at(n, p_.H, j)] + more;
  }

  // The whole of a phase for cells without layer norm.
  template <class Cell, int Phase>
  FASTRNN_DEVICE void cell(int n, int j, float sum) const {
    constexpr GateRun kRun = Cell::kShape.published[Phase];
    constexpr bool kLast = Phase == Cell::kPhases - 1;
    float g[4] = {}, n_input = 0.f;
    if (live(n))
      n_input = cell_gradient<Cell, Phase>(n, j, sum, g);
    else if (Phase == 0 && !p_.projected)
      arriving(n, j, sum);
    if (q_.s == p_.T) return;
    const bool cut = kLast && live(n) && cleared(n);
    FASTRNN_UNROLL
    for (int v = 0; v < kRun.count; v++) {
      const int k = kRun.first + v;
      if (kLast)
        operand(n, v, j, cut ? 0.f : g[k]);
      else
        middle(n, v, j, g[k]);
      const bool twofold = Cell::kTwoGradients;
      if (twofold) D::store(row_at<Elem>(d_.dgates_h, q_.t, n) + k * p_.H + j, g[k]);
      D::store(row_at<Elem>(d_.dgates, q_.t, n) + k * p_.H + j,
               twofold && v == kRun.count - 1 ? n_input : g[k]);
    }
  }
  // Value v of the row that the next step's product reads.
  FASTRNN_DEVICE void operand(int n, int v, int j, float g) const {
    D::store(
        static_cast<Elem*>(w_.operand[(q_.s + 1) & 1]) + q_.at(n, p_.product[0].inner, v * p_.H_padded + j),
        g);
  }

 private:
  FASTRNN_DEVICE float initial(const void* state, int64_t at) const {
    return state ? D::load(static_cast<const Elem*>(state) + at) : 0.f;
  }
  FASTRNN_DEVICE float old_state(int n, int j) const {
    const int before = q_.walk.backwards ? q_.t - 1 : q_.t + 1;
    if (cleared(n)) return 0.f;
    if (before >= 0 && before < row_length(p_, n)) return D::load(row_at<const Elem>(d_.y, before, n) + j);
    return initial(d_.h0, q_.at(n, p_.O, j));
  }
  FASTRNN_DEVICE void middle(int n, int v, int j, float g) const {
    D::store(static_cast<Elem*>(w_.middle) + q_.at(n, p_.product[1].inner, v * p_.H_padded + j), g);
  }

  const StepPlace<StepsBackwardParams, true> q_;
  const StepsBackwardParams& p_;
  const StepsBackwardDirection& d_;
  const StepsWork& w_;
  const Draw draw_;
};

}  // namespace fastrnn::cuda
