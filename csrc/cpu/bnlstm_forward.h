// Forward of one batch-normalised LSTM layer: all steps, both directions, inside one team call.
//
// A thread owns blocks of units with all rows of the batch, so every statistic, of the four gate columns and of
// the cell, is its own: one barrier a step, as for a plain LSTM cut by units. The input term of a chunk of steps
// is one matmul; it is normalised step by step off the critical path. A block's pre-activations of a step
// (rows x 64 floats) stay in L1 between matmul, statistics and gates.
// With a tape the normalised terms are written to it in the order of the blocks, so nothing is copied.
#pragma once
#include "../cells/bnlstm.h"
#include "bnlstm_ahead.h"
#include "bnlstm_columns.h"
#include "claims.h"
#include "plan.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class E, bool Linear>
class BnLstmForward {
  using T = typename E::T;
  using V = typename E::V;
  using Math = Act<V, Linear>;
  static constexpr int W = E::W;

 public:
  static size_t workspace(const BnLstmForwardArgs& args) {
    Arena arena;
    BnLstmForward f(args, arena);
    return arena.used;
  }
  static void run(const BnLstmForwardArgs& args) {
    Arena arena{static_cast<char*>(args.workspace), 0};
    BnLstmForward f(args, arena);
    f.clear_tape_ends();
    team(f.plan_.threads, [&](int tid, int nt) { f.work(tid, nt); });
  }

 private:
  struct Row {
    const T* c_prev;
    T *c, *y;
  };
  struct Lane {  // per thread
    RowList list;
    const T** x_rows;
    const T** h_rows;
    Row* rows;
    T *recurrent, *gate, *cell;
    Columns<E>* columns;
    const char** wanted;
    Division division;
    Lane(Arena& a, const BnLstmForward& f)
        : list(a, f.steps_, f.args_.N),
          x_rows(a.take<const T*>(f.steps_ * f.args_.N)),
          h_rows(a.take<const T*>(f.args_.N)),
          rows(a.take<Row>(f.args_.N)),
          recurrent(a.take<T>(f.args_.tape ? 0 : f.args_.N * kBlockColumns<E>)),
          gate(a.take<T>(f.args_.N * W)),
          cell(a.take<T>(f.args_.N * W)),
          columns(a.take<Columns<E>>(1)),
          wanted(a.take<const char*>(imax(f.steps_ * f.args_.N * pieces_of<E>(f.args_.I),
                                          2 * pieces_of<E>(f.args_.N * kBlockColumns<E>) +
                                              pieces_of<E>(f.args_.H * kBlockColumns<E>)))) {}
  };
  struct Direction {
    char* packed;
    T *c, *input;                  // input: terms of the whole sequence, or of a chunk
    Columns<E>* shared = nullptr;  // of each block's input term, where all steps share it
    Claim* claims;
    Barrier barrier;
  };
  const BnLstmForwardArgs& args_;
  const Plan plan_;
  const PackedLayout<E> layout_;
  const Panels<E>& panels_;
  const Sequence seq_;
  const BnSteps steps_of_;
  const int64_t steps_;   // per chunk
  const int64_t stored_;  // rows of a whole-sequence buffer
  const bool far_;        // the tape lies beyond L2: asked for ahead
  const bool whole_;      // the input term of all steps is kept: for the tape, or for its statistics
  T* zero_;
  Direction dir_[2];
  Arena lanes_;
  size_t lane_bytes_ = 0;
  Barrier all_;

  BnLstmForward(const BnLstmForwardArgs& args, Arena& arena)
      : args_(args),
        plan_(choose_plan(args)),
        layout_(args),
        panels_(layout_.stage[0].panels),
        seq_(args, arena),
        steps_of_(args, seq_, arena),
        steps_(imin(args.T, imax(1, kChunkRows / args.N))),
        stored_(args.tape ? seq_.rows() : args.T * args.N),
        far_(args.tape && prefetches(8 * args.H * sizeof(T), args.N, args.T)),
        whole_(args.tape || (args.sequence && args.batch)) {
    const int64_t H = args.H;
    zero_ = arena.take<T>(4 * H);
    if (arena.base) std::memset(zero_, 0, 4 * H * sizeof(T));
    for (int d = 0; d < args.directions; d++) {
      dir_[d].packed = args.packed ? static_cast<char*>(const_cast<void*>(args.packed)) + d * layout_.bytes
                                   : arena.take<char>(layout_.bytes);
      dir_[d].c = arena.take<T>(args.N * H);
      if (args.tape)
        dir_[d].input = static_cast<T*>(args.tape) + d * stored_ * bnlstm_tape_width(H);
      else
        dir_[d].input = arena.take<T>((whole_ ? stored_ : steps_ * args.N) * panels_.total());
      dir_[d].claims = Division::room(arena, plan_.threads);
      if (args.sequence) dir_[d].shared = arena.take<Columns<E>>(panels_.blocks);
    }
    Arena sizing;
    Lane measure(sizing, *this);
    lane_bytes_ = sizing.used;
    lanes_ = {arena.take<char>(lane_bytes_ * plan_.threads), 0};
  }

