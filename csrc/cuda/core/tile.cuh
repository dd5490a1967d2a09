// A tile's sizes as compile-time constants, and a CTA's place in the grid.
#pragma once
#include "geometry.h"
#include "params.h"
#include "types.cuh"

namespace fastrnn::cuda {

template <int Units, int RowTiles, int Chunks, int Resident, int Warps, int Teams = 1>
struct Tile {
  static constexpr int kUnits = Units, kRowTiles = RowTiles, kRows = 8 * RowTiles * Teams;
  static constexpr int kChunks = Chunks, kResident = Resident;
  static constexpr int kWarps = Warps, kThreads = 32 * Warps * Teams;
  static constexpr TileShape kShape{Units, RowTiles, Chunks, Resident, Warps, Teams};
  static constexpr int kElements = kUnits * kRows;  // (unit, row) pairs
  static constexpr int kPerThread = (kElements + kThreads - 1) / kThreads;
  static_assert(kElements % 32 == 0 && kUnits % 4 == 0,
                "a warp is in the epilogue as a whole, a word has one owner");
  // Rows that an exchange in shared memory keeps.
  FASTRNN_DEVICE static int mail_rows(const Shape&) { return kRows; }
  static_assert(Resident >= 0 && Resident <= Chunks, "weights");
};

// The matmul of one phase, by constants.
template <class Geo, int Phase>
struct Matmul {
  static constexpr PhaseShape kShape = Geo::kGeometry.phase[Phase];
  static constexpr int kIn = kShape.in, kOut = kShape.out, kTiles = kShape.tiles, kChunks = kShape.chunks;
  static constexpr int kResident = kShape.chunks - kShape.shared_chunks;
  static constexpr int kVectors = kShape.vectors(), kSharedVectors = kShape.shared_vectors();
  static_assert(kOut * Geo::kGeometry.tile.units % 16 == 0, "rows of the tensor core's operand");
};
template <class Cell, class T, bool IsBackward>
struct GeometryOf {
  static constexpr Geometry kGeometry = geometry_of(cell_shape(Cell::kKind), T::kShape, IsBackward);
};

// Group g has rows g, g + groups, ...: batches that shrink stay balanced. Rows past N have no steps.
FASTRNN_DEVICE int row_of(const Shape& p, int group, int local) { return local * p.groups + group; }
FASTRNN_DEVICE int row_length(const Shape& p, int n) {
  if (n >= p.N) return 0;
  return p.lengths ? prim::load_constant(p.lengths + n) : p.T;
}

// Which CTA this is.
struct Place {
  int direction, group, cta, index;
};
FASTRNN_DEVICE Place place_of(const Shape& p, int block) {
  const int per_direction = p.groups * p.ctas;
  return {block / per_direction, block / p.ctas % p.groups, block % p.ctas, block};
}

FASTRNN_DEVICE bool reset_at(const Shape& p, int t, int n) {
  return p.reset && prim::load_constant(p.reset + static_cast<int64_t>(t) * p.N + n) != 0;
}

template <class E>
FASTRNN_DEVICE E* row_at(const Rows& r, int t, int n) {
  return static_cast<E*>(r.data) + t * r.stride_t + n * r.stride_n;
}

}  // namespace fastrnn::cuda
