// One product of a step: sums[n][o] = sum over k of operand[n][k] * W[o][k], fp32, on the tensor cores.
//
// The tile of weights and that of rows come through shared memory, several stages ahead (cp.async). Weights are packed in the order
// of the tensor core's operand, and 16 bytes of a row are both operand registers of a chunk's products (core/types.cuh): both land
// in shared memory in the order in which a warp's lanes read them, so there are no bank conflicts and nothing to swizzle.
//
// Nothing waits for another CTA. The end of a launch is what a persistent kernel has its exchange for: there is no condition on how
// much of the grid is resident.
#pragma once
#include "../core/types.cuh"
#include "../prim/shared.cuh"
#include "params.h"
#include "tile.h"

namespace fastrnn::cuda {

template <int MTiles, int NTiles, int WarpsM, int WarpsN, int WarpsK, int Chunks, int Stages>
struct ProductTile {
  static constexpr StepsTile kShape{MTiles, NTiles, WarpsM, WarpsN, WarpsK, Chunks, Stages};
  static constexpr int kMTiles = MTiles, kNTiles = NTiles, kWarpsM = WarpsM, kWarpsN = WarpsN,
                       kWarpsK = WarpsK;
  static constexpr int kChunks = Chunks, kStages = Stages;
  static constexpr int kOutputs = kShape.outputs(), kRows = kShape.rows(), kThreads = kShape.threads();
  static_assert(MTiles % WarpsM == 0 && NTiles % WarpsN == 0 && Chunks % WarpsK == 0 && Stages >= 2, "warps");
};

struct StepsPack {
  const void* weights = nullptr;
  Vec4* packed = nullptr;
  StepsTile tile;
  StepsMatrix matrix;
};

// Order: tile of outputs, stage, chunk, 16 outputs, half of the chunk, lane.
template <class D>
FASTRNN_DEVICE Vec4 steps_packed_vector(const StepsPack& p, int64_t index) {
  const StepsMatrix& mat = p.matrix;
  const int stages = steps_stages(p.tile, mat.inner(), D::kFormat), of_stage = p.tile.weight_vectors();
  const int stage = static_cast<int>(index / of_stage % stages);
  const int tile = static_cast<int>(index / of_stage / stages), at = static_cast<int>(index % of_stage);
  const int lane = at % 32, s = at / 32 % 2, m = at / 64 % p.tile.m_tiles, chunk = at / 64 / p.tile.m_tiles;
  const int k0 = (stage * p.tile.chunks + chunk) * D::kChunk;
  uint32_t word[4];
  FASTRNN_UNROLL
  for (int r = 0; r < 4; r++) {
    const int o = tile * p.tile.outputs() + m * 16 + lane / 4 + r % 2 * 8;
    const auto weight = [&](int in_chunk) {
      const int k = k0 + in_chunk, value = k / mat.inner_padded, unit = k % mat.inner_padded;
      if (o >= mat.outputs || value >= mat.values || unit >= mat.inner_units) return 0.f;
      const int inner = value * mat.inner_units + unit;
      const int64_t row = mat.first_row + (mat.transposed ? inner : o);
      return D::load(static_cast<const typename D::Elem*>(p.weights) + row * mat.columns +
                     (mat.transposed ? o : inner));
    };
    word[r] = D::weight_word(weight, lane % 4, s, r / 2);
  }
  return {word[0], word[1], word[2], word[3]};
}

template <class D>
FASTRNN_KERNEL(256)
steps_pack_kernel(const FASTRNN_GRID_CONSTANT StepsPack p) {
  const int64_t count = steps_packed_vectors(p.tile, p.matrix, D::kFormat);
  for (int64_t i = prim::block_index() * int64_t{256} + prim::thread_index(); i < count;
       i += prim::grid_threads())
    p.packed[i] = steps_packed_vector<D>(p, i);
}

template <class D, class T>
class Product {
  using Elem = typename D::Elem;
  static constexpr StepsTile kTile = T::kShape;
  static constexpr int kM = T::kMTiles / T::kWarpsM, kN = T::kNTiles / T::kWarpsN;  // of a warp
  static constexpr int kLine = T::kRows + kSumPadding;

