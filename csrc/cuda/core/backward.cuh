// One recurrent layer backward, in one launch, against the order of the forward steps:
//
//   step:   vectors of the gate gradients of the step before as they arrive  ->  tensor cores: dh = dgates W_hh
//           ->  partial sums  ->  one barrier  ->  cell backward, publish this step's gate gradients
//
// The same machine as forward.cuh with K = gates * H and one sum per unit. The gradients of weights, inputs and biases are
// products over all steps at once, of `dgates` and the saved states: the host's GEMMs.
#pragma once
#include "cells.cuh"
#include "source.cuh"
#include "weights.cuh"

namespace fastrnn::cuda {

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false,
          bool kNoisy = false>
class Backward {
  using Geo = GeometryOf<Cell, T, true>;
  using Exchange = ExchangeOf<D, T, Geo::kGeometry.values()>;
  using Elem = typename D::Elem;
  using A = Activations<kLinear>;
  static constexpr int kLast = Cell::kPhases - 1;
  using M0 = Matmul<Geo, 0>;
  using M1 = Matmul<Geo, kLast>;
  static constexpr CellShape kCell = Cell::kShape;
  using Params = BackwardParamsOf<kNoisy>;
  static constexpr int kTape = kTapeOf<Cell, kNoisy>;

 public:
  static constexpr Geometry kGeometry = Geo::kGeometry;
  static constexpr SharedLayout kLayout = shared_layout(kGeometry, D::kFormat, Exchange::kBuffers);
  static constexpr bool kAvailable =
      kLayout.bytes <= prim::kMostShared && (prim::kHasClusters || !Exchange::kIsCluster);

  FASTRNN_DEVICE Backward(const Params& p)
      : p_(p),
        place_(place_of(p, prim::block_index())),
        d_(p.dir[place_.direction]),
        walk_{p.T, !d_.reverse},
        rows_(p, place_),
        lane_(prim::thread_index() % 32),
        warp_(prim::thread_index() / 32),
        slice_((warp_ + place_.cta) % T::kWarps),
        exchange_(p, place_, kLayout.mail),
        sums_(kLayout.sums),
        masks_(p, d_.reverse) {
    const Vec4* packed = d_.weights + static_cast<int64_t>(place_.cta) * kGeometry.cta_vectors() +
                         warp_ * kGeometry.warp_vectors();
    const int shared = kLayout.weights + warp_ * kGeometry.warp_shared_vectors() * 16;
    w0_.load(packed, shared, lane_);
    if constexpr (kLast) w1_.load(packed + M0::kVectors, shared + M0::kSharedVectors * 16, lane_);
    exchange_.start(p, kCell.published[0].count, kCell.published[kLast].count);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) begin(i);
  }

