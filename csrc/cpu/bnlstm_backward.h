// Backward of one batch-normalised LSTM layer: all steps, both directions, all gradients, inside one team call.
//
// Threads own blocks of units with all rows, as in the forward, so the sums that a batch norm's gradient needs are
// their own. The tape holds the normalised terms; gates and the normalised cell are computed again from them,
// which costs less than their way through memory. Steps go in chunks of about kBnGradRows rows: gradients of the
// recurrent and of the input term stay in cache until they meet the weights and the operands.
// Where all steps share the input term's statistics its gradient waits for the last step.
#pragma once
#include <atomic>
#include <initializer_list>

#include "bnlstm_ahead.h"
#include "bnlstm_gradients.h"
#include "bnlstm_outer.h"
#include "claims.h"
#include "plan.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int64_t kBnGradRows = 512;

// Rows of 4H gradients a power of two apart would all fall into the same few sets of L1.
constexpr int64_t kRowPadding = 16;

template <class E, bool Linear>
class BnLstmBackward {
  using T = typename E::T;
  using V = typename E::V;
  using Math = Act<V, Linear>;
  static constexpr int W = E::W;

 public:
  static size_t workspace(const BnLstmBackwardArgs& args) {
    Arena arena;
    BnLstmBackward b(args, arena);
    return arena.used;
  }
  static void run(const BnLstmBackwardArgs& args) {
    Arena arena{static_cast<char*>(args.workspace), 0};
    BnLstmBackward b(args, arena);
    team(b.plan_.threads, [&](int tid, int nt) { b.work(tid, nt); });
  }

 private:
  struct Lane {  // per thread
    RowList list;
    const T** a_rows;
    BnGradRow<T>* rows;
    const T** x;
    const T** h_prev;
    T** dx;
    T *dh, *tile;
    const char** wanted;
    Division division;
    typename BnGradients<E, Linear>::Scratch scratch;
    Lane(Arena& a, const BnLstmBackward& b)
        : list(a, b.steps_, b.args_.N),
          a_rows(a.take<const T*>(b.steps_ * b.args_.N)),
          rows(a.take<BnGradRow<T>>(b.args_.N)),
          x(a.take<const T*>(b.steps_ * b.args_.N)),
          h_prev(a.take<const T*>(b.steps_ * b.args_.N)),
          dx(a.take<T*>(b.steps_ * b.args_.N)),
          dh(a.take<T>(b.args_.N * kBlockColumns<E>)),
          tile(a.take<T>(kMaxRows * kBlockColumns<E>)),
          wanted(a.take<const char*>(b.far_ ? b.wanted_pieces() : 0)),
          scratch(a, b.args_.N) {}
  };
  struct Direction {
    T *w_hh, *w_ih = nullptr;
    T *da, *db, *carry, *dc;
    T* dx = nullptr;
    BnSums<T> sum;
    T* operand[2] = {};
    Claim* claims;
    Barrier barrier;
    struct {
      alignas(64) std::atomic<int64_t> pieces{0};  // of the chunk's dx
    } taken[2];                                    // a chunk's and the next one's
  };

  const BnLstmBackwardArgs& args_;
  const Plan plan_;
  const Sequence seq_;
  const BnSteps steps_of_;
  const int64_t steps_;
  const bool deferred_;   // dz of all steps is kept, the input term's gradient comes last
  const bool far_;        // the tape lies beyond L2: asked for ahead
  const int64_t stride_;  // of a row of gate gradients
  Panels<E> hh_, ih_;
  T* zero_;
  const BnGradients<E, Linear> grad_;
  Direction dir_[2];
  Arena lanes_;
  size_t lane_bytes_ = 0;
  Barrier all_;

