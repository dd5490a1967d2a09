// W_hh (G * H, H), and W_hr where there is one, as the kernels want them: for each CTA, warp and phase, the tensor core operand of each 16 gate rows and
// each chunk of K, a lane's two vectors 32 lanes apart, so that a warp's load is 512 contiguous bytes.
//
// Warp w of CTA c has slice (w + c) % warps of K: CTAs that run side by side then read different parts of the exchanged
// rows at any moment.
#pragma once
#include "params.h"
#include "types.cuh"

namespace fastrnn::cuda {

struct PackParams {
  const void* weights = nullptr;  // W_hh (G * H, H)
  Vec4* packed = nullptr;         // ctas * geometry.cta_vectors()
  Geometry geometry;
  int H = 0, H_padded = 0, ctas = 0;
  const void* projection = nullptr;  // W_hr (P, H); W_hh is (4H, P) then
  int P = 0;
  FASTRNN_DEVICE int state_width() const { return P ? P : H; }
};

// The weight between a row of a CTA's tile and element k of the exchanged rows: its matrix (false: W_hh) and place there,
// or row -1: padding.
struct WeightAt {
  bool projects;
  int row, column;
};
FASTRNN_DEVICE WeightAt weight_at(const PackParams& p, const PhaseShape& phase, int cta, int tile_row,
                                  int k) {
  const int units = p.geometry.tile.units, unit = cta * units + tile_row % units;
  if (p.P && phase.gates.first == kProjection) {
    const int row = p.geometry.backward ? k : unit, column = p.geometry.backward ? unit : k;
    return {true, row < p.P && column < p.H ? row : -1, column};
  }
  if (!p.geometry.backward) {
    const int gate = phase.gates.first + tile_row / units;
    return {false, unit < p.H && k < p.state_width() ? gate * p.H + unit : -1, k};
  }
  const int value = k / p.H_padded, j = k % p.H_padded;
  const bool exists = value < phase.in && j < p.H && unit < p.state_width();
  return {false, exists ? (phase.gates.first + value) * p.H + j : -1, unit};
}

template <class D>
FASTRNN_DEVICE Vec4 packed_vector(const PackParams& p, int64_t index) {
  const Geometry& g = p.geometry;
  const int cta = static_cast<int>(index / g.cta_vectors()),
            in_cta = static_cast<int>(index % g.cta_vectors());
  const int slice = (in_cta / g.warp_vectors() + cta) % g.tile.warps;
  int at = in_cta % g.warp_vectors();
  const bool second = at >= g.phase[0].vectors();
  const PhaseShape& phase = g.phase[second];
  if (second) at -= g.phase[0].vectors();
  const int lane = at % 32, s = at / 32 % 2, chunk = at / 64 % phase.chunks, m = at / 64 / phase.chunks;
  const int k0 = (slice * phase.chunks + chunk) * D::kChunk;
  uint32_t word[4];
  FASTRNN_UNROLL
  for (int r = 0; r < 4; r++) {
    const auto weight = [&](int k) {
      const WeightAt w = weight_at(p, phase, cta, m * 16 + lane / 4 + r % 2 * 8, k0 + k);
      if (w.row < 0) return 0.f;
      const int64_t at = static_cast<int64_t>(w.row) * (w.projects ? p.H : p.state_width()) + w.column;
      return D::load(static_cast<const typename D::Elem*>(w.projects ? p.projection : p.weights) + at);
    };
    word[r] = D::weight_word(weight, lane % 4, s, r / 2);
  }
  return {word[0], word[1], word[2], word[3]};
}

template <class D>
FASTRNN_KERNEL(256)
pack_kernel(const FASTRNN_GRID_CONSTANT PackParams p) {
  const int64_t count = static_cast<int64_t>(p.ctas) * p.geometry.cta_vectors();
  for (int64_t i = prim::block_index() * int64_t{256} + prim::thread_index(); i < count;
       i += prim::grid_threads())
    p.packed[i] = packed_vector<D>(p, i);
}

}  // namespace fastrnn::cuda
