// Sums along a row whose units lie in many CTAs. Each segment of 16 units makes a pair of floats of its part; whoever needs the
// whole reads all pairs of the row and adds them in one order, so that every CTA has the same bits.
//
// Pairs go through global memory by the sentinel protocol whatever exchanges h: both words vouch for themselves, are written
// once, and have a place of their own in each step. A CTA with all units keeps them in shared memory.
#pragma once
#include "source.cuh"

namespace fastrnn::cuda {

// Over the 16 lanes of a segment: the same bits in each.
FASTRNN_DEVICE float segment_sum(float v) {
  FASTRNN_UNROLL
  for (int m = 1; m < kSegment; m *= 2) v += prim::bits_float(prim::shuffle_xor(prim::float_bits(v), m));
  return v;
}

template <class T, bool Local, int MostUnits>
class RowPairs {
  static constexpr int kOwn = T::kUnits / kSegment;
  static constexpr int kLine = pair_line(T::kUnits);
  // Vectors of two pairs that a lane reads.
  static constexpr int kMost =
      Local ? 1 : (MostUnits + 2 * kSegment * kSegment - 1) / (2 * kSegment * kSegment);
  static_assert(T::kUnits % kSegment == 0, "a segment's lanes are neighbours");
  static_assert(!Local || kOwn <= 2 * kSegment, "a row of pairs in one read");

 public:
  FASTRNN_DEVICE RowPairs(const Shape& p, const Place& place, int offset)
      : H_(p.H),
        segments_((p.H + kSegment - 1) / kSegment),
        first_(place.cta * kOwn),
        through_global_(p, place, 0),
        words_(prim::shared_view<uint32_t>(offset, 2 * T::kRows * kLine)),
        vectors_(prim::shared_view<Vec4>(offset, 2 * T::kRows * kLine / 4)) {}

  // Units of a segment, where they are counted.
  FASTRNN_DEVICE int count(int segment) const {
    const int left = H_ - segment * kSegment;
    if (mutated(Mutation::segment_tail)) return left > 0 ? kSegment : 0;
    return left < 0 ? 0 : left < kSegment ? left : kSegment;
  }
  FASTRNN_DEVICE int segment_of(const Element& x) const { return first_ + x.unit / kSegment; }
  // Whether a lane is in the segment of an existing unit: it takes part in the row's sums then.
  FASTRNN_DEVICE bool exists(const Element& x) const { return x.mine && segment_of(x) < segments_; }

  // Plane: 0 for the row's first sum in a step, 1 for its second. From one lane of a segment that exists.
  FASTRNN_DEVICE void publish(int plane, const Mail& mail, int t, const Element& x, float a, float b) {
    const int segment = segment_of(x), k = 2 * segment;
    put(plane, mail, t, x, k, a);
    put(plane, mail, t, x, k + 1, b);
    // A reader takes whole vectors.
    if (segment + 1 != segments_ || segments_ % 2 == 0) return;
    put(plane, mail, t, x, k + 2, 0.f);
    put(plane, mail, t, x, k + 3, 0.f);
  }
  // Between publishing and reading, for all threads of the CTA.
  FASTRNN_DEVICE void published() const {
    if (!Local)
      prim::converge();  // no lane asks for what its warp has yet to publish
    else if (!mutated(Mutation::statistics_barrier))
      prim::block_barrier("pairs");
  }

  // The pairs of a row that this lane reads.
  struct Part {
    Vec4 v[kMost];
  };
  FASTRNN_DEVICE Part read(int plane, const Mail& mail, int t, const Element& x, bool wanted) {
    Part part;
    FASTRNN_UNROLL
    for (int i = 0; i < kMost; i++) {
      part.v[i] = {0, 0, 0, 0};
      if (wanted && 2 * vector(i) < segments_) {
        if constexpr (Local)
          part.v[i] = vectors_.load((plane * T::kRows + x.local) * (kLine / 4) + vector(i));
        else
          part.v[i] = through_global_.load(mail, 0, t, x.n, 0, 4 * vector(i));
      }
    }
    FASTRNN_UNROLL
    for (int i = 0; i < kMost; i++) {
      if constexpr (!Local)
        if (wanted && 2 * vector(i) < segments_)
          through_global_.retry(part.v[i], mail, t, x.n, 4 * vector(i));
    }
    prim::converge();
    return part;
  }
  // Sum of f(a, b, units of the segment) over a row.
  template <class F>
  FASTRNN_DEVICE float sum(const Part& part, F&& f) const {
    float s = 0.f;
    FASTRNN_UNROLL
    for (int i = 0; i < kMost; i++) {
      const Vec4& v = part.v[i];
      const int segment = 2 * vector(i);
      const auto mine = [&](int at) {
        return !mutated(Mutation::own_segment) || (at >= first_ && at < first_ + kOwn);
      };
      if (mine(segment))
        s += f(prim::bits_float(v.x), prim::bits_float(v.y), static_cast<float>(count(segment)));
      if (mine(segment + 1))
        s += f(prim::bits_float(v.z), prim::bits_float(v.w), static_cast<float>(count(segment + 1)));
    }
    return segment_sum(s);
  }

 private:
  FASTRNN_DEVICE static int vector(int i) { return prim::thread_index() % kSegment + i * kSegment; }
  FASTRNN_DEVICE void put(int plane, const Mail& mail, int t, const Element& x, int k, float v) {
    const uint32_t word = Tf32::word(v);
    if constexpr (Local)
      words_.store((plane * T::kRows + x.local) * kLine + k, word);
    else
      through_global_.publish(mail, 0, t, x.n, 0, k, word);
  }

  const int H_, segments_, first_;
  Sentinel<Tf32, T, 1> through_global_;
  const prim::Shared<uint32_t> words_;
  const prim::Shared<Vec4> vectors_;
};

// What a segment publishes for a row's mean and variance: the mean of its `values` values a unit, and their squared
// distances from that. A row's variance is sums of such distances alone, of segments' means from the row's and of values
// from their segment's: all terms are positive, nothing cancels, and an error of a mean enters squared.
template <int Values>
FASTRNN_DEVICE void segment_moments(const float (&v)[Values], bool exists, int units, float& mean,
                                    float& squares) {
  float s = 0.f;
  FASTRNN_UNROLL
  for (int g = 0; g < Values; g++) s += v[g];
  mean = segment_sum(exists ? s : 0.f) / static_cast<float>(units > 0 ? Values * units : 1);
  s = 0.f;
  FASTRNN_UNROLL
  for (int g = 0; g < Values; g++) s = prim::fma(v[g] - mean, v[g] - mean, s);
  squares = segment_sum(exists ? s : 0.f);
}

}  // namespace fastrnn::cuda