  BnLstmBackward(const BnLstmBackwardArgs& args, Arena& arena)
      : args_(args),
        plan_(choose_plan(args)),
        seq_(args, arena),
        steps_of_(args, seq_, arena),
        steps_(
            ceil_div(args.T, ceil_div(args.T, imax(1, kBnGradRows / args.N)))),  // chunks as even as can be
        deferred_(args.sequence && args.batch),
        far_(prefetches(8 * args.H * sizeof(T), args.N, args.T)),
        stride_(4 * args.H + kRowPadding),
        hh_(1, args.H, block_vectors(args.H, plan_.threads, args.directions)),
        ih_(1, args.I, kNarrow),
        zero_(arena.take<T>(4 * args.H)),
        grad_{args, steps_of_, Panels<E>(4, args.H), seq_.rows(), deferred_, zero_} {
    const int64_t N = args.N, H = args.H, I = args.I, G = 4 * H, M = steps_ * N;
    if (arena.base) std::memset(zero_, 0, G * sizeof(T));
    for (int d = 0; d < args.directions; d++) {
      Direction& r = dir_[d];
      r.claims = Division::room(arena, plan_.threads);
      r.w_hh = arena.take<T>(hh_.elements(G));
      if (args.dx.data) r.w_ih = arena.take<T>(ih_.elements(G));
      r.da = arena.take<T>(M * stride_);
      r.db = arena.take<T>((deferred_ ? args.T * N : M) * stride_);
      r.carry = arena.take<T>(N * stride_);
      r.dc = arena.take<T>(N * H);
      T* sums = arena.take<T>(3 * G + 2 * H);
      r.sum = {sums, sums + G, sums + 2 * G, sums + 3 * G, sums + 3 * G + H};
      // The second direction's dx is added when both are complete.
      if (args.dx.data && d == 1) r.dx = arena.take<T>(args.T * N * I);
      if (args.want_weights) {
        r.operand[0] = arena.take<T>((H + kBlockColumns<E>)*M);
        r.operand[1] = arena.take<T>((I + kBlockColumns<E>)*M);
      }
    }
    Arena sizing;
    Lane measure(sizing, *this);
    lane_bytes_ = sizing.used;
    lanes_ = {arena.take<char>(lane_bytes_ * plan_.threads), 0};
  }

  // Width of the blocks that threads divide: the widest tile that leaves no thread much more than its share.
  static int block_vectors(int64_t width, int threads, int directions) {
    const int64_t count = directions == 2 ? imax(1, threads / 2) : threads;
    int best = kNarrow;
    double least = 0;
    for (int v = kNarrow; v > 0; v--) {
      const Panels<E> p(1, width, v);
      int64_t worst = 0;
      for (int64_t id = 0; id < count; id++) {
        int64_t vectors = 0;
        for (int64_t b = p.blocks * id / count; b < p.blocks * (id + 1) / count; b++) vectors += p.vectors(b);
        worst = imax(worst, vectors);
      }
      // A tile of two vectors, or of one, waits for its broadcasts; six rows of two vectors do not.
      const double cost = double(worst) * (v >= 3 || v == kNarrow ? 1.0 : v == 2 ? 1.1 : 1.5);
      if (v == kNarrow || cost < least) best = v, least = cost;
    }
    return best;
  }

