// What kernels of a structure of their own share, forward and backward: a CTA's place, its rows, its exchange, and the
// matmul of one phase.
#pragma once
#include "source.cuh"
#include "weights.cuh"

namespace fastrnn::cuda {

template <class Geo, class D, class T, template <class, class, int> class ExchangeOf, class Params>
class LayerBase {
 public:
  static constexpr Geometry kGeometry = Geo::kGeometry;
  using Exchange = ExchangeOf<D, T, kGeometry.values()>;
  static constexpr SharedLayout kLayout = shared_layout(kGeometry, D::kFormat, Exchange::kBuffers);

 protected:
  using Elem = typename D::Elem;

  FASTRNN_DEVICE LayerBase(const Params& p, bool backwards)
      : p_(p),
        place_(place_of(p, prim::block_index())),
        walk_{p.T, backwards},
        rows_(p, place_),
        lane_(prim::thread_index() % 32),
        warp_(prim::thread_index() / 32),
        slice_((warp_ + place_.cta) % T::kWarps),
        exchange_(p, place_, kLayout.mail),
        sums_(kLayout.sums) {
    FASTRNN_UNROLL
    for (int i = 0; i < T::kPerThread; i++) length_[i] = length_of<T>(p_, place_, i);
  }

  // This warp's weights of a phase.
  template <int Phase, class M>
  FASTRNN_DEVICE void load(Weights<M>& to, const Vec4* packed) const {
    const Vec4* at = packed + static_cast<int64_t>(place_.cta) * kGeometry.cta_vectors() +
                     warp_ * kGeometry.warp_vectors();
    const int shared = kLayout.weights + warp_ * kGeometry.warp_shared_vectors() * 16;
    to.load(at + (Phase ? kGeometry.phase[0].vectors() : 0),
            shared + (Phase ? kGeometry.phase[0].shared_vectors() * 16 : 0), lane_);
  }

  FASTRNN_DEVICE Element element(int i) const { return element_of<T>(p_, place_, i, length_[i]); }
  // Of a state (N, width).
  FASTRNN_DEVICE float load(const void* state, const Element& x, int width) const {
    if (!state || !x.length) return 0.f;
    return D::load(static_cast<const Elem*>(state) + static_cast<int64_t>(x.n) * width + x.j);
  }
  FASTRNN_DEVICE void store(void* state, const Element& x, int width, float v) const {
    if (state) D::store(static_cast<Elem*>(state) + static_cast<int64_t>(x.n) * width + x.j, v);
  }

  // The weights times what exchange e - 1 published as row `read` of the mail, into the partial sums, of which it returns the
  // buffer. from(x): where row tile x has it from; width: of an initial state, K: of an exchanged row; idle: this CTA has
  // no sum in this phase.
  template <class M, class FromOf>
  FASTRNN_DEVICE int sum(const Weights<M>& weights, int e, int read, const Mail& mail, const void* initial,
                         int width, int K, bool idle, FromOf&& from) {
    Source<D, T, M, Exchange> source{exchange_,
                                     mail,
                                     static_cast<const Elem*>(initial),
                                     e - 1,
                                     read,
                                     width,
                                     K,
                                     slice_ * M::kChunks * D::kChunk + lane_ % 4 * D::kVec,
                                     rows_,
                                     {}};
    FASTRNN_UNROLL
    for (int x = 0; x < T::kRowTiles; x++) source.from[x] = from(x);
    if (e > 0) exchange_.wait(e - 1);
    const int buffer = mutated(Mutation::single_reduction_tile) ? 0 : e & 1;
    if (!idle) {
      float acc[M::kTiles][T::kRowTiles][4] = {};
      multiply<D, T, M>(weights, source, acc);
      sums_.put(buffer, slice_, lane_, acc);
    }
    if (!mutated(Mutation::dropped_barrier)) prim::block_barrier("partial sums");
    return buffer;
  }

  const Params& p_;
  const Place place_;
  const Walk walk_;
  const LaneRows<T> rows_;
  const int lane_, warp_, slice_;
  Exchange exchange_;
  const Sums<T, kGeometry.sum_rows()> sums_;
  int length_[T::kPerThread];
};

}  // namespace fastrnn::cuda
