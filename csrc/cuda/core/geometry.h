// Sizes that the host plans with and the kernels are built from: plain C++, no CUDA header.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTRNN_CONSTEXPR __host__ __device__ constexpr
#else
#define FASTRNN_CONSTEXPR constexpr
#endif

namespace fastrnn::cuda {

enum class CellKind : int32_t {
  lstm = 0,
  gru = 1,
  gru_reset_before = 2,
  rnn_tanh = 3,
  rnn_relu = 4,
  rhn = 5,
  rhn_uncoupled = 6,
  bnlstm = 7
};
FASTRNN_CONSTEXPR bool is_rhn(CellKind c) { return c == CellKind::rhn || c == CellKind::rhn_uncoupled; }
enum class Format : int32_t { bf16 = 0, fp16 = 1, tf32 = 2, bf16x3 = 3 };
// steps: no exchange inside a kernel, every step is launched anew (steps/).
enum class ExchangeKind : int32_t { local = 0, cluster = 1, sentinel = 2, flags = 3, steps = 4 };

FASTRNN_CONSTEXPR int ceil_div(int a, int b) { return (a + b - 1) / b; }
FASTRNN_CONSTEXPR int round_up(int a, int b) { return ceil_div(a, b) * b; }

FASTRNN_CONSTEXPR int element_bytes(Format f) { return f == Format::bf16 || f == Format::fp16 ? 2 : 4; }
// Elements of a 16-byte vector, and of the four lanes that hold one row's part of a chunk.
FASTRNN_CONSTEXPR int vector_elements(Format f) { return 16 / element_bytes(f); }
FASTRNN_CONSTEXPR int chunk_elements(Format f) { return 4 * vector_elements(f); }

// A run of gates in torch's order.
struct GateRun {
  int first = 0, count = 0;
};

// What the matmuls of a step are; cells.cuh has the arithmetic.
struct CellShape {
  int gates = 0;
  int tape = 0;  // saved values per unit and step
  int phases = 1;
  GateRun sums[2];       // forward: gates that a phase sums
  GateRun published[2];  // backward: gates whose gradients a phase publishes
};
FASTRNN_CONSTEXPR CellShape cell_shape(CellKind cell) {
  CellShape s;
  if (cell == CellKind::gru_reset_before) {
    s.gates = s.tape = 3;
    s.phases = 2;
    s.sums[0] = {0, 2};
    s.sums[1] = {2, 1};
    s.published[0] = {2, 1};
    s.published[1] = {0, 2};
    return s;
  }
  if (is_rhn(cell)) {  // of a micro-step
    s.gates = cell == CellKind::rhn ? 2 : 3;
    s.tape = s.gates + 1;
    s.sums[0] = s.published[0] = {0, s.gates};
    return s;
  }
  if (cell == CellKind::bnlstm) {
    s.gates = 4;
    s.tape = 8;
    s.sums[0] = s.published[0] = {0, 4};
    return s;
  }
  s.gates = cell == CellKind::lstm ? 4 : cell == CellKind::gru ? 3 : 1;
  s.tape = cell == CellKind::lstm || cell == CellKind::gru ? 4 : 0;
  s.sums[0] = s.published[0] = {0, s.gates};
  return s;
}

// A CTA owns `units` hidden units for 8 * row_tiles batch rows. Its warps split K, `chunks` chunks each for every
// exchanged value of a unit; the weights of the first `resident` stay in registers, the others in shared memory.
struct TileShape {
  int units = 0, row_tiles = 0, chunks = 0, resident = 0, warps = 8;
  FASTRNN_CONSTEXPR int rows() const { return 8 * row_tiles; }
};

// The matmul of one phase: `out` sums per unit over `in` exchanged values per unit.
struct PhaseShape {
  int in = 0, out = 0;
  GateRun gates;  // that the sums are of (forward), or that the exchanged values belong to (backward)
  int tiles = 0, chunks = 0, shared_chunks = 0;
  FASTRNN_CONSTEXPR int vectors() const { return tiles * chunks * 64; }  // of a warp's weights
  FASTRNN_CONSTEXPR int shared_vectors() const { return tiles * shared_chunks * 64; }
};

struct Geometry {
  bool backward = false;
  TileShape tile;
  int phases = 1;
  PhaseShape phase[2];
  FASTRNN_CONSTEXPR int warp_vectors() const {
    return phase[0].vectors() + (phases == 2 ? phase[1].vectors() : 0);
  }
  FASTRNN_CONSTEXPR int warp_shared_vectors() const {
    return phase[0].shared_vectors() + (phases == 2 ? phase[1].shared_vectors() : 0);
  }
  FASTRNN_CONSTEXPR int cta_vectors() const { return tile.warps * warp_vectors(); }
  // Values per unit in an exchanged row, and gate rows in the tile of partial sums: of the phase with most.
  FASTRNN_CONSTEXPR int values() const {
    return phases == 2 && phase[1].in > phase[0].in ? phase[1].in : phase[0].in;
  }
  FASTRNN_CONSTEXPR int sum_rows() const {
    return tile.units * (phases == 2 && phase[1].out > phase[0].out ? phase[1].out : phase[0].out);
  }
};

FASTRNN_CONSTEXPR Geometry geometry_of(const CellShape& cell, const TileShape& tile, bool backward) {
  Geometry g;
  g.backward = backward;
  g.tile = tile;
  g.phases = cell.phases;
  for (int i = 0; i < cell.phases; i++) {
    PhaseShape& p = g.phase[i];
    // A backward phase reads what the one before it published, phase 0 the last one's of the step before.
    p.gates = backward ? cell.published[i ? 0 : cell.phases - 1] : cell.sums[i];
    p.in = backward ? p.gates.count : 1;
    p.out = backward ? 1 : p.gates.count;
    p.tiles = p.out * tile.units / 16;
    p.chunks = p.in * tile.chunks;
    p.shared_chunks = p.in * (tile.chunks - tile.resident);
  }
  return g;
}

// Offsets in a CTA's shared memory, bytes.
struct SharedLayout {
  int mail = 0, sums = 0, weights = 0, bytes = 0;
};
constexpr int kSumPadding = 1;  // floats after a line of partial sums, against bank conflicts
constexpr int kBarrierBytes = 16;

// Buffers of exchanged rows that an exchange keeps in shared memory.
FASTRNN_CONSTEXPR int mail_buffers(ExchangeKind e) {
  return e == ExchangeKind::local ? 1 : e == ExchangeKind::cluster ? 2 : 0;
}
// depth: slabs of weights, of a layer with micro-steps.
FASTRNN_CONSTEXPR SharedLayout shared_layout(const Geometry& g, Format format, int buffers, int depth = 1) {
  SharedLayout s;
  const int row =
      g.values() * g.tile.warps * g.tile.chunks * chunk_elements(format) + vector_elements(format);
  s.mail = kBarrierBytes;
  s.sums = s.mail + buffers * g.tile.rows() * row * element_bytes(format);
  s.weights = round_up(s.sums + 2 * g.tile.warps * g.sum_rows() * (g.tile.rows() + kSumPadding) * 4, 16);
  s.bytes = s.weights + depth * g.tile.warps * g.warp_shared_vectors() * 16;
  return s;
}

// After the layout, where a CTA takes statistics of its columns (columns.cuh): two values of each element of four gates, and
// two results.
FASTRNN_CONSTEXPR int column_bytes(const TileShape& t) {
  return 4 * 2 * 4 * t.units * (t.rows() + kSumPadding + 1);
}

// Shared memory of a CTA of any kernel.
FASTRNN_CONSTEXPR int shared_bytes(CellKind cell, const TileShape& tile, bool backward, Format format,
                                   ExchangeKind exchange, int depth) {
  const Geometry g = geometry_of(cell_shape(cell), tile, backward);
  return shared_layout(g, format, mail_buffers(exchange), depth).bytes +
         (cell == CellKind::bnlstm ? column_bytes(tile) : 0);
}

}  // namespace fastrnn::cuda