  void work(int tid, int nt) {
    const int64_t G = 4 * args_.H;
    auto pack = [&](const Panels<E>& p, const void* w, T* dst) {
      pack_rows<E, T>(p, static_cast<const T*>(w), p.width, G, dst, p.blocks * tid / nt,
                      p.blocks * (tid + 1) / nt);
    };
    for (int d = 0; d < args_.directions; d++) {
      pack(hh_, args_.weights[d].w_hh, dir_[d].w_hh);
      if (args_.dx.data) pack(ih_, args_.weights[d].w_ih, dir_[d].w_ih);
    }
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

  void direction(int d, const Share& share, Lane& lane) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H, G = 4 * H;
    const int64_t i0 = share.first(N), i1 = share.last(N);
    lane.division.begin(dir.claims, share, args_);
    const PanelRuns own = lane.division.own(hh_, true);
    const T* dc_n = static_cast<const T*>(args_.dc_n);
    if (dc_n)
      std::memcpy(dir.dc + i0 * H, dc_n + (d * N + i0) * H, (i1 - i0) * H * sizeof(T));
    else
      std::memset(dir.dc + i0 * H, 0, (i1 - i0) * H * sizeof(T));
    if (share.id == 0) std::memset(dir.sum.z, 0, (3 * G + 2 * H) * sizeof(T));
    if (d == 0 && args_.lengths && args_.dx.data)
      for (int64_t n = i0; n < i1; n++)
        for (int64_t t = seq_.length(n); t < args_.T; t++)
          std::memset(seq_.template at<T>(args_.dx, t, n), 0, args_.I * sizeof(T));
    dir.barrier.wait(share.count);

    bool add = false;
    for (int64_t end = args_.T, chunk = 0; end > 0; end -= steps_, chunk++) {
      std::atomic<int64_t>& taken = dir.taken[chunk % 2].pieces;
      if (share.id == 0) dir.taken[(chunk + 1) % 2].pieces.store(0, std::memory_order_relaxed);
      const int64_t begin = imax(0, end - steps_), steps = end - begin;
      chunk_operands(d, lane, begin, steps);
      // What the weight gradients meet is known: the steps' barriers come before them.
      pack_operands(d, share, lane, true, !deferred_);
      for (int64_t i = steps; i-- > 0;) {
        step(d, lane, begin, i);
        // Rows of dx that are due anyway fill the time until the others have come: of steps that all have left.
        dir.barrier.wait(share.count,
                         [&] { return take_input_piece(d, lane, taken, lane.list.start[i + 1]); });
      }
      while (take_input_piece(d, lane, taken, 0)) continue;
      weight_grads(d, lane, dir.da, deferred_ ? nullptr : dir.db, add);
      add = add || lane.list.rows > 0;  // steps past the end of every row write nothing
      keep_boundary(dir, lane, i0, i1);
      dir.barrier.wait(share.count);
    }
    if (args_.dh0) initial_grads(d, lane, i0, i1);
    if (deferred_) {
      for (int64_t k = own.b0; k < own.b1; k++)
        for (int64_t u = 0; u < hh_.units(k); u += grad_.blocks.unit)
          grad_.share(d, dir.sum, (hh_.first(k) + u) / grad_.blocks.unit, dir.db, stride_);
      dir.barrier.wait(share.count);
      add = false;
      for (int64_t begin = 0; begin < args_.T; begin += steps_) {
        chunk_operands(d, lane, begin, imin(steps_, args_.T - begin));
        T* db = dir.db + steps_of_.start[begin] * stride_;
        pack_operands(d, share, lane, false, true);
        dir.barrier.wait(share.count);
        input_grad(d, share, lane, db);
        weight_grads(d, lane, nullptr, db, add);
        dir.barrier.wait(share.count);
        add = true;
      }
    }
    if (args_.want_weights && share.id == 0) finish_vectors(d);
  }

  void chunk_operands(int d, Lane& lane, int64_t begin, int64_t steps) {
    lane.list.fill(seq_, steps, 0, args_.N, [&](int64_t i) { return begin + i; });
    const int64_t H = args_.H;
    for (int64_t i = 0; i < steps; i++)
      for (int64_t m = lane.list.start[i]; m < lane.list.start[i + 1]; m++) {
        const int64_t n = lane.list.n[m], s = begin + i, t = steps_of_.time(d, s, n);
        lane.x[m] = seq_.template at<const T>(args_.x, t, n);
        if (args_.dx.data)
          lane.dx[m] = d == 0 ? seq_.template at<T>(args_.dx, t, n) : dir_[d].dx + seq_.index(t, n) * args_.I;
        lane.h_prev[m] = seq_.resets(t, n) ? zero_
                         : s == 0 ? static_cast<const T*>(args_.h0) + (d * args_.N + n) * H
                                  : seq_.template at<const T>(args_.y, steps_of_.before(d, t), n) + d * H;
      }
  }

  // Gradients of the recurrent term at the step after s, of row n; null if n ends at s or is cut there.
  bool ends(int64_t s, int64_t n) const { return s == seq_.length(n) - 1; }

