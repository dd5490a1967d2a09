// What the launches of a layer that runs step by step are told. Plain C++; conventions as in core/params.h.
//
// A step is one or two products, each with its pointwise part behind it. Launches read a block of these parameters in device
// memory and take nothing but their step's number, so that a graph of them serves every call (steps_launch.cu).
#pragma once
#include <cstddef>

#include "../core/noise.h"

namespace fastrnn::cuda {

// O outputs of a unit row: the projection's, or H. Operands are what products read: rows of whole 16-byte vectors.
struct StepsProduct {
  int outputs = 0;  // of a row: columns of the sums
  int inner = 0;    // elements of an operand row
  int stages = 0;   // of the pipeline over `inner`
};

// Of one direction, in the caller's workspace.
struct StepsWork {
  const Vec4* weights[2] = {nullptr, nullptr};  // packed, of each product
  void* operand[2] = {nullptr, nullptr};  // (parts, N, inner) by turns: step s reads s % 2, writes the other
  void* middle = nullptr;                 // (N, inner) of the second product
  float* sums = nullptr;                  // (parts, N, outputs) of the product before
  float *h = nullptr, *c = nullptr;       // (N, O), (N, H): the state, in backward its gradients
  float* held = nullptr;                  // (N, H): between the two phases of a step
  float* terms = nullptr;                 // (N, G * H): layer and batch norm, backward
};

struct StepsParams : Shape {
  int O = 0;
  int first = 0;  // a launch's step is this and its own number
  bool projected = false, normed = false;
  // A highway layer: each micro-step of a step is launched as a step of its own, with its own slab of weights, and where each
  // gate has a mask of the state, a product has a part for each, with an operand of its own.
  int depth = 1, parts = 1;
  int64_t part_vectors = 0;  // packed weights of a part of a slab
  FASTRNN_CONSTEXPR int launched() const { return T * depth; }
  StepsProduct product[2];
  StepsWork work[2];
  Noise noise;
};

struct StepsForwardDirection {
  Rows wx;                        // as ForwardDirection::wx; layer norm: of the normalised input term
  const float* bias_n = nullptr;  // b_hn (H) of GRU reset_after, or null
  const float* bias = nullptr;    // highway layer: (depth, G * H), of which row 0 is not read, or null
  const void* mask = nullptr;     // highway layer: of the state in the product, (parts, N, H), or null
  const float* gain_h = nullptr;  // layer norm: of the recurrent term (G * H)
  const float *gain_c = nullptr, *bias_c = nullptr;  // layer norm of LSTM: of the cell (H)
  const void *h0 = nullptr, *c0 = nullptr;           // (N, O), (N, H), null: zeros
  void *h_n = nullptr, *c_n = nullptr;
  Rows y;       // O
  Rows tape;    // steps_tape() values a unit, a highway layer's by micro-step t * depth + l, or null data
  Rows cells;   // c_t in fp32 (H), or null data
  Rows mid;     // with a projection, what it multiplies (H), or null data
  Rows scales;  // layer norm: 1 / deviation of the recurrent term and of the cell, fp32 (2), or null data
  bool reverse = false;
};
struct StepsForwardParams : StepsParams {
  StepsForwardDirection dir[2];
  bool wx_is_float = false;
};

struct StepsBackwardDirection {
  Rows dy, dcells;                              // null data: zeros; dcells fp32
  const void *dh_n = nullptr, *dc_n = nullptr;  // null: zeros
  void *dh0 = nullptr, *dc0 = nullptr;
  const float *gain_h = nullptr, *gain_c = nullptr, *bias_c = nullptr;
  const void* mask = nullptr;   // as forward's
  Rows y, tape, cells, scales;  // from forward
  const void *h0 = nullptr, *c0 = nullptr;
  // Gradient of wx (G * H), a highway layer's by micro-step; zero past a row's end, as the others.
  Rows dgates;
  Rows dgates_h;  // of the recurrent term before its norm: GRU reset_after and layer norm
  Rows dmid;      // with a projection, of h_t (O) as its product takes it
  Rows dm;        // layer norm of LSTM: of gain_c * normalised cell + bias_c (H)
  bool reverse = false;
};
struct StepsBackwardParams : StepsParams {
  StepsBackwardDirection dir[2];
};

// The block: the larger of the two.
constexpr size_t kStepsBlockBytes = 2048;
static_assert(sizeof(StepsForwardParams) <= kStepsBlockBytes &&
                  sizeof(StepsBackwardParams) <= kStepsBlockBytes,
              "a kernel takes the block by value");

// Values a unit that forward leaves for backward: activated gates (GRU: also its recurrent part), an Elman layer's h before
// zoneout, with layer norm also the normalised recurrent term of each gate and LSTM's normalised cell.
FASTRNN_CONSTEXPR int steps_tape(CellKind cell, bool normed) {
  const CellShape s = cell_shape(cell);
  if (normed) return s.tape + s.gates + (cell == CellKind::lstm ? 1 : 0);
  return s.tape ? s.tape : 1;
}

}  // namespace fastrnn::cuda
