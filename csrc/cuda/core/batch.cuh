// What forward and backward of the batch-normalised LSTM share. A CTA has all rows of the batch for its units, so statistics
// are its own business, and CTAs exchange h alone, in backward the gradient of the recurrent term.
//
// The batch is walked in passes of T::kRows rows, whose accumulators fit a thread's registers; everything that an element
// (unit, row) keeps from step to step or between the parts of one is in shared memory, in planes. An array in registers
// would be indexed by a number of rows known at run time. Between two of the barriers an element has one owner.
#pragma once
#include "../../cells/bnlstm.h"
#include "activations.cuh"
#include "bnlstm.h"
#include "cells.cuh"
#include "source.cuh"
#include "weights.cuh"

namespace fastrnn::cuda {

struct BnLstm : Shaped<CellKind::bnlstm> {};

// The tile whose exchange keeps every row of the batch.
template <class T>
struct WholeBatch : T {
  FASTRNN_DEVICE static int mail_rows(const Shape& p) { return p.N; }
};

template <class D, class T, template <class, class, int> class ExchangeOf, bool IsBackward, class Params>
class BnLstmBase {
 public:
  using Geo = GeometryOf<BnLstm, T, IsBackward>;
  static constexpr Geometry kGeometry = Geo::kGeometry;
  using Exchange = ExchangeOf<D, WholeBatch<T>, kGeometry.values()>;
  // Of a batch of one row: what comes before the planes is the same for all.
  static constexpr BatchLayout kLayout = batch_layout(kGeometry, D::kFormat, Exchange::kBuffers, 1);
  static constexpr bool kAvailable =
      kLayout.bytes <= prim::kMostShared && (prim::kHasClusters || !Exchange::kIsCluster);

 protected:
  using Elem = typename D::Elem;
  using M = Matmul<Geo, 0>;
  static constexpr int kU = T::kUnits, kRowStride = T::kThreads / kU, kTeamRows = 8 * T::kRowTiles;
  static_assert(T::kThreads % kU == 0, "all elements of a thread are of one unit");
  static_assert(T::kRows % kRowStride == 0, "who takes a pass's sums owns the element");

  FASTRNN_DEVICE BnLstmBase(const Params& p, bool reverse, const Vec4* weights)
      : p_(p),
        place_(place_of(p, prim::block_index())),
        reverse_(reverse),
        lane_(prim::thread_index() % 32),
        team_(prim::thread_index() / 32 / T::kWarps),
        slice_((warp() + place_.cta) % T::kWarps),
        unit_(prim::thread_index() % kU),
        j_(place_.cta * kU + unit_),
        line_(batch_line(kU, p.N)),
        exchange_(p, place_, batch_mail(kLayout.planes, kU, IsBackward, p.N)),
        sums_(kLayout.sums),
        results_(prim::shared_view<float>(kLayout.results, (kBatchResults + 2 * kBatchOfStep) * kU)),
        planes_(prim::shared_view<float>(kLayout.planes, batch_planes(IsBackward) * kU * line_)),
        lengths_(prim::shared_view<int>(batch_lengths(kLayout.planes, kU, IsBackward, p.N), p.N)) {
    weights_.load(weights + static_cast<int64_t>(place_.cta) * kGeometry.cta_vectors() +
                      warp() * kGeometry.warp_vectors(),
                  kLayout.weights + prim::thread_index() / 32 * kGeometry.warp_shared_vectors() * 16, lane_);
    for (int n = prim::thread_index(); n < p.N; n += T::kThreads) lengths_.store(n, row_length(p, n));
    exchange_.start(p, kGeometry.values(), kGeometry.values());
    prim::block_barrier("lengths");
  }