  // The tape has room for the widest set's blocks: what narrower ones leave of it is zero, so that the operator's
  // output does not depend on what was in memory.
  void clear_tape_ends() {
    if (!args_.tape) return;
    const int64_t half = stored_ * bnlstm_tape_width(args_.H) / 2, used = stored_ * panels_.total();
    for (int64_t i = 0; i < 2 * args_.directions; i++)
      std::memset(static_cast<T*>(args_.tape) + i * half + used, 0, (half - used) * sizeof(T));
  }

  void work(int tid, int nt) {
    if (!args_.packed) {
      for (int d = 0; d < args_.directions; d++) {
        const BnLstmWeights& w = args_.weights[d];
        pack_direction<E>(args_, layout_, {w.w_ih, w.w_hh, nullptr, nullptr, nullptr}, dir_[d].packed, tid,
                          nt);
      }
      all_.wait(nt);
    }
    Arena mine{lanes_.base + tid * lane_bytes_, 0};
    Lane lane(mine, *this);
    const Share share(args_.directions, tid, nt);
    for (int d = share.direction_first; d < share.direction_last; d++) direction(d, share, lane);
  }

  void direction(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H;
    const int64_t i0 = share.first(N), i1 = share.last(N);
    lane.division.begin(dir.claims, share, args_);
    const PanelRuns own = lane.division.own(panels_, true);
    std::memcpy(dir.c + i0 * H, static_cast<const T*>(args_.c0) + (d * N + i0) * H,
                (i1 - i0) * H * sizeof(T));
    clear_frozen(d, i0, i1);
    dir.barrier.wait(share.count);

    const bool ahead = args_.sequence && args_.batch;  // all of the input term comes before the first step
    if (ahead)
      for (int64_t s0 = 0; s0 < args_.T; s0 += steps_) {
        list_rows(lane, s0);
        input_term(d, share, lane, s0);
      }
    if (args_.sequence) shared_statistics(d, own);
    for (int64_t s0 = 0; s0 < args_.T; s0 += steps_) {
      const int64_t steps = list_rows(lane, s0);
      if (!ahead) input_term(d, share, lane, s0);
      if (args_.sequence) {
        normalise_input(d, own, lane, s0);
        dir.barrier.wait(share.count);
      }
      for (int64_t i = 0; i < steps; i++) {
        step(d, lane, s0, i);
        dir.barrier.wait(share.count);
      }
    }
    final_states(d, i0, i1);
  }

  // Outputs past the ends of rows [i0, i1) are zero.
  void clear_frozen(int d, int64_t i0, int64_t i1) {
    if (!args_.lengths) return;
    const int64_t H = args_.H;
    for (int64_t n = i0; n < i1; n++)
      for (int64_t t = seq_.length(n); t < args_.T; t++) {
        std::memset(seq_.template at<T>(args_.y, t, n) + d * H, 0, H * sizeof(T));
        if (args_.cells.data) std::memset(seq_.template at<T>(args_.cells, t, n) + d * H, 0, H * sizeof(T));
      }
  }

  int64_t list_rows(Lane& lane, int64_t s0) {
    const int64_t steps = imin(steps_, args_.T - s0);
    lane.list.fill(seq_, steps, 0, args_.N, [&](int64_t i) { return s0 + i; });
    return steps;
  }

  // Block b's input term, from row m of the chunk that starts at step s0.
  T* input_at(int d, int64_t b, int64_t s0, int64_t m) {
    const int64_t first = whole_ ? steps_of_.start[s0] : 0, rows = whole_ ? stored_ : steps_ * args_.N;
    return dir_[d].input + rows * panels_.offset(b) + (first + m) * panels_.columns(b);
  }