  void gather(int d, Lane& lane, int64_t begin, int64_t i, const T** later) {
    Direction& dir = dir_[d];
    const int64_t s = begin + i, first = lane.list.start[i], count = lane.list.count(i);
    const int64_t H = args_.H, N = args_.N;
    const bool in_chunk = s + 1 < begin + chunk_steps(begin);
    int64_t after = in_chunk ? lane.list.start[i + 1] : 0;
    for (int64_t k = 0; k < count; k++) {
      const int64_t m = first + k, n = lane.list.n[m], t = steps_of_.time(d, s, n);
      const int64_t before = steps_of_.before(d, t);
      BnGradRow<T>& g = lane.rows[k];
      const bool last = ends(s, n);
      const bool cut = !last && seq_.resets(steps_of_.time(d, s + 1, n), n);
      // The rows of the next step are those of this one that do not end here, in the same order.
      later[k] = zero_;
      if (!last) {
        const T* row = in_chunk ? dir.da + after++ * stride_ : dir.carry + n * stride_;
        if (!cut) later[k] = row;
      }
      g.dy = args_.dy.data ? seq_.template at<const T>(args_.dy, t, n) + d * H : nullptr;
      g.dcells = args_.dcells.data ? seq_.template at<const T>(args_.dcells, t, n) + d * H : nullptr;
      g.dh = last && args_.dh_n ? static_cast<const T*>(args_.dh_n) + (d * N + n) * H : nullptr;
      g.dc_out = dir.dc + n * H;
      g.dc_in = cut ? zero_ : g.dc_out;
      g.c = seq_.template at<const T>(args_.cells, t, n) + d * H;
      g.c_prev = seq_.resets(t, n) ? zero_
                 : s == 0          ? static_cast<const T*>(args_.c0) + (d * N + n) * H
                                   : seq_.template at<const T>(args_.cells, before, n) + d * H;
      g.da = dir.da + m * stride_;
      g.db = dir.db + (deferred_ ? steps_of_.start[begin] + m : m) * stride_;
    }
  }
  // Chunks are cut from the end, so the first may be short.
  int64_t chunk_steps(int64_t begin) const { return begin == 0 ? (args_.T - 1) % steps_ + 1 : steps_; }

  void step(int d, Lane& lane, int64_t begin, int64_t i) {
    Direction& dir = dir_[d];
    const int64_t G = 4 * args_.H, count = lane.list.count(i);
    gather(d, lane, begin, i, lane.a_rows);
    const PanelRuns own = lane.division.own(hh_, true);
    const bool ahead = asks_ahead(hh_, own.b0, own.b1, G, count);
    const int64_t first = steps_of_.start[begin] + lane.list.start[i];
    lane.division.panels(hh_, G, count, {true, true, i % 2 != 0, true}, [&](int64_t b, int, int64_t next) {
      const int64_t cols = hh_.columns(b);
      const T* coming = ahead && next >= 0 ? dir.w_hh + hh_.stream(next, G) : nullptr;
      const Coming<E> next_panel{coming, coming ? hh_.columns(next) * G : 0, count};
      const int nv = hh_.vectors(b);
      const bool asks = far_ && count > 0;
      const Wanted wants = asks ? wanted(d, lane, b, first, count, next_panel) : Wanted{};
      row_blocks(count, nv, [&](int64_t m, int r) {
        const T* w = dir.w_hh + hh_.stream(b, G);
        if (asks)
          multiply_wanting<E>(lane.a_rows + m, r, w, G, nv, lane.dh + m * cols, cols,
                              wants.part(m, r, count));
        else
          multiply_tile<E>(next_panel, m, lane.a_rows + m, r, w, G, nv, nullptr, 0, lane.dh + m * cols, cols);
      });
      for (int64_t u = 0; u < hh_.units(b); u += grad_.blocks.unit)
        grad_.block(d, lane.scratch, lane.rows, dir.sum, begin + i, count, first,
                    (hh_.first(b) + u) / grad_.blocks.unit, lane.dh + u, cols);
    });
  }

  // Pieces of all that the passes over a block meet.
  int64_t wanted_pieces() const {
    const int64_t unit = grad_.blocks.unit, blocks = ceil_div(hh_.unit, unit);
    return 2 * blocks * pieces_of<E>(args_.N * grad_.blocks.columns(0)) +
           10 * args_.N * pieces_of<E>(hh_.unit) + pieces_of<E>(hh_.unit * 4 * args_.H);
  }
  // What the passes over block b will read and write, and the next block's panel where it comes from beyond L2: tiles of its product
  // ask for it. In L2 a block's share of 64 rows is 300 KiB.
  Wanted wanted(int d, Lane& lane, int64_t b, int64_t first, int64_t count, const Coming<E>& coming) const {
    const int64_t u0 = hh_.first(b), units = hh_.units(b), H = args_.H, unit = grad_.blocks.unit;
    constexpr int64_t kPiece = kPieceBytes<E>;
    const char** at = lane.wanted;
    for (int64_t t = u0 / unit; t * unit < u0 + units; t++) {
      const T* x_hat = grad_.tape(d, t, first);
      want<E>(at, x_hat + grad_.rows * (bnlstm_tape_width(H) / 2), count * grad_.blocks.columns(t));
      want<E>(at, x_hat, count * grad_.blocks.columns(t));
    }
    const int64_t wide = pieces_of<E>(units);
    for (int64_t p = 0; p < wide; p++) {
      const int64_t u = u0 + p * (kPiece / int64_t(sizeof(T)));
      for (int64_t i = 0; i < count; i++) *at++ = reinterpret_cast<const char*>(lane.rows[i].c_prev + u);
      if (args_.dy.data)
        for (int64_t i = 0; i < count; i++) *at++ = reinterpret_cast<const char*>(lane.rows[i].dy + u);
    }
    want<E>(at, coming.panel, coming.elements);
    const int64_t reads = at - lane.wanted;
    for (const T* to : {lane.rows[0].da, lane.rows[0].db})
      for (int g = 0; g < 4; g++)
        for (int64_t p = 0; p < wide; p++) {
          const char* from = reinterpret_cast<const char*>(to + g * H + u0) + p * kPiece;
          for (int64_t i = 0; i < count; i++) *at++ = from + i * stride_ * int64_t(sizeof(T));
        }
    const int64_t lines = ceil_div(units * int64_t(sizeof(T)), 64);
    return {lane.wanted, reads, 0, at - lane.wanted, static_cast<int>(imin(lines, kPieceLines<E>))};
  }