 public:
  static constexpr bool kAvailable = kTile.shared_bytes() <= prim::kMostShared;

  // weights: of all tiles; operand: of all rows; the CTA's tile of outputs and first row.
  FASTRNN_DEVICE Product(const Vec4* weights, const void* operand, const StepsProduct& shape, int rows,
                         int tile, int first_row)
      : weights_(weights + static_cast<int64_t>(tile) * shape.stages * kTile.weight_vectors()),
        operand_(static_cast<const Elem*>(operand)),
        inner_(shape.inner),
        count_(shape.stages),
        rows_(rows),
        first_row_(first_row),
        thread_(prim::thread_index()),
        stages_(prim::shared_view<Vec4>(0, T::kStages * kTile.stage_vectors())),
        sums_(prim::shared_view<float>(0, T::kWarpsK * T::kOutputs * kLine)) {}

  // Afterwards sum() has the results.
  FASTRNN_DEVICE void run() {
    float acc[kM][kN][4] = {};
    FASTRNN_UNROLL
    for (int i = 0; i < T::kStages - 1; i++) fetch(i);
    for (int i = 0; i < count_; i++) {
      // This stage is there, and nobody reads the one that the next fetch overwrites.
      prim::copy_wait<T::kStages - 2>();
      if (!mutated(Mutation::dropped_barrier)) prim::block_barrier("stage");
      fetch(i + T::kStages - 1);
      multiply(i % T::kStages, acc);
    }
    prim::copy_wait<0>();
    prim::block_barrier("stages read");
    put(acc);
    prim::block_barrier("partial sums");
  }
  // Slices of K in their order.
  FASTRNN_DEVICE float sum(int output, int row) const {
    float s = 0.f;
    FASTRNN_UNROLL
    for (int k = 0; k < T::kWarpsK; k++) s += sums_.load((k * T::kOutputs + output) * kLine + row);
    return s;
  }

 private:
  FASTRNN_DEVICE void fetch(int i) {
    if (i < count_) {
      const int to = i % T::kStages * kTile.stage_vectors();
      const Vec4* from = weights_ + static_cast<int64_t>(i) * kTile.weight_vectors();
      FASTRNN_UNROLL
      for (int v = thread_; v < kTile.weight_vectors(); v += T::kThreads)
        prim::copy_async(stages_, to + v, from + v, true);
      FASTRNN_UNROLL
      for (int v = thread_; v < kTile.row_vectors(); v += T::kThreads) {
        // Order: chunk, eight rows, lane.
        const int lane = v % 32, x = v / 32 % T::kNTiles, c = v / 32 / T::kNTiles;
        const int n = first_row_ + x * 8 + lane / 4;
        const int k = (i * T::kChunks + c) * D::kChunk + lane % 4 * D::kVec;
        const int end = mutated(Mutation::reduction_tail) ? inner_ - D::kVec : inner_;
        const bool exists = n < rows_ && k < end;
        prim::copy_async(stages_, to + kTile.weight_vectors() + v,
                         operand_ + (exists ? static_cast<int64_t>(n) * inner_ + k : 0), exists);
      }
    }
    prim::copy_commit();  // an empty group too: they are counted
  }