  // Of the team.
  FASTRNN_DEVICE static int warp() { return prim::thread_index() / 32 % T::kWarps; }
  FASTRNN_DEVICE bool has_unit() const { return j_ < (mutated(Mutation::unit_tail) ? p_.H - 1 : p_.H); }
  FASTRNN_DEVICE Element element(int row) const {
    Element x;
    x.mine = row < p_.N;
    x.local = x.n = row;
    x.unit = unit_;
    x.j = j_;
    x.length = x.mine && has_unit() ? lengths_.load(row) : 0;
    return x;
  }
  // The thread's elements; a warp is in f as a whole, with rows past the last one if need be.
  template <class F>
  FASTRNN_DEVICE void each(F&& f) const {
    const int end = round_up(p_.N, kU < 32 ? 32 / kU : 1);
    for (int row = prim::thread_index() / kU; row < end; row += kRowStride) f(element(row));
  }
  // The same `Block` elements at a time: f(element, i) loads, with all loads of a block in flight, then g(element, i) stores.
  template <int Block, class F, class G>
  FASTRNN_DEVICE void each_block(F&& f, G&& g) const {
    for (int row = prim::thread_index() / kU; row < p_.N; row += Block * kRowStride) {
      FASTRNN_UNROLL
      for (int i = 0; i < Block; i++) f(element(row + i * kRowStride), i);
      FASTRNN_UNROLL
      for (int i = 0; i < Block; i++) g(element(row + i * kRowStride), i);
    }
  }

  FASTRNN_DEVICE float get(int plane, const Element& x) const {
    return planes_.load((plane * kU + x.unit) * line_ + x.local);
  }
  FASTRNN_DEVICE void put(int plane, const Element& x, float v) const {
    planes_.store((plane * kU + x.unit) * line_ + x.local, v);
  }
  // The two results of a column of the thread's unit.
  FASTRNN_DEVICE float first(int gate) const { return results_.load(gate * kU + unit_); }
  FASTRNN_DEVICE float second(int gate) const { return results_.load((4 + gate) * kU + unit_); }

  // What a step needs of its columns besides, written by the first kU threads, a step ahead; not in registers, of which the
  // weights leave few.
  FASTRNN_DEVICE bool speaks() const { return prim::thread_index() < kU; }
  FASTRNN_DEVICE void tell(int s, int k, float v) const { results_.store(at_step(s, k), v); }
  FASTRNN_DEVICE float told(int s, int k) const { return results_.load(at_step(s, k)); }

  FASTRNN_DEVICE int time(int s, int length) const { return reverse_ ? length - 1 - s : s; }
  FASTRNN_DEVICE bool resets(int s, int n, int length) const { return reset_at(p_, time(s, length), n); }
  FASTRNN_DEVICE bool measured(int s) const {
    return p_.batch && (p_.alive ? prim::load_constant(p_.alive + s) : p_.N) >= 2;
  }
  FASTRNN_DEVICE float share(int s) const {
    const bool counted = p_.alive && !mutated(Mutation::dead_rows_counted);
    return 1.f / static_cast<float>(counted ? prim::load_constant(p_.alive + s) : p_.N);
  }
  FASTRNN_DEVICE float load(const void* state, const Element& x) const {
    if (!state || !x.length) return 0.f;
    return D::load(static_cast<const Elem*>(state) + static_cast<int64_t>(x.n) * p_.H + x.j);
  }
  FASTRNN_DEVICE float of_unit(const float* values, int gate = 0) const {
    return has_unit() ? prim::load_constant(values + gate * p_.H + j_) : 0.f;
  }

  // The matmul of a step over what exchange e - 1 published: from(n, length) says where a row comes from, take(element,
  // buffer, row of the pass) gets the sums while another pass's may already be written.
  template <class FromOf, class Take>
  FASTRNN_DEVICE void matmul(int e, int read, const Mail& mail, const void* initial, FromOf&& from,
                             Take&& take) {
    if (e > 0) exchange_.wait(e - 1);
    int buffer = 0;
    for (int pass = 0; pass < p_.N; pass += T::kRows) {
      const int mine = pass + team_ * kTeamRows;
      if (mine < p_.N) multiply_rows(e, read, mail, initial, from, mine, buffer);
      if (!mutated(Mutation::dropped_barrier)) prim::block_barrier("partial sums");
      const int end = pass + T::kRows < p_.N ? pass + T::kRows : p_.N;
      for (int row = pass + prim::thread_index() / kU; row < end; row += kRowStride)
        take(element(row), buffer, row - pass);
      if (!mutated(Mutation::single_reduction_tile)) buffer ^= 1;
    }
  }