  // The chunk after this one reads the gradients of its first step.
  void keep_boundary(Direction& dir, Lane& lane, int64_t i0, int64_t i1) {
    for (int64_t m = 0; m < lane.list.count(0); m++) {
      const int64_t n = lane.list.n[m];
      if (n >= i0 && n < i1)
        std::memcpy(dir.carry + n * stride_, dir.da + m * stride_, 4 * args_.H * sizeof(T));
    }
  }

  // dx comes in pieces: a few rows, from the last of the chunk on, times one panel, which so many rows meet in turn.
  static constexpr int64_t kPieceRows = 8 * kMaxRows;
  int64_t pieces(int64_t rows) const {
    int64_t count = 0;
    for (int64_t b = 0; b < ih_.blocks; b++) count += ceil_div(rows, max_rows(ih_.vectors(b)));
    return count;
  }

  // Piece p, from gradients db of the chunk's rows: false if there is none, or if a row before `ready` is among them.
  template <class Claim>
  bool input_piece(int d, Lane& lane, const T* db, int64_t p, int64_t ready, Claim&& claim) {
    const int64_t G = 4 * args_.H, whole = pieces(kPieceRows), last = lane.list.rows - p / whole * kPieceRows;
    const int64_t first = imax(0, last - kPieceRows), rows = last - first;
    if (!args_.dx.data || rows <= 0 || first < ready) return false;
    int64_t b = 0, i = p % whole, tiles = 0;
    for (; b < ih_.blocks; b++, i -= tiles) {
      tiles = ceil_div(rows, max_rows(ih_.vectors(b)));
      if (i < tiles) break;
    }
    if (b == ih_.blocks || !claim()) return false;
    const int64_t m0 = first + rows * i / tiles, r = first + rows * (i + 1) / tiles - m0,
                  cols = ih_.columns(b);
    const T* a[kMaxRows];
    for (int64_t q = 0; q < r; q++) a[q] = db + (m0 + q) * stride_;
    tile_for<E>(static_cast<int>(r), ih_.vectors(b))(a, dir_[d].w_ih + ih_.stream(b, G), G, nullptr, 0,
                                                     lane.tile, cols);
    for (int64_t q = 0; q < r; q++)
      std::memcpy(lane.dx[m0 + q] + ih_.first(b), lane.tile + q * cols, ih_.units(b) * sizeof(T));
    return true;
  }

  // The next piece that no thread has taken; false if there is none yet.
  bool take_input_piece(int d, Lane& lane, std::atomic<int64_t>& taken, int64_t ready) {
    if (deferred_) return false;
    int64_t p = taken.load(std::memory_order_relaxed);
    for (;;) {
      bool other = false;
      const bool done = input_piece(d, lane, dir_[d].db, p, ready, [&] {
        other = !taken.compare_exchange_strong(p, p + 1, std::memory_order_relaxed);
        return !other;
      });
      if (!other) return done;
    }
  }

  // Where the input term's gradient comes last: this thread's share of a chunk.
  void input_grad(int d, const Share& share, Lane& lane, const T* db) {
    const int64_t whole = lane.list.rows / kPieceRows, rest = lane.list.rows % kPieceRows;
    const int64_t all = whole * pieces(kPieceRows) + pieces(rest);
    for (int64_t p = share.first(all); p < share.last(all); p++)
      input_piece(d, lane, db, p, 0, [] { return true; });
  }

