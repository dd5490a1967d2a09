// One recurrent layer forward, in one launch: a CTA keeps its units' weights on the chip and walks all T steps.
//
//   step:   vectors of h_{t-1} as they arrive  ->  tensor cores, each warp its slice of K
//           ->  partial sums in shared memory  ->  one barrier  ->  cell, publish h_t, store what backward needs
//
// Tensors and options: params.h. A kernel per step would load the weights from L2 anew every time and pay a launch.
#pragma once
#include "cells.cuh"
#include "source.cuh"
#include "weights.cuh"

namespace fastrnn::cuda {

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false,
          bool kNoisy = false>
class Forward {
  using Geo = GeometryOf<Cell, T, false>;
  using Exchange = ExchangeOf<D, T, Geo::kGeometry.values()>;
  using Elem = typename D::Elem;
  using A = Activations<kLinear>;
  static constexpr int kLast = Cell::kPhases - 1;
  using M0 = Matmul<Geo, 0>;
  using M1 = Matmul<Geo, kLast>;
  static constexpr CellShape kCell = Cell::kShape;
  using Params = ForwardParamsOf<kNoisy>;
  static constexpr int kTape = kTapeOf<Cell, kNoisy>;

 public:
  static constexpr Geometry kGeometry = Geo::kGeometry;
  static constexpr SharedLayout kLayout = shared_layout(kGeometry, D::kFormat, Exchange::kBuffers);
  static constexpr bool kAvailable =
      kLayout.bytes <= prim::kMostShared && (prim::kHasClusters || !Exchange::kIsCluster);