  void input_term(int d, const Share& share, Lane& lane, int64_t s0) {
    const int64_t M = lane.list.rows, I = args_.I;
    int64_t i = 0;
    for (int64_t m = 0; m < M; m++) {
      while (lane.list.start[i + 1] <= m) i++;
      const int64_t n = lane.list.n[m];
      lane.x_rows[m] = seq_.template at<const T>(args_.x, steps_of_.time(d, s0 + i, n), n);
    }
    const T* w = reinterpret_cast<const T*>(dir_[d].packed + layout_.stage[0].x);
    // The first block's products meet rows that come from far, the others panels that the steps have driven out of L2.
    const int64_t wide = pieces_of<E>(I);
    const char** wanted = lane.wanted;
    for (int64_t m = 0; kWanting && m < M; m++) want<E>(wanted, lane.x_rows[m], I);
    const int64_t first = lane.division.own(panels_, true).b0;
    lane.division.panels(panels_, I, M, {true, true, false, true}, [&](int64_t b, int, int64_t after) {
      const int nv = panels_.vectors(b);
      const int64_t cols = panels_.columns(b);
      const T* at = w + panels_.stream(b, I);
      T* out = input_at(d, b, s0, 0);
      const T* next = M >= kAheadRows && after >= 0 ? w + panels_.stream(after, I) : nullptr;
      const Coming<E> coming{next, next ? panels_.columns(after) * I : 0, M};
      row_blocks(M, nv, [&](int64_t m, int r) {
        if (kWanting && b == first)
          return multiply_wanting<E>(
              lane.x_rows + m, r, at, I, nv, out + m * cols, cols,
              {lane.wanted, M * wide, (m + r) * wide, imin(M, m + 2 * r + 1) * wide, 0});
        multiply_tile<E>(coming, m, lane.x_rows + m, r, at, I, nv, nullptr, 0, out + m * cols, cols);
      });
      if (!args_.sequence) normalise_steps(d, lane, b, s0);
    });
    dir_[d].barrier.wait(share.count);
  }

  // Where the statistics of a term are given, those of step s.
  void given(int d, int term, int64_t s, int gates, int64_t u0, int units, Columns<E>& to) const {
    const auto& g = args_.given[d];
    const int64_t at = imin(s, g.rows[term] - 1) * gates * args_.H + u0;
    to.read(static_cast<const T*>(g.mean[term]) + at, static_cast<const T*>(g.var[term]) + at, gates, args_.H,
            units);
  }
  // Reports the statistics that step s used.
  template <class N>
  void report(int d, int term, int64_t s, int gates, int64_t u0, N units, const Columns<E>& from) const {
    if (!args_.used[term]) return;
    const int64_t steps = term == 0 && args_.sequence ? 1 : args_.T, size = steps * gates * args_.H;
    T* mean = static_cast<T*>(args_.used[term]) + 2 * d * size + s * gates * args_.H + u0;
    from.write(mean, mean + size, gates, args_.H, units);
  }

  void shared_statistics(int d, const PanelRuns& own) {
    const int64_t rows = steps_of_.start[args_.T];
    for (int64_t b = own.b0; b < own.b1; b++) {
      Columns<E>& columns = dir_[d].shared[b];
      const int nv = panels_.vectors(b), units = panels_.units(b);
      const int64_t cols = panels_.columns(b), u0 = panels_.first(b);
      if (steps_of_.input_measured(rows))
        columns.measure(nv, dir_[d].input + stored_ * panels_.offset(b), rows, cols);
      else
        given(d, 0, 0, 4, u0, units, columns);
      report(d, 0, 0, 4, u0, units, columns);
      columns.finish(nv, T(args_.eps));
    }
  }

  // The chunk's input term by the statistics that all steps share ...
  void normalise_input(int d, const PanelRuns& own, Lane& lane, int64_t s0) {
    for (int64_t b = own.b0; b < own.b1; b++)
      dir_[d].shared[b].normalise(panels_.vectors(b), input_at(d, b, s0, 0), lane.list.rows,
                                  panels_.columns(b));
  }
  // ... or block b's by those of each step, as soon as it is there.
  void normalise_steps(int d, Lane& lane, int64_t b, int64_t s0) {
    const int n = panels_.units(b);
    if (n == W)
      normalise_steps(d, lane, b, s0, std::integral_constant<int, W>{});
    else
      normalise_steps(d, lane, b, s0, n);
  }
  template <class N>
  void normalise_steps(int d, Lane& lane, int64_t b, int64_t s0, N units) {
    const int nv = panels_.vectors(b);
    const int64_t cols = panels_.columns(b), u0 = panels_.first(b), steps = imin(steps_, args_.T - s0);
    Columns<E>& columns = *lane.columns;
    for (int64_t i = 0; i < steps; i++) {
      const int64_t count = lane.list.count(i);
      T* x = input_at(d, b, s0, lane.list.start[i]);
      if (steps_of_.input_measured(count))
        columns.measure(nv, x, count, cols);
      else
        given(d, 0, s0 + i, 4, u0, units, columns);
      report(d, 0, s0 + i, 4, u0, units, columns);
      columns.finish(nv, T(args_.eps));
      columns.normalise(nv, x, count, cols);
    }
  }

