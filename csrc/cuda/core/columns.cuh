// Sums down the columns of a CTA's units over the whole batch, which one CTA has: statistics and their gradients never
// leave it. Four lanes share a column, so a warp's reads are eight columns wide; the order of the sums is fixed.
#pragma once
#include "../prim/shared.cuh"
#include "source.cuh"

namespace fastrnn::cuda {

template <class T>
class Columns {
  static constexpr int kMost = 4 * T::kUnits, kLine = T::kRows + kSumPadding;
  static_assert(T::kUnits % 8 == 0, "a warp has eight columns, all its lanes or none");

 public:
  FASTRNN_DEVICE Columns(int offset)
      : values_(prim::shared_view<float>(offset, 2 * kMost * kLine)),
        results_(prim::shared_view<float>(offset + 2 * kMost * kLine * 4, 2 * kMost)) {}

  FASTRNN_DEVICE void put(int plane, int column, int row, float v) const {
    values_.store((plane * kMost + column) * kLine + row, v);
  }
  FASTRNN_DEVICE float first(int column) const { return results_.load(column); }
  FASTRNN_DEVICE float second(int column) const { return results_.load(kMost + column); }

  // For each of `Count` columns f(column, sum) gives the two results; sum(g) adds g(plane 0, plane 1 or 0) over live rows.
  // Between two barriers: what is put comes before, what is read after.
  template <int Count, bool TwoPlanes, class Live, class Results>
  FASTRNN_DEVICE void reduce(int rows, Live&& live, Results&& f) const {
    prim::block_barrier("columns");
    const int q = prim::thread_index() % 4;
    for (int column = prim::thread_index() / 4; column < Count; column += T::kThreads / 4) {
      const auto sum = [&](auto&& g) {
        float s = 0.f;
        for (int r = q; r < rows; r += 4) {
          if (!live(column, r)) continue;
          const float second = TwoPlanes ? values_.load((kMost + column) * kLine + r) : 0.f;
          s += g(values_.load(column * kLine + r), second);
        }
        s += prim::bits_float(prim::shuffle_xor(prim::float_bits(s), 1));
        return s + prim::bits_float(prim::shuffle_xor(prim::float_bits(s), 2));
      };
      float a = 0.f, b = 0.f;
      f(column, q == 0, sum, a, b);
      if (q == 0) {
        results_.store(column, a);
        results_.store(kMost + column, b);
      }
    }
    if (!mutated(Mutation::statistics_barrier)) prim::block_barrier("statistics");
  }

 private:
  const prim::Shared<float> values_, results_;
};

}  // namespace fastrnn::cuda