  FASTRNN_DEVICE Forward(const Params& p)
      : p_(p),
        place_(place_of(p, prim::block_index())),
        d_(p.dir[place_.direction]),
        walk_{p.T, d_.reverse},
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
    exchange_.start(p, 1, 1);
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) begin(i);
  }

  FASTRNN_DEVICE void run() {
    for (int s = 0; s < p_.T; s++) {
      phase<0>(s, w0_);
      if constexpr (kLast) phase<1>(s, w1_);
    }
    exchange_.finish();
  }

 private:
  FASTRNN_DEVICE float initial(const void* state, const Element& x) const {
    if (!state || !x.length) return 0.f;
    return D::load(static_cast<const Elem*>(state) + static_cast<int64_t>(x.n) * p_.H + x.j);
  }

  // h0 as the matmul takes it.
  FASTRNN_DEVICE const Elem* first_operand() const {
    if constexpr (kNoisy)
      if (masks_.masks_state()) return static_cast<const Elem*>(p_.h0_masked[place_.direction]);
    return static_cast<const Elem*>(d_.h0);
  }

  FASTRNN_DEVICE void begin(int i) {
    length_[i] = length_of<T>(p_, place_, i);
    const Element x = element_of<T>(p_, place_, i, length_[i]);
    state_[i].h = initial(d_.h0, x);
    state_[i].c = Cell::kHasCell ? initial(d_.c0, x) : 0.f;
    state_[i].held = 0.f;
    bias_n_[i] = d_.bias_n && x.length ? prim::load_constant(d_.bias_n + x.j) : 0.f;
    fetch(i, x, walk_.at(0));
    masks_.begin(i, x, walk_.at(0), walk_.at(1));
  }

  // The input part of a step, fetched a step ahead: it comes from HBM.
  FASTRNN_DEVICE void fetch(int i, const Element& x, int t) {
    if (t >= x.length) return;
    FASTRNN_UNROLL
    for (int g = 0; g < Cell::kGates; g++) {
      if (p_.wx_is_float)
        wx_[i][g] = prim::load_constant(row_at<const float>(d_.wx, t, x.n) + g * p_.H + x.j);
      else
        wx_[i][g] = D::load(row_at<const Elem>(d_.wx, t, x.n) + g * p_.H + x.j);
    }
  }

  template <int Phase, class M>
  FASTRNN_DEVICE void phase(int s, const Weights<M>& weights) {
    const int t = walk_.at(s), e = s * Cell::kPhases + Phase;
    const int read = Phase == 0 ? walk_.before(t) : t;
    Source<D, T, M, Exchange> source{exchange_,
                                     d_.mail[Phase == 0 ? kLast : 0],
                                     first_operand(),
                                     e - 1,
                                     read,
                                     p_.H,
                                     p_.H_padded,
                                     slice_ * T::kChunks * D::kChunk + lane_ % 4 * D::kVec,
                                     rows_,
                                     {}};
    FASTRNN_UNROLL
    for (int x = 0; x < T::kRowTiles; x++) {
      if (Phase == 0)
        source.from[x] = state_before(p_, walk_, rows_.n[x], rows_.length[x], t);
      else
        source.from[x] = t < rows_.length[x] ? From::mail : From::zero;
    }
    float acc[M::kTiles][T::kRowTiles][4] = {};
    if (e > 0) exchange_.wait(e - 1);
    multiply<D, T, M>(weights, source, acc);
    const int buffer = mutated(Mutation::single_reduction_tile) ? 0 : e & 1;
    sums_.put(buffer, slice_, lane_, acc);
    if (!mutated(Mutation::dropped_barrier)) prim::block_barrier("partial sums");
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) finish<Phase, M>(i, s, t, e, buffer);
    exchange_.done(e);
  }

  // The epilogue of one element.
  template <int Phase, class M>
  FASTRNN_DEVICE void finish(int i, int s, int t, int e, int buffer) {
    const Element x = element_of<T>(p_, place_, i, length_[i]);
    float out = 0.f, tape[4];
    const bool live = t < x.length;
    if (live) {
      if (Phase == 0 && reset_at(p_, t, x.n)) state_[i].h = state_[i].c = 0.f;
      float input[4] = {}, sum[4] = {};
      FASTRNN_UNROLL
      for (int g = 0; g < M::kOut; g++) {
        input[g] = wx_[i][kCell.sums[Phase].first + g];
        sum[g] = sums_.get(buffer, g * T::kUnits + x.unit, x.local);
      }
      out = Cell::template forward<A, Phase>(state_[i], input, sum, bias_n_[i], tape, masks_.of(i));
    }
    const bool last = Phase == kLast && s == p_.T - 1;
    if (!Exchange::kInShared || !last)
      publish<D>(p_, exchange_, d_.mail[Phase], e, t, x, 0, operand<Phase>(i, out));
    if (x.length) keep<Phase>(i, x, t, live, out, tape);
    if (Phase != kLast || last) return;
    fetch(i, x, walk_.at(s + 1));
    masks_.advance(i, x, walk_.at(s + 1), walk_.at(s + 2));
  }

  // h_t as the next step's matmul takes it: masked after it was rounded, as the weight gradients' operand is.
  template <int Phase>
  FASTRNN_DEVICE float operand(int i, float out) const {
    if constexpr (kNoisy && Phase == kLast)
      if (masks_.masks_state()) return D::round(out) * masks_.later(i);
    return out;
  }

  template <int Phase>
  FASTRNN_DEVICE void keep(int i, const Element& x, int t, bool live, float out, const float (&tape)[4]) {
    if (Phase == kLast && (Exchange::kInShared || d_.y.data != d_.mail[kLast].data))
      D::store(row_at<Elem>(d_.y, t, x.n) + x.j, out);
    if (d_.tape.data && live) {
      constexpr int kEnd = Phase == kLast ? kTape : kCell.sums[Phase].first + kCell.sums[Phase].count;
      FASTRNN_UNROLL
      for (int g = kCell.sums[Phase].first; g < kEnd; g++)
        D::store(row_at<Elem>(d_.tape, t, x.n) + g * p_.H + x.j, tape[g]);
    }
    if (Phase != kLast) return;
    if (Cell::kHasCell && d_.cells.data)
      prim::store(row_at<float>(d_.cells, t, x.n) + x.j, live ? state_[i].c : 0.f);
    if (t != (walk_.backwards ? 0 : x.length - 1)) return;
    const int64_t at = static_cast<int64_t>(x.n) * p_.H + x.j;
    if (d_.h_n) D::store(static_cast<Elem*>(d_.h_n) + at, out);
    if (Cell::kHasCell && d_.c_n) D::store(static_cast<Elem*>(d_.c_n) + at, state_[i].c);
  }

  const Params& p_;
  const Place place_;
  const ForwardDirection& d_;
  const Walk walk_;
  const LaneRows<T> rows_;
  const int lane_, warp_, slice_;
  Exchange exchange_;
  const Sums<T, kGeometry.sum_rows()> sums_;
  Masks<T::kPerThread, false, kNoisy> masks_;
  Weights<M0> w0_;
  Weights<M1> w1_;
  int length_[T::kPerThread];
  State state_[T::kPerThread];
  float wx_[T::kPerThread][Cell::kGates], bias_n_[T::kPerThread];
};

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kLinear = false,
          bool kNoisy = false>
FASTRNN_KERNEL(T::kThreads)
forward_kernel(const FASTRNN_GRID_CONSTANT ForwardParamsOf<kNoisy> p) {
  using Layer = Forward<Cell, D, T, ExchangeOf, kLinear, kNoisy>;
  if constexpr (Layer::kAvailable) {
    Layer layer(p);
    layer.run();
  } else {
    prim::unavailable();
  }
}

}  // namespace fastrnn::cuda