  void gather(int d, Lane& lane, int64_t s, int64_t first, int64_t count) {
    const int64_t H = args_.H, N = args_.N;
    for (int64_t i = 0; i < count; i++) {
      const int64_t n = lane.list.n[first + i], t = steps_of_.time(d, s, n), before = steps_of_.before(d, t);
      Row& row = lane.rows[i];
      row.y = seq_.template at<T>(args_.y, t, n) + d * H;
      row.c = dir_[d].c + n * H;
      row.c_prev = row.c;
      if (args_.cells.data) {
        if (s > 0) row.c_prev = seq_.template at<const T>(args_.cells, before, n) + d * H;
        row.c = seq_.template at<T>(args_.cells, t, n) + d * H;
      }
      const bool reset = seq_.resets(t, n);
      lane.h_rows[i] = reset    ? zero_
                       : s == 0 ? static_cast<const T*>(args_.h0) + (d * N + n) * H
                                : seq_.template at<const T>(args_.y, before, n) + d * H;
      if (reset) row.c_prev = zero_;
    }
  }

  void step(int d, Lane& lane, int64_t s0, int64_t i) {
    const int64_t s = s0 + i, first = lane.list.start[i], count = lane.list.count(i), H = args_.H;
    gather(d, lane, s, first, count);
    const T* w = reinterpret_cast<const T*>(dir_[d].packed + layout_.stage[0].h);
    const PanelRuns own = lane.division.own(panels_, true);
    const bool ahead = asks_ahead(panels_, own.b0, own.b1, H, count) || (i == 0 && count >= kAheadRows);
    // Every other step walks the blocks backwards: what the last step left in cache comes first.
    lane.division.panels(
        panels_, H, count, {true, true, s % 2 != 0, true}, [&](int64_t b, int, int64_t next) {
          const int64_t cols = panels_.columns(b);
          const int nv = panels_.vectors(b);
          const T* coming = ahead && next >= 0 ? w + panels_.stream(next, H) : nullptr;
          T* a = lane.recurrent;
          if (args_.tape)
            a = dir_[d].input + stored_ * (bnlstm_tape_width(H) / 2 + panels_.offset(b)) +
                (steps_of_.start[s0] + first) * cols;
          const Coming<E> next_panel{coming, coming ? panels_.columns(next) * H : 0, count};
          const T* x = input_at(d, b, s0, first);
          const bool asks = kWanting && far_ && count > 0;
          Wanted wants;
          if (asks) {  // the normalised input term, perhaps the next panel, and the tape that is written
            const char** at = lane.wanted;
            want<E>(at, x, count * cols);
            want<E>(at, next_panel.panel, next_panel.elements);
            const int64_t reads = at - lane.wanted;
            want<E>(at, a, count * cols);
            wants = {lane.wanted, reads, 0, at - lane.wanted, kPieceLines<E>};
          }
          row_blocks(count, nv, [&](int64_t m, int r) {
            if (asks)
              multiply_wanting<E>(lane.h_rows + m, r, w + panels_.stream(b, H), H, nv, a + m * cols, cols,
                                  wants.part(m, r, count));
            else
              multiply_tile<E>(next_panel, m, lane.h_rows + m, r, w + panels_.stream(b, H), H, nv, nullptr, 0,
                               a + m * cols, cols);
          });
          block(d, lane, s, count, b, a, x);
        });
  }

  // Statistics, gates and cell of block b: a and x are its recurrent and its normalised input term.
  void block(int d, Lane& lane, int64_t s, int64_t count, int64_t b, T* a, const T* x) {
    const int n = panels_.units(b);
    if (n == W)
      units(d, lane, s, count, b, a, x, std::integral_constant<int, W>{});
    else
      units(d, lane, s, count, b, a, x, n);
  }

