// The weights that a warp keeps for the whole sequence, and their product with the exchanged rows.
#pragma once
#include "../prim/shared.cuh"
#include "tile.cuh"

namespace fastrnn::cuda {

template <class M>
class Weights {
 public:
  // `packed`: this warp's vectors. A lane reads back from shared memory only what it wrote itself.
  FASTRNN_DEVICE void load(const Vec4* packed, int shared_offset, int lane) {
    attach(shared_offset, lane);
    FASTRNN_UNROLL
    for (int m = 0; m < M::kTiles; m++) {
      FASTRNN_UNROLL
      for (int c = 0; c < M::kChunks; c++) {
        FASTRNN_UNROLL
        for (int s = 0; s < 2; s++) {
          const Vec4 v = prim::load_constant(packed + ((m * M::kChunks + c) * 2 + s) * 32 + lane);
          if (c < M::kResident)
            resident_[m][c < M::kResident ? c : 0][s] = v;
          else
            rest_.store(rest_index(m, c, s), v);
        }
      }
    }
  }
  // Weights that a load put there before, where none are in registers.
  FASTRNN_DEVICE void attach(int shared_offset, int lane) {
    rest_ = prim::shared_view<Vec4>(shared_offset, M::kSharedVectors);
    lane_ = lane;
  }
  FASTRNN_DEVICE Vec4 get(int m, int c, int s) const {
    if (c < M::kResident) return resident_[m][c < M::kResident ? c : 0][s];
    return rest_.load(rest_index(m, c, s));
  }

 private:
  FASTRNN_DEVICE int rest_index(int m, int c, int s) const {
    return ((m * (M::kChunks - M::kResident) + c - M::kResident) * 2 + s) * 32 + lane_;
  }
  Vec4 resident_[M::kTiles][M::kResident > 0 ? M::kResident : 1][2];
  prim::Shared<Vec4> rest_;
  int lane_;
};

// acc += weights * exchanged rows. `source` issues a vector's load and waits for it later, so that a block of loads is in
// flight while the one before is multiplied; only the first wait is a wait for other CTAs.
template <class D, class T, class M, class Source>
FASTRNN_DEVICE void multiply(const Weights<M>& weights, Source& source,
                             float (&acc)[M::kTiles][T::kRowTiles][4]) {
  constexpr int kRowTiles = T::kRowTiles;
  constexpr int kBlock = M::kChunks * kRowTiles <= 4 ? M::kChunks : kRowTiles <= 2 ? 4 / kRowTiles : 1;
  constexpr int kBlocks = (M::kChunks + kBlock - 1) / kBlock;
  Vec4 v[2][kBlock][kRowTiles];
  const auto issue = [&](int block) {
    FASTRNN_UNROLL
    for (int i = 0; i < kBlock; i++) {
      FASTRNN_UNROLL
      for (int x = 0; x < kRowTiles; x++)
        if (block * kBlock + i < M::kChunks) v[block & 1][i][x] = source.issue(block * kBlock + i, x);
    }
  };
  issue(0);
  FASTRNN_UNROLL
  for (int b = 0; b < kBlocks; b++) {
    FASTRNN_UNROLL
    for (int i = 0; i < kBlock; i++) {
      FASTRNN_UNROLL
      for (int x = 0; x < kRowTiles; x++)
        if (b * kBlock + i < M::kChunks) source.settle(v[b & 1][i][x], b * kBlock + i, x);
    }
    prim::converge();
    if (b + 1 < kBlocks) issue(b + 1);
    FASTRNN_UNROLL
    for (int i = 0; i < kBlock; i++) {
      const int c = b * kBlock + i;
      if (c >= M::kChunks) continue;
      FASTRNN_UNROLL
      for (int x = 0; x < kRowTiles; x++)
        D::template multiply<M::kTiles>(
            &acc[0][x], kRowTiles, [&](int m, int s) { return weights.get(m, c, s); }, v[b & 1][i][x]);
    }
  }
}

// Partial sums of the warps meet in shared memory: [buffer][slice of K][gate row][batch row].
template <class T, int GateRows, int Line = T::kRows + kSumPadding>
struct Sums {
  static constexpr int kLine = Line;
  prim::Shared<float> data;
  FASTRNN_DEVICE explicit Sums(int offset)
      : data(prim::shared_view<float>(offset, 2 * T::kWarps * GateRows * kLine)) {}
  FASTRNN_DEVICE int index(int buffer, int slice, int row, int column) const {
    return ((buffer * T::kWarps + slice) * GateRows + row) * kLine + column;
  }
  template <int Tiles>
  FASTRNN_DEVICE void put(int buffer, int slice, int lane, const float (&acc)[Tiles][T::kRowTiles][4],
                          int first = 0) const {
    FASTRNN_UNROLL
    for (int m = 0; m < Tiles; m++) {
      FASTRNN_UNROLL
      for (int x = 0; x < T::kRowTiles; x++) {
        FASTRNN_UNROLL
        for (int r = 0; r < 4; r++)
          data.store(
              index(buffer, slice, m * 16 + lane / 4 + r / 2 * 8, first + x * 8 + lane % 4 * 2 + r % 2),
              acc[m][x][r]);
      }
    }
  }
  // In the order of K, whatever warp had which slice: the same bits in every CTA.
  FASTRNN_DEVICE float get(int buffer, int row, int column) const {
    float sum = 0.f;
    FASTRNN_UNROLL
    for (int s = 0; s < T::kWarps; s++) sum += data.load(index(buffer, s, row, column));
    return sum;
  }
};

}  // namespace fastrnn::cuda
