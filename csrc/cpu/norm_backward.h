// Backward of a layer-normalised layer: all steps, both directions, all gradients, inside one team call.
//
// As backward.h, with a step in two halves: the matmul that makes dh_t, and then row by row everything up to the
// gradients of the two raw terms. The tape holds the raw terms; statistics and gates are computed from them
// again, which costs less than their way through memory. Gains and biases are summed for each batch row apart,
// over the steps of a chunk, over the chunks, and over the rows at the end, so that no sum depends on the threads and
// none is one long chain.
#pragma once
#include "backward.h"
#include "norm_cells_backward.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class E, class C>
class NormBackward : Backward<E, C> {
  using Base = Backward<E, C>;
  using typename Base::Direction;
  using typename Base::Lane;
  using T = typename E::T;
  static_assert(std::is_same<T, typename E::IO>::value, "rows are normalised in the tensors' own type");
  using Base::all_, Base::args_, Base::dir_, Base::gates_, Base::hh_, Base::hr_, Base::lane_bytes_,
      Base::lanes_, Base::layout_, Base::noise_, Base::plan_, Base::recompute_, Base::seq_, Base::steps_,
      Base::time;

 public:
  static size_t workspace(const BackwardArgs& args) {
    Arena arena;
    NormBackward b(args, arena);
    return arena.used;
  }
  static void run(const BackwardArgs& args) {
    Arena arena{static_cast<char*>(args.workspace), 0};
    NormBackward b(args, arena);
    team(b.plan_.threads, [&](int tid, int nt) { b.work(tid, nt); });
  }

 private:
  struct Terms {  // of one direction
    NormParams<E> params;
    T* product;          // dh of a step's rows, then with a projection that of o * tanh(.)
    T* hidden;           // the latter
    T* dx;               // gradients of the chunk's raw input terms, G * H a row
    T *sums, *totals;    // NormSums of each batch row, of this chunk and of those before
    T* again = nullptr;  // recomputed terms of the chunk: two rows of width_ each
  };
  const Stage<E>& stage_;
  const int64_t width_, G_;
  Terms terms_[2];
  T* scratch_;

  NormBackward(const BackwardArgs& args, Arena& arena)
      : Base(args, arena), stage_(layout_.stage[0]), width_(stage_.panels.total()), G_(gates_ * args.H) {
    const int64_t N = args.N, H = args.H, M = steps_ * N;
    for (int d = 0; d < args.directions; d++) {
      Terms& t = terms_[d];
      T* bias = arena.take<T>(C::kBiases * H);
      if (arena.base) NormParams<E>::template fill_bias<C>(args.weights[d], H, bias);
      t.params = NormParams<E>(args.weights[d], bias);
      t.product = arena.take<T>(N * args.O);
      t.hidden = args.projected ? arena.take<T>(N * H) : nullptr;
      t.dx = arena.take<T>(M * G_);
      t.sums = arena.take<T>(N * C::Sums::size(H));
      t.totals = arena.take<T>(N * C::Sums::size(H));
      if (recompute_) t.again = arena.take<T>(2 * M * width_);
    }
    scratch_ = arena.take<T>(plan_.threads * scratch_size());
  }
  int64_t scratch_size() const { return align64(C::kScratch * args_.H); }

  void work(int tid, int nt) {
    Base::pack(tid, nt);
    all_.wait(nt);
    Arena mine{lanes_.base + tid * lane_bytes_, 0};
    Lane lane(mine, *this);
    const Share share(args_.directions, tid, nt);
    for (int d = share.direction_first; d < share.direction_last; d++)
      direction(d, share, lane, scratch_ + tid * scratch_size());
    if (args_.directions == 2 && args_.dx.data) {
      all_.wait(nt);
      Base::add_second_dx(tid, nt);
    }
  }