  // block() with n units, a constant where the vectors are whole.
  template <class N>
  void units(int d, Lane& lane, int64_t s, int64_t count, int64_t b, T* a, const T* x, N n) {
    const int64_t u0 = panels_.first(b), cols = panels_.columns(b), H = args_.H;
    const int nv = panels_.vectors(b);
    Columns<E>& columns = *lane.columns;
    if (steps_of_.measured(count))
      columns.measure(nv, a, count, cols);
    else
      given(d, 1, s, 4, u0, n, columns);
    report(d, 1, s, 4, u0, n, columns);
    columns.finish(nv, T(args_.eps));

    const BnLstmWeights& w = args_.weights[d];
    V mean[4], factor[4], gamma_h[4], gamma_x[4], bias[4];
    FASTRNN_UNROLL for (int g = 0; g < 4; g++) {
      mean[g] = load_as<V>(columns.mean + g * n, n);
      factor[g] = load_as<V>(columns.factor + g * n, n);
      gamma_h[g] = load_as<V>(static_cast<const T*>(w.gamma_hh) + g * H + u0, n);
      gamma_x[g] = load_as<V>(static_cast<const T*>(w.gamma_ih) + g * H + u0, n);
      bias[g] = load_as<V>((w.bias ? static_cast<const T*>(w.bias) : zero_) + g * H + u0, n);
    }
    // Vectors in parts are normalised as wholes first: a load that follows the store of another part waits for it.
    constexpr bool kWhole = !std::is_same<N, int>::value;
    if (!kWhole) columns.normalise(nv, a, count, cols);
    const bool keep = args_.tape;
    for (int64_t r = 0; r < count; r++) {  // a row's four gates fill the registers
      V sig[3], cand[1];
      FASTRNN_UNROLL for (int g = 0; g < 4; g++) {
        T* p = a + r * cols + g * n;
        V hat = load_as<V>(p, n);
        if (kWhole) {
          hat = (hat - mean[g]) * factor[g];
          if (keep) V::store(p, hat);
        }
        (g == 2 ? cand[0] : sig[g == 3 ? 2 : g]) =
            batch_norm_gate<Math>(hat, load_as<V>(x + r * cols + g * n, n), gamma_h[g], gamma_x[g], bias[g]);
      }
      Math::both(sig, cand);
      const Row& row = lane.rows[r];
      const V c = Math::fma(sig[1], load_as<V>(row.c_prev + u0, n), sig[0] * cand[0]);
      store_as<V>(row.c + u0, c, n);
      V::store(lane.cell + r * W, c);
      V::store(lane.gate + r * W, sig[2]);
    }

    if (steps_of_.measured(count))
      columns.measure(1, lane.cell, count, W);
    else
      given(d, 2, s, 1, u0, n, columns);
    report(d, 2, s, 1, u0, n, columns);
    columns.finish(1, T(args_.eps));
    const V c_mean = V::load(columns.mean), c_factor = V::load(columns.factor);
    const V gamma = load_as<V>(static_cast<const T*>(w.gamma_c) + u0, n);
    const V beta = load_as<V>(static_cast<const T*>(w.beta_c) + u0, n);
    side_by_side(static_cast<int>(count), [&](auto q, int r) {
      constexpr int Q = decltype(q)::value;
      V c[Q];
      FASTRNN_UNROLL for (int j = 0; j < Q; j++) c[j] =
          Math::fma(gamma, (V::load(lane.cell + (r + j) * W) - c_mean) * c_factor, beta);
      Math::tanhs(c);
      FASTRNN_UNROLL for (int j = 0; j < Q; j++)
          store_as<V>(lane.rows[r + j].y + u0, V::load(lane.gate + (r + j) * W) * c[j], n);
    });
  }

  void final_states(int d, int64_t i0, int64_t i1) {
    const int64_t H = args_.H, N = args_.N;
    for (int64_t n = i0; n < i1; n++) {
      const int64_t t = d ? 0 : seq_.length(n) - 1;
      const T* c =
          args_.cells.data ? seq_.template at<const T>(args_.cells, t, n) + d * H : dir_[d].c + n * H;
      std::memcpy(static_cast<T*>(args_.h_n) + (d * N + n) * H,
                  seq_.template at<const T>(args_.y, t, n) + d * H, H * sizeof(T));
      std::memcpy(static_cast<T*>(args_.c_n) + (d * N + n) * H, c, H * sizeof(T));
    }
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
