// How a CTA's work is cut, and where things lie in its shared memory.
//
// A CTA owns kUnits hidden units for kRows batch rows. Its kWarps warps split K; kChunks 16-byte-per-lane chunks of K
// per warp and per exchanged value of a unit. The first kResident chunks' weights stay in registers, the others in
// shared memory.
#pragma once
#include "params.h"
#include "types.cuh"

namespace fastrnn::cuda {

template <int Units, int RowTiles, int Chunks, int Resident, int Warps>
struct Tile {
  static constexpr int kUnits = Units, kRowTiles = RowTiles, kRows = 8 * RowTiles;
  static constexpr int kChunks = Chunks, kResident = Resident;
  static constexpr int kWarps = Warps, kThreads = 32 * Warps;
  static constexpr int kElements = kUnits * kRows;  // (unit, row) pairs
  static constexpr int kPerThread = (kElements + kThreads - 1) / kThreads;
  static_assert(kElements % 32 == 0 && kUnits % 4 == 0,
                "a warp is in the epilogue as a whole, a word has one owner");
  static_assert(Resident >= 0 && Resident <= Chunks, "weights");
};

// A matmul of one phase: sums of kOut gates per unit over kIn exchanged values per unit.
template <class T, int In, int Out>
struct Matmul {
  static constexpr int kIn = In, kOut = Out;
  static constexpr int kGateRows = Out * T::kUnits;
  static constexpr int kTiles = kGateRows / 16;
  static constexpr int kChunks = In * T::kChunks, kResident = In * T::kResident;
  static_assert(kGateRows % 16 == 0, "rows of the tensor core's operand");
  static constexpr int kWeightVectors = kTiles * kChunks * 2 * 32;  // of a warp
  static constexpr int kSharedVectors = kTiles * (kChunks - kResident) * 2 * 32;
};

struct SharedLayout {
  int barriers, mail, sums, weights, bytes;
};

constexpr int kSumPadding = 1;

// Values: exchanged values per unit; MailBuffers: 0 where the exchange does not live in shared memory.
template <class T, class D, int GateRows, int WeightVectors, int Values, int MailBuffers>
FASTRNN_HOST_DEVICE constexpr SharedLayout shared_layout() {
  SharedLayout s{};
  s.barriers = 0;
  s.mail = 16;
  const int mail_row = Values * T::kWarps * T::kChunks * D::kChunk + D::kVec;
  s.sums = s.mail + MailBuffers * T::kRows * mail_row * static_cast<int>(sizeof(typename D::Elem));
  s.weights = s.sums + 2 * T::kWarps * GateRows * (T::kRows + kSumPadding) * 4;
  s.weights = (s.weights + 15) / 16 * 16;
  s.bytes = s.weights + T::kWarps * WeightVectors * 16;
  return s;
}

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
