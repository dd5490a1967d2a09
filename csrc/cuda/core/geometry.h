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
  bnlstm = 7,
  lstm_projected = 8,
  lstm_layer_norm = 9,
  gru_layer_norm = 10
};
FASTRNN_CONSTEXPR bool is_rhn(CellKind c) { return c == CellKind::rhn || c == CellKind::rhn_uncoupled; }
FASTRNN_CONSTEXPR bool is_layer_norm(CellKind c) {
  return c == CellKind::lstm_layer_norm || c == CellKind::gru_layer_norm;
}
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

// The number of the run whose rows are those of W_hr.
constexpr int kProjection = 4;

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
  if (is_layer_norm(cell)) {
    s.gates = cell == CellKind::lstm_layer_norm ? 4 : 3;
    s.tape = 2 * s.gates;
    s.sums[0] = s.published[0] = {0, s.gates};
    return s;
  }
  if (cell == CellKind::lstm_projected) {
    s.gates = s.tape = 4;
    s.phases = 2;
    s.sums[0] = s.published[1] = {0, 4};
    s.sums[1] = s.published[0] = {kProjection, 1};
    return s;
  }
  s.gates = cell == CellKind::lstm ? 4 : cell == CellKind::gru ? 3 : 1;
  s.tape = cell == CellKind::lstm || cell == CellKind::gru ? 4 : 0;
  s.sums[0] = s.published[0] = {0, s.gates};
  return s;
}

// A CTA owns `units` hidden units for 8 * row_tiles batch rows. Its warps split K, `chunks` chunks each for every
// exchanged value of a unit; the weights of the first `resident` stay in registers, the others in shared memory.
// `teams`: several sets of such warps, each for rows of its own (batch-normalised layers).
struct TileShape {
  int units = 0, row_tiles = 0, chunks = 0, resident = 0, warps = 8, teams = 1;
  FASTRNN_CONSTEXPR int rows() const { return 8 * row_tiles * teams; }
  FASTRNN_CONSTEXPR int threads() const { return 32 * warps * teams; }
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

// A batch-normalised layer's CTA has all N rows of the batch. Partial sums are of the tile.rows() rows of a pass; all else of
// an element (unit, row) lies in planes of fp32, a line of rows for each unit. What N moves comes last.
struct BatchLayout {
  int weights = 0, sums = 0, results = 0, planes = 0, mail = 0, bytes = 0;
};
// Forward: four recurrent sums, four input terms, c. Backward: four gates, four normalised terms, dh, dc, c, c before.
FASTRNN_CONSTEXPR int batch_planes(bool backward) { return backward ? 12 : 9; }
// Floats of a unit: two results of the columns of four gates, and what else an epilogue needs of its columns, for two steps.
constexpr int kBatchResults = 8, kBatchOfStep = 8;
// A warp's lanes are units first: with these distances they meet 32 different banks.
FASTRNN_CONSTEXPR int batch_line(int units, int N) { return round_up(N, 32) + (units < 32 ? 32 / units : 1); }
FASTRNN_CONSTEXPR int batch_sum_line(const TileShape& t) {
  return round_up(t.rows(), 16) + (t.units < 32 ? 8 + 32 / t.units : 1);
}
FASTRNN_CONSTEXPR int batch_lengths(int planes, int units, bool backward, int N) {
  return planes + batch_planes(backward) * units * batch_line(units, N) * 4;
}
FASTRNN_CONSTEXPR int batch_mail(int planes, int units, bool backward, int N) {
  return round_up(batch_lengths(planes, units, backward, N) + N * 4, 16);
}
FASTRNN_CONSTEXPR BatchLayout batch_layout(const Geometry& g, Format format, int buffers, int N) {
  BatchLayout s;
  const TileShape& t = g.tile;
  s.weights = kBarrierBytes;
  s.sums = s.weights + t.warps * t.teams * g.warp_shared_vectors() * 16;
  s.results = s.sums + 2 * t.warps * g.sum_rows() * batch_sum_line(t) * 4;
  s.planes = s.results + (kBatchResults + 2 * kBatchOfStep) * t.units * 4;
  s.mail = batch_mail(s.planes, t.units, g.backward, N);
  const int row = g.values() * t.warps * t.chunks * chunk_elements(format) + vector_elements(format);
  s.bytes = s.mail + buffers * N * row * element_bytes(format);
  return s;
}

// Layer norm: units whose part of a row's sums is one pair of floats, and a row of pairs in whole vectors.
constexpr int kSegment = 16;
FASTRNN_CONSTEXPR int pair_line(int units) { return round_up(2 * ceil_div(units, kSegment), 4); }
// After the layout: two planes of a CTA's own pairs.
FASTRNN_CONSTEXPR int pair_bytes(const TileShape& t) { return 2 * t.rows() * pair_line(t.units) * 4; }

// Shared memory of a CTA of any kernel. `extent`: micro-steps of a highway layer, rows of a batch-normalised layer's batch,
// else 1.
FASTRNN_CONSTEXPR int shared_bytes(CellKind cell, const TileShape& tile, bool backward, Format format,
                                   ExchangeKind exchange, int extent) {
  const Geometry g = geometry_of(cell_shape(cell), tile, backward);
  if (cell == CellKind::bnlstm) return batch_layout(g, format, mail_buffers(exchange), extent).bytes;
  return shared_layout(g, format, mail_buffers(exchange), extent).bytes +
         (is_layer_norm(cell) ? pair_bytes(tile) : 0);
}

}  // namespace fastrnn::cuda