  FASTRNN_DEVICE void multiply(int stage, float (&acc)[kM][kN][4]) const {
    const int lane = thread_ % 32, warp = thread_ / 32;
    const int m0 = warp % T::kWarpsM * kM, n0 = warp / T::kWarpsM % T::kWarpsN * kN;
    const int slice = warp / (T::kWarpsM * T::kWarpsN);
    const int from = stage * kTile.stage_vectors();
    FASTRNN_UNROLL
    for (int i = 0; i < T::kChunks / T::kWarpsK; i++) {
      const int c = i * T::kWarpsK + slice;
      Vec4 w[kM][2];
      FASTRNN_UNROLL
      for (int m = 0; m < kM; m++) {
        FASTRNN_UNROLL
        for (int s = 0; s < 2; s++)
          w[m][s] = stages_.load(from + ((c * T::kMTiles + m0 + m) * 2 + s) * 32 + lane);
      }
      FASTRNN_UNROLL
      for (int x = 0; x < kN; x++) {
        const Vec4 h = stages_.load(from + kTile.weight_vectors() + (c * T::kNTiles + n0 + x) * 32 + lane);
        D::template multiply<kM>(&acc[0][x], kN, [&](int m, int s) { return w[m][s]; }, h);
      }
    }
  }

  FASTRNN_DEVICE void put(const float (&acc)[kM][kN][4]) const {
    const int lane = thread_ % 32, warp = thread_ / 32;
    const int m0 = warp % T::kWarpsM * kM, n0 = warp / T::kWarpsM % T::kWarpsN * kN;
    const int slice = warp / (T::kWarpsM * T::kWarpsN);
    FASTRNN_UNROLL
    for (int m = 0; m < kM; m++) {
      FASTRNN_UNROLL
      for (int x = 0; x < kN; x++) {
        FASTRNN_UNROLL
        for (int r = 0; r < 4; r++) {
          const int output = (m0 + m) * 16 + lane / 4 + r / 2 * 8, row = (n0 + x) * 8 + lane % 4 * 2 + r % 2;
          sums_.store((slice * T::kOutputs + output) * kLine + row, acc[m][x][r]);
        }
      }
    }
  }

  const Vec4* weights_;
  const Elem* operand_;
  const int inner_, count_, rows_, first_row_, thread_;
  const prim::Shared<Vec4> stages_;
  const prim::Shared<float> sums_;
};

// Tiles of one output block over all rows lie side by side in the grid: they run together and share its weights in L2.
template <class T>
struct ProductPlace {
  int direction, part, tile, first_row;
  FASTRNN_DEVICE ProductPlace(int outputs, int rows, int parts) {
    const int row_tiles = ceil_div(rows, T::kRows), tiles = ceil_div(outputs, T::kOutputs);
    const int block = prim::block_index();
    first_row = block % row_tiles * T::kRows;
    tile = block / row_tiles % tiles;
    part = block / row_tiles / tiles % parts;
    direction = block / row_tiles / tiles / parts;
  }
};

// Sums go to the workspace, for the launch of the pointwise part.
template <class D, class T>
FASTRNN_KERNEL(T::kThreads)
steps_product_kernel(const StepsParams* __restrict__ p, int step, int which) {
  if constexpr (Product<D, T>::kAvailable) {
    const StepsProduct shape = p->product[which];
    const int rows = p->N;
    const ProductPlace<T> place(shape.outputs, rows, p->parts);
    const StepsWork& work = p->work[place.direction];
    const int s = p->first + step, level = mutated(Mutation::one_slab) ? 0 : s % p->depth;
    const int64_t of_part = static_cast<int64_t>(place.part) * rows;
    const auto* const operand =
        static_cast<const typename D::Elem*>(which ? work.middle : work.operand[s & 1]);
    Product<D, T> product(
        work.weights[which] + (static_cast<int64_t>(level) * p->parts + place.part) * p->part_vectors,
        operand + of_part * shape.inner, shape, rows, place.tile, place.first_row);
    float* const sums = work.sums + of_part * shape.outputs;
    product.run();
    for (int e = prim::thread_index(); e < T::kOutputs * T::kRows; e += T::kThreads) {
      const int output = e % T::kOutputs, row = e / T::kOutputs;
      const int o = place.tile * T::kOutputs + output, n = place.first_row + row;
      if (o < shape.outputs && n < rows)
        prim::store(sums + static_cast<int64_t>(n) * shape.outputs + o, product.sum(output, row));
    }
  } else {
    prim::unavailable();
  }
}

}  // namespace fastrnn::cuda
