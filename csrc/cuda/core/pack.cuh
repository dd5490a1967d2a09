// W_hh (G * H, H) as the kernels want it: for each CTA, warp and phase, the tensor core operand of each 16 gate rows and
// each chunk of K, a lane's two vectors 32 lanes apart, so that a warp's load is 512 contiguous bytes.
//
// Warp w of CTA c has slice (w + c) % kWarps of K: CTAs that run side by side then read different parts of the exchanged
// rows at any moment.
#pragma once
#include "backward.cuh"
#include "forward.cuh"

namespace fastrnn::cuda {

// Which weight is at (gate row of the tile, k), by direction of the kernel.
struct ForwardOrder {
  template <class Cell, int Phase>
  FASTRNN_HOST_DEVICE static constexpr int in() {
    return 1;
  }
  template <class Cell, int Phase>
  FASTRNN_HOST_DEVICE static constexpr int out() {
    return Cell::rows(Phase);
  }
  // Row and column in W_hh; a row of -1 is padding.
  template <class Cell, int Phase>
  FASTRNN_DEVICE static void find(int units, int H, int, int cta, int tile_row, int k, int* row,
                                  int* column) {
    const int unit = cta * units + tile_row % units, gate = Cell::first(Phase) + tile_row / units;
    *row = unit < H && k < H ? gate * H + unit : -1;
    *column = k;
  }
};
struct BackwardOrder {
  template <class Cell, int Phase>
  FASTRNN_HOST_DEVICE static constexpr int in() {
    return Cell::published(Phase ? 0 : Cell::kPhases - 1);
  }
  template <class Cell, int Phase>
  FASTRNN_HOST_DEVICE static constexpr int out() {
    return 1;
  }
  template <class Cell, int Phase>
  FASTRNN_DEVICE static void find(int units, int H, int H_padded, int cta, int tile_row, int k, int* row,
                                  int* column) {
    constexpr int kFrom = Phase ? 0 : Cell::kPhases - 1;
    const int value = k / H_padded, j = k % H_padded, unit = cta * units + tile_row;
    const bool exists = value < Cell::published(kFrom) && j < H && unit < H;
    *row = exists ? (Cell::published_first(kFrom) + value) * H + j : -1;
    *column = unit;
  }
};

struct PackParams {
  const void* weights = nullptr;  // W_hh (G * H, H)
  Vec4* packed = nullptr;
  int H = 0, H_padded = 0, ctas = 0;
};

template <class Cell, class D, class T, class Order>
class Pack {
  static constexpr int kLast = Cell::kPhases - 1;
  using M0 = Matmul<T, Order::template in<Cell, 0>(), Order::template out<Cell, 0>()>;
  using M1 = Matmul<T, Order::template in<Cell, kLast>(), Order::template out<Cell, kLast>()>;

 public:
  static constexpr int kWarpVectors = M0::kWeightVectors + (kLast ? M1::kWeightVectors : 0);
  static constexpr int kCtaVectors = T::kWarps * kWarpVectors;

  FASTRNN_DEVICE static Vec4 vector(const PackParams& p, int64_t index) {
    const int cta = static_cast<int>(index / kCtaVectors), in_cta = static_cast<int>(index % kCtaVectors);
    const int slice = (in_cta / kWarpVectors + cta) % T::kWarps, at = in_cta % kWarpVectors;
    if (at < M0::kWeightVectors) return operand<M0, 0>(p, cta, slice, at);
    return operand<M1, kLast>(p, cta, slice, at - M0::kWeightVectors);
  }

 private:
  template <class M, int Phase>
  FASTRNN_DEVICE static Vec4 operand(const PackParams& p, int cta, int slice, int at) {
    const int lane = at % 32, s = at / 32 % 2, chunk = at / 64 % M::kChunks, m = at / 64 / M::kChunks;
    const int k0 = (slice * M::kChunks + chunk) * D::kChunk;
    uint32_t word[4];
    FASTRNN_UNROLL
    for (int r = 0; r < 4; r++) {
      const int tile_row = m * 16 + lane / 4 + r % 2 * 8;
      const auto weight = [&](int k) {
        int row, column;
        Order::template find<Cell, Phase>(T::kUnits, p.H, p.H_padded, cta, tile_row, k0 + k, &row, &column);
        if (row < 0) return 0.f;
        return D::load(static_cast<const typename D::Elem*>(p.weights) + static_cast<int64_t>(row) * p.H +
                       column);
      };
      word[r] = D::weight_word(weight, lane % 4, s, r / 2);
    }
    return {word[0], word[1], word[2], word[3]};
  }
};

template <class Cell, class D, class T, class Order>
FASTRNN_KERNEL(256)
pack_kernel(const FASTRNN_GRID_CONSTANT PackParams p) {
  using P = Pack<Cell, D, T, Order>;
  const int64_t count = static_cast<int64_t>(p.ctas) * P::kCtaVectors;
  for (int64_t i = prim::block_index() * int64_t{256} + prim::thread_index(); i < count;
       i += prim::grid_threads())
    p.packed[i] = P::vector(p, i);
}

}  // namespace fastrnn::cuda