  void direction(int d, const Share& share, Lane& lane, T* scratch) {
    Direction& dir = dir_[d];
    const int64_t N = args_.N, size = C::Sums::size(args_.H);
    const int64_t i0 = share.first(N), i1 = share.last(N);
    lane.division.begin(dir.claims, share, args_);
    Base::begin(d, lane, i0, i1);
    T *sums = terms_[d].sums + i0 * size, *totals = terms_[d].totals + i0 * size;
    const int64_t own = (i1 - i0) * size;
    std::memset(sums, 0, own * sizeof(T));
    std::memset(totals, 0, own * sizeof(T));
    dir.barrier.wait(share.count);

    bool add = false;
    for (int64_t end = args_.T; end > 0; end -= steps_) {
      const int64_t begin = imax(0, end - steps_), steps = end - begin;
      lane.list.fill(seq_, steps, 0, N, [&](int64_t i) { return time(d, begin + i); });
      Base::chunk_operands(d, lane, begin, steps);
      if (noise_.draws()) Base::draw_masks(d, share, lane, begin, steps);
      if (recompute_) recompute(d, share, lane);
      if (recompute_ || noise_.draws()) dir.barrier.wait(share.count);
      for (int64_t i = steps; i-- > 0;) step(d, share, lane, begin, i, scratch);
      dir.barrier.wait(share.count);
      for (int64_t u = 0; u < own; u++) totals[u] += sums[u];
      std::memset(sums, 0, own * sizeof(T));
      Base::keep_boundary(dir, share, lane);
      if (args_.dx.data) Base::input_grad(d, share, lane, terms_[d].dx, G_);
      if (begin == 0) Base::initial_grads(d, share, lane, i0, i1);
      if (args_.want_weights) weight_grads(d, lane, add);
      add = add || lane.list.rows > 0;  // steps past the end of every row write nothing
      dir.barrier.wait(share.count);
    }
    if (args_.want_weights && share.id == 0) finish_vectors(d);
  }

  // Raw terms of the chunk's rows from inputs and previous states: the forward's matmuls in the forward's order.
  void recompute(int d, const Share& share, Lane& lane) {
    const int64_t M = lane.list.rows, m0 = share.first(M), m1 = share.last(M);
    T* out = terms_[d].again + 2 * m0 * width_;
    for (int64_t b = 0; b < stage_.panels.blocks; b++) {
      const int nv = stage_.panels.vectors(b);
      auto term = [&](const T* const* rows, size_t matrix, int64_t K, T* to) {
        const T* w = reinterpret_cast<const T*>(dir_[d].gates + matrix) + stage_.panels.stream(b, K);
        panel<E>(rows + m0, m1 - m0, w, K, nv, nullptr, 0, to + stage_.panels.offset(b), 2 * width_);
      };
      term(lane.x, stage_.x, stage_.Kx, out);
      term(lane.h_in, stage_.h, stage_.Kh, out + width_);
    }
  }