  // For each column of `Gates` planes from `plane` on f(column, gate's place or -1, stores, sum) gives the two results;
  // sum(g) adds g(value, value in the plane `beside` further on, or 0) over live rows, in an order that only N decides.
  template <int Gates, class Results>
  FASTRNN_DEVICE void columns(int s, int plane, int beside, Results&& f) const {
    constexpr int kColumns = Gates * kU, kLanes = lanes_of(kColumns);
    static_assert(kLanes == 1 || kColumns * kLanes % 32 == 0, "a warp has columns in all its lanes or none");
    prim::block_barrier("columns");
    const int q = prim::thread_index() % kLanes;
    const int all = mutated(Mutation::rows_missing) ? (p_.N - 1) / T::kRows * T::kRows : p_.N;
    for (int column = prim::thread_index() / kLanes; column < kColumns; column += T::kThreads / kLanes) {
      const int j = place_.cta * kU + column % kU, at = j < p_.H ? column / kU * p_.H + j : -1;
      const int rows = at < 0 ? 0 : all, line = (plane * kU + column) * line_;
      const auto sum = [&](auto&& g) {
        float total = 0.f;
        for (int row = q; row < rows; row += kLanes) {
          if (s >= lengths_.load(row)) continue;
          total += g(planes_.load(line + row), beside ? planes_.load(line + beside * kU * line_ + row) : 0.f);
        }
        FASTRNN_UNROLL
        for (int mask = 1; mask < kLanes; mask *= 2)
          total += prim::bits_float(prim::shuffle_xor(prim::float_bits(total), mask));
        return total;
      };
      float a = 0.f, b = 0.f;
      f(at, q == 0, sum, a, b);
      if (q == 0) {
        results_.store(column, a);
        results_.store(4 * kU + column, b);
      }
    }
    if (!mutated(Mutation::statistics_barrier)) prim::block_barrier("statistics");
  }

 private:
  FASTRNN_DEVICE int at_step(int s, int k) const {
    return (kBatchResults + (s & 1) * kBatchOfStep + k) * kU + unit_;
  }
  // Of a warp that share a column: a power of two.
  static FASTRNN_CONSTEXPR int lanes_of(int columns) {
    int lanes = 1;
    while (lanes < 32 && 2 * lanes * columns <= T::kThreads) lanes *= 2;
    return lanes;
  }

  template <class FromOf>
  FASTRNN_DEVICE void multiply_rows(int e, int read, const Mail& mail, const void* initial, FromOf&& from,
                                    int first, int buffer) {
    const LaneRows<T> rows(p_, place_, first);
    Source<D, T, M, Exchange> source{exchange_,
                                     mail,
                                     static_cast<const Elem*>(initial),
                                     e - 1,
                                     read,
                                     p_.H,
                                     M::kIn * p_.H_padded,
                                     slice_ * M::kChunks * D::kChunk + lane_ % 4 * D::kVec,
                                     rows,
                                     {}};
    FASTRNN_UNROLL
    for (int x = 0; x < T::kRowTiles; x++) source.from[x] = from(rows.n[x], rows.length[x]);
    float acc[M::kTiles][T::kRowTiles][4] = {};
    multiply<D, T, M>(weights_, source, acc);
    sums_.put(buffer, slice_, lane_, acc, team_ * kTeamRows);
  }

 protected:
  const Params& p_;
  const Place place_;
  const bool reverse_;
  const int lane_, team_, slice_, unit_, j_, line_;
  Exchange exchange_;
  const Sums<T, kGeometry.sum_rows(), batch_sum_line(T::kShape)> sums_;
  const prim::Shared<float> results_, planes_;
  const prim::Shared<int> lengths_;
  Weights<M> weights_;
};

}  // namespace fastrnn::cuda