  void add_second_dx(int tid, int nt) {
    const int64_t I = args_.I, T0 = args_.T * tid / nt, T1 = args_.T * (tid + 1) / nt;
    for (int64_t t = T0; t < T1; t++)
      for (int64_t n = 0; n < seq_.count(t); n++) {
        if (!seq_.alive(t, n)) continue;
        T* dst = seq_.template at<T>(args_.dx, t, n);
        const T* src = dir_[1].dx + seq_.index(t, n) * I;
        each_vector<V>(static_cast<int>(I), [&](int u, auto w) {
          store_as<V>(dst + u, load_as<V>(dst + u, w) + load_as<V>(src + u, w), w);
        });
      }
  }

  // Operands of the weight gradients, of the jobs' order: states, inputs.
  struct Operands {
    OuterOperand<E> of[2];
  };
  Operands operands(int d, const Lane& lane, bool states, bool inputs) const {
    return {{{states ? args_.H : 0, lane.h_prev, nullptr, dir_[d].operand[0]},
             {inputs ? args_.I : 0, lane.x, nullptr, dir_[d].operand[1]}}};
  }
  void pack_operands(int d, const Share& share, const Lane& lane, bool states, bool inputs) {
    if (!args_.want_weights) return;
    const Operands o = operands(d, lane, states, inputs);
    pack_outer_operands<E>(o.of, 2, lane.list.rows, share.id, share.count);
  }

  // The chunk's share of dW_hh = dA^T H_prev and dW_ih = dB^T X; either gradient may be null.
  void weight_grads(int d, Lane& lane, const T* da, const T* db, bool add) {
    if (!args_.want_weights) return;
    const int64_t G = 4 * args_.H;
    OuterJob<E> jobs[2];
    int count = 0;
    auto job = [&](const T* a, int operand, void* c, int64_t ldc) {
      if (!a) return;
      OuterJob<E>& j = jobs[count++];
      j.columns = G;
      j.a = a;
      j.lda = stride_;
      j.to[0] = {operand, static_cast<T*>(c), ldc};
    };
    job(da, 0, args_.grads[d].w_hh, args_.H);
    job(db, 1, args_.grads[d].w_ih, args_.I);
    outer_products_rows<E>(jobs, count, operands(d, lane, da, db).of, lane.list.rows, add, lane.division);
  }

  // dh0 and dc0 of rows [i0, i1): one more step of the recurrent matmul, cut where the first step resets.
  void initial_grads(int d, Lane& lane, int64_t i0, int64_t i1) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, H = args_.H, G = 4 * H;
    for (int64_t n = i0; n < i1; n++) {
      const bool cut = seq_.resets(steps_of_.time(d, 0, n), n);
      lane.a_rows[n] = cut ? zero_ : dir.carry + n * stride_;
      std::memcpy(static_cast<T*>(args_.dc0) + (d * N + n) * H, cut ? zero_ : dir.dc + n * H, H * sizeof(T));
    }
    for (int64_t b = 0; b < hh_.blocks; b++)
      row_blocks(i1 - i0, hh_.vectors(b), [&](int64_t k, int r) {
        const int64_t cols = hh_.columns(b);
        tile_for<E>(r, hh_.vectors(b))(lane.a_rows + i0 + k, dir.w_hh + hh_.stream(b, G), G, nullptr, 0,
                                       lane.tile, cols);
        for (int q = 0; q < r; q++)
          std::memcpy(static_cast<T*>(args_.dh0) + (d * N + i0 + k + q) * H + hh_.first(b),
                      lane.tile + q * cols, hh_.units(b) * sizeof(T));
      });
  }

  void finish_vectors(int d) {
    const Direction& dir = dir_[d];
    const auto& out = args_.grads[d];
    auto copy = [&](void* to, const T* from, int64_t n) {
      if (to) std::memcpy(to, from, n * sizeof(T));
    };
    copy(out.bias, dir.sum.z, 4 * args_.H);
    copy(out.gamma_hh, dir.sum.a, 4 * args_.H);
    copy(out.gamma_ih, dir.sum.x, 4 * args_.H);
    copy(out.beta_c, dir.sum.m, args_.H);
    copy(out.gamma_c, dir.sum.c, args_.H);
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