  void step(int d, const Share& share, Lane& lane, int64_t begin, int64_t i, T* scratch) {
    Direction& dir = dir_[d];
    const bool split = plan_.units && share.count > 1;
    int64_t first, last;
    Base::own_rows(share, lane, i, first, last);
    const int64_t count = last - first, O = args_.O, H = args_.H;
    // Rows of a thread lie apart from those of others.
    const int64_t at = split ? 0 : share.first(args_.N);
    T *product = terms_[d].product + at * O, *hidden = args_.projected ? terms_[d].hidden + at * H : product;
    Base::gather(d, lane, begin + i, first, count);
    Base::sweep(
        split, hh_, dir.w_hh, G_, count, i, lane,
        [&](int64_t b, int panels, int64_t m, int r, const Coming<E>& coming) {
          Base::state_product(dir, lane, b, panels, m, r, coming);
        },
        [&](int64_t b, int64_t m, const T* acc) {
          std::memcpy(product + m * O + hh_.first(b), acc, hh_.units(b) * sizeof(T));
        });
    if (split) dir.barrier.wait(share.count);
    const int64_t k0 = split ? share.first(count) : 0;
    const int64_t k1 = split ? share.last(count) : count;
    if constexpr (C::kCellState)
      if (args_.projected) {
        for (int64_t k = k0; k < k1; k++)
          with_masks(lane, k,
                     [&](const auto& masks) { C::state_row(lane.rows[k], product + k * O, O, masks); });
        if (split) dir.barrier.wait(share.count);
        Base::sweep(
            split, hr_, dir.w_hr, O, count, i, lane,
            [&](int64_t b, int panels, int64_t m, int r, const Coming<E>& coming) {
              const T* a[kMaxRows];
              for (int q = 0; q < r; q++) a[q] = lane.rows[m + q].dh;
              multiply_blocks(hr_, dir.w_hr, O, b, panels, a, r, 0, O, nullptr, lane.tile, coming, m);
            },
            [&](int64_t b, int64_t m, const T* acc) {
              std::memcpy(hidden + m * H + hr_.first(b), acc, hr_.units(b) * sizeof(T));
            });
        if (split) dir.barrier.wait(share.count);
      }
    for (int64_t k = k0; k < k1; k++) {
      const int64_t m = first + k;
      const GradRow<E>& row = lane.rows[k];
      const T* x = recompute_ ? terms_[d].again + 2 * m * width_ : row.tape;
      const NormTerms<E> terms(x, x + (recompute_ ? width_ : G_), stage_.panels, terms_[d].params);
      const typename C::Sums sums(terms_[d].sums + lane.list.n[m] * C::Sums::size(H), H);
      with_masks(lane, k, [&](const auto& masks) {
        C::row(terms, row, hidden + k * H, terms_[d].dx + m * G_, args_.projected, sums, scratch, masks);
      });
    }
    if (split) dir.barrier.wait(share.count);
  }

  template <class F>
  void with_masks(const Lane& lane, int64_t k, F&& f) const {
    if (noise_.on)
      f(MaskRows<E>{noise_, lane.masks.rows + k});
    else
      f(Quiet{});
  }

  void weight_grads(int d, Lane& lane, bool add) {
    Direction& dir = dir_[d];
    OuterJob<E> jobs[3];
    for (int j = 0; j < 2; j++) {
      jobs[j].columns = jobs[j].lda = G_;
      jobs[j].a = j ? dir.dg : terms_[d].dx;
    }
    jobs[0].to[0] = {0, dir.d_ih, args_.I};
    jobs[1].to[0] = {1, dir.d_hh, args_.O};
    Base::outer(d, lane, jobs, 2, add);
  }

  // Gradients of gains and biases: the rows' sums, row after row.
  void finish_vectors(int d) {
    const auto& out = args_.grads[d];
    const int64_t H = args_.H, size = C::Sums::size(H);
    T* total = terms_[d].totals;
    for (int64_t n = 1; n < args_.N; n++)
      for (int64_t u = 0; u < size; u++) total[u] += total[n * size + u];
    const typename C::Sums sums(total, H);
    auto put = [&](void* to, const T* from, int64_t values) {
      if (to) std::memcpy(to, from, values * sizeof(T));
    };
    put(out.ln_ih, sums.ih, G_);
    put(out.ln_hh, sums.hh, G_);
    if constexpr (C::kCellState) {
      put(out.ln_c, sums.c, H);
      put(out.ln_bias_c, sums.beta, H);
    }
    if (!out.b_ih) return;
    for (int s = 0; s < C::kBiases; s++) {
      if (C::x_gate(s) >= 0) put(static_cast<T*>(out.b_ih) + C::x_gate(s) * H, sums.bias + s * H, H);
      if (C::h_gate(s) >= 0) put(static_cast<T*>(out.b_hh) + C::h_gate(s) * H, sums.bias + s * H, H);
    }
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
