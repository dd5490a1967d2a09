// Sizes of the products' tiles: plain C++.
#pragma once
#include "../core/geometry.h"

namespace fastrnn::cuda {

// A CTA makes 16 * m_tiles sums of 8 * n_tiles batch rows. Its warps are warps_m x warps_n of those and warps_k slices of each
// stage; a stage is `chunks` chunks of K (core/types.cuh), and `stages` of them are in shared memory.
struct StepsTile {
  int m_tiles = 0, n_tiles = 0, warps_m = 1, warps_n = 1, warps_k = 1, chunks = 0, stages = 0;
  FASTRNN_CONSTEXPR int outputs() const { return 16 * m_tiles; }
  FASTRNN_CONSTEXPR int rows() const { return 8 * n_tiles; }
  FASTRNN_CONSTEXPR int threads() const { return 32 * warps_m * warps_n * warps_k; }
  FASTRNN_CONSTEXPR int weight_vectors() const { return chunks * m_tiles * 64; }  // of a stage
  FASTRNN_CONSTEXPR int row_vectors() const { return chunks * n_tiles * 32; }
  FASTRNN_CONSTEXPR int stage_vectors() const { return weight_vectors() + row_vectors(); }
  // The partial sums take the place of the stages.
  FASTRNN_CONSTEXPR int sums_bytes() const { return warps_k * outputs() * (rows() + kSumPadding) * 4; }
  FASTRNN_CONSTEXPR int shared_bytes() const {
    const int pipeline = stages * stage_vectors() * 16;
    return pipeline > sums_bytes() ? pipeline : sums_bytes();
  }
};

// A product's weights as a matrix that the tiles cut: output `o` over inner element k, the inner ones in `values` runs of
// inner_units, each padded to inner_padded. transposed: columns of the tensor are the outputs.
struct StepsMatrix {
  int outputs = 0;
  int values = 1, inner_units = 0, inner_padded = 0;
  int first_row = 0, columns = 0;  // of the tensor: where it begins, and its row length
  bool transposed = false;
  FASTRNN_CONSTEXPR int inner() const { return values * inner_padded; }
};

FASTRNN_CONSTEXPR int steps_stages(const StepsTile& tile, int inner, Format format) {
  return ceil_div(inner, chunk_elements(format) * tile.chunks);
}
FASTRNN_CONSTEXPR int64_t steps_packed_vectors(const StepsTile& tile, const StepsMatrix& m, Format format) {
  return int64_t{ceil_div(m.outputs, tile.outputs())} * steps_stages(tile, m.inner(), format) *
         tile.weight_vectors();
}

// The products of a step (core/geometry.h has the gates): of forward W_hh and then W_hr or reset_before's candidate, of
// backward their transposes in the other order, which begins with what leaves the step walked before.
FASTRNN_CONSTEXPR int steps_products(CellKind cell, bool projected) {
  return projected || cell_shape(cell).phases == 2 ? 2 : 1;
}
FASTRNN_CONSTEXPR StepsMatrix steps_matrix(CellKind cell, bool backward, bool projected, Format format, int H,
                                           int O, int which) {
  const CellShape shape = cell_shape(cell);
  const int vec = vector_elements(format);
  StepsMatrix m;
  if (projected && which == 1) {  // W_hr (O, H)
    m.outputs = backward ? H : O;
    m.inner_units = backward ? O : H;
    m.columns = H;
  } else {
    // Backward, product 0 reads what the step's last phase published.
    const GateRun run = backward ? shape.published[which ? 0 : shape.phases - 1] : shape.sums[which];
    m.outputs = backward ? O : run.count * H;
    m.values = backward ? run.count : 1;
    m.inner_units = backward ? H : O;
    m.first_row = run.first * H;
    m.columns = O;
  }
  m.inner_padded = round_up(m.inner_units, vec);
  m.transposed = backward;
  return m;
}

}  // namespace fastrnn::cuda