  // After the last step one more matmul: what reaches the initial state.
  FASTRNN_DEVICE void run() {
    for (int s = 0; s <= p_.T; s++) {
      phase<0>(s, w0_);
      if constexpr (kLast > 0) {
        if (s < p_.T) phase<1>(s, w1_);
      }
    }
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) end(i);
    exchange_.finish();
  }

 private:
  FASTRNN_DEVICE Element element(int i) const { return element_of<T>(p_, place_, i, length_[i]); }

  FASTRNN_DEVICE float state(const void* data, const Element& x) const {
    if (!data || !x.length) return 0.f;
    return D::load(static_cast<const Elem*>(data) + static_cast<int64_t>(x.n) * p_.H + x.j);
  }

  FASTRNN_DEVICE void begin(int i) {
    length_[i] = length_of<T>(p_, place_, i);
    const Element x = element(i);
    carry_[i].dh = state(d_.dh_n, x);
    carry_[i].dc = Cell::kHasCell ? state(d_.dc_n, x) : 0.f;
    carry_[i].held = 0.f;
    fetch(i, x, walk_.at(0));
    masks_.begin(i, x, walk_.at(0), walk_.at(1));
  }

  FASTRNN_DEVICE void end(int i) const {
    const Element x = element(i);
    if (!x.length) return;
    const int64_t at = static_cast<int64_t>(x.n) * p_.H + x.j;
    if (d_.dh0) D::store(static_cast<Elem*>(d_.dh0) + at, carry_[i].dh);
    if (Cell::kHasCell && d_.dc0) D::store(static_cast<Elem*>(d_.dc0) + at, carry_[i].dc);
  }

  // What a step reads from HBM, fetched a step ahead.
  FASTRNN_DEVICE void fetch(int i, const Element& x, int t) {
    if (t >= x.length) return;
    FASTRNN_UNROLL
    for (int g = 0; g < kTape; g++)
      saved_[i].gate[g] = D::load(row_at<const Elem>(d_.tape, t, x.n) + g * p_.H + x.j);
    dy_[i] = d_.dy.data ? D::load(row_at<const Elem>(d_.dy, t, x.n) + x.j) : 0.f;
    if (Cell::kReadsOutput && !kNoisy) saved_[i].h = D::load(row_at<const Elem>(d_.y, t, x.n) + x.j);
    // The state before the step, as forward had it.
    const int before = walk_.backwards ? t - 1 : t + 1;
    const bool first = before < 0 || before >= x.length, cleared = reset_at(p_, t, x.n);
    if (Cell::kReadsPrevious)
      saved_[i].h_prev = cleared ? 0.f
                         : first ? state(d_.h0, x)
                                 : D::load(row_at<const Elem>(d_.y, before, x.n) + x.j);
    if (Cell::kHasCell) {
      saved_[i].c = prim::load_constant(row_at<const float>(d_.cells, t, x.n) + x.j);
      saved_[i].c_prev = cleared ? 0.f
                         : first ? state(d_.c0, x)
                                 : prim::load_constant(row_at<const float>(d_.cells, before, x.n) + x.j);
      dcells_[i] = d_.dcells.data ? prim::load_constant(row_at<const float>(d_.dcells, t, x.n) + x.j) : 0.f;
    }
  }

  template <int Phase, class M>
  FASTRNN_DEVICE void phase(int s, const Weights<M>& weights) {
    const int t = walk_.at(s), e = s * Cell::kPhases + Phase;
    const int read = Phase == 0 ? walk_.before(t) : t;
    Source<D, T, M, Exchange> source{exchange_,
                                     d_.mail[Phase == 0 ? kLast : 0],
                                     nullptr,
                                     e - 1,
                                     read,
                                     p_.H,
                                     M::kIn * p_.H_padded,
                                     slice_ * M::kChunks * D::kChunk + lane_ % 4 * D::kVec,
                                     rows_,
                                     {}};
    FASTRNN_UNROLL
    for (int x = 0; x < T::kRowTiles; x++) {
      if (Phase == 0)
        source.from[x] = gradient_after(p_, rows_.n[x], rows_.length[x], read);
      else
        source.from[x] = t < rows_.length[x] ? From::mail : From::zero;
    }
    float acc[M::kTiles][T::kRowTiles][4] = {};
    if (e > 0) {
      exchange_.wait(e - 1);
      multiply<D, T, M>(weights, source, acc);
    }
    const int buffer = mutated(Mutation::single_reduction_tile) ? 0 : e & 1;
    sums_.put(buffer, slice_, lane_, acc);
    if (!mutated(Mutation::dropped_barrier)) prim::block_barrier("partial sums");
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) finish<Phase>(i, s, t, e, read, buffer);
    if (s < p_.T) exchange_.done(e);
  }

  // The epilogue of one element.
  template <int Phase>
  FASTRNN_DEVICE void finish(int i, int s, int t, int e, int read, int buffer) {
    const Element x = element(i);
    const bool live = s < p_.T && t < x.length;
    float g[4] = {}, n_input = 0.f;
    if (Phase == 0 && x.length && read >= 0 && read < x.length) {
      // The step walked before has passed its gradient on: through the matmul, or to nobody.
      if (reset_at(p_, read, x.n))
        carry_[i].dh = carry_[i].dc = 0.f;
      else
        carry_[i].dh += behind_mask(i, sums_.get(buffer, x.unit, x.local));
    }
    if (s == p_.T) return;
    if (live) {
      if (Phase == 0) {
        if (Cell::kHasCell) carry_[i].dc += dcells_[i];
        n_input = Cell::template backward<A, 0>(carry_[i], saved_[i], carry_[i].dh + dy_[i], g, masks_.of(i));
      } else {
        Cell::template backward<A, kLast>(carry_[i], saved_[i], sums_.get(buffer, x.unit, x.local), g,
                                          masks_.of(i));
      }
    }
    FASTRNN_UNROLL
    for (int v = 0; v < kCell.published[Phase].count; v++)
      publish<D>(p_, exchange_, d_.mail[Phase], e, t, x, v, g[kCell.published[Phase].first + v]);
    if (x.length) keep<Phase>(x, t, g, n_input);
    if (Phase != kLast) return;
    if (s + 1 < p_.T) fetch(i, x, walk_.at(s + 1));
    masks_.advance(i, x, walk_.at(s + 1), walk_.at(s + 2));
  }

  // The matmul's sum is the gradient of the masked state that the step walked before read.
  FASTRNN_DEVICE float behind_mask(int i, float sum) const {
    if constexpr (kNoisy) return sum * masks_.later(i);
    return sum;
  }

  template <int Phase>
  FASTRNN_DEVICE void keep(const Element& x, int t, const float (&g)[4], float n_input) const {
    constexpr int kFirst = kCell.published[Phase].first, kEnd = kFirst + kCell.published[Phase].count;
    const Rows& recurrent = Cell::kTwoGradients ? d_.dgates_h : d_.dgates;
    FASTRNN_UNROLL
    for (int k = kFirst; k < kEnd; k++) {
      if (Exchange::kInShared || !d_.mail_is_gradient)
        D::store(row_at<Elem>(recurrent, t, x.n) + k * p_.H + x.j, g[k]);
      if (Cell::kTwoGradients)
        D::store(row_at<Elem>(d_.dgates, t, x.n) + k * p_.H + x.j, k == kEnd - 1 ? n_input : g[k]);
    }
  }

  const Params& p_;
  const Place place_;
  const BackwardDirection& d_;
  const Walk walk_;
  const LaneRows<T> rows_;
  const int lane_, warp_, slice_;
  Exchange exchange_;
  const Sums<T, kGeometry.sum_rows()> sums_;
  Masks<T::kPerThread, true, kNoisy> masks_;
  Weights<M0> w0_;
  Weights<M1> w1_;
  int length_[T::kPerThread];
  Carry carry_[T::kPerThread];
  Saved saved_[T::kPerThread];
  float dy_[T::kPerThread], dcells_[T::kPerThread];
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false,
          bool kNoisy = false>
FASTRNN_KERNEL(T::kThreads)
backward_kernel(const FASTRNN_GRID_CONSTANT BackwardParamsOf<kNoisy> p) {
  using Layer = Backward<Cell, D, T, ExchangeOf, kLinear, kNoisy>;
  if constexpr (Layer::kAvailable) {
    Layer layer(p);
    layer.run();
  } else {
    prim::unavailable();
  }
}

}  // namespace fastrnn::cuda
