// The regularisers of a launch, as the host states them: recurrent dropout and zoneout (docs/maths.md). Plain C++.
#pragma once
#include "../../cells/philox.h"
#include "params.h"

namespace fastrnn::cuda {

enum class DropKind : int32_t { none = 0, update = 1, cell = 2, state = 3 };

// By Mask: recurrent dropout, zoneout of h, of c.
constexpr int kNoiseMasks = 3;

struct Noise {
  DropKind mode = DropKind::none;
  bool per_sequence = false;             // one dropout mask for all steps
  const uint64_t* seed = nullptr;        // in device memory; null: evaluation, expectations instead of masks
  int layer = 0, first_row = 0;          // first_row: number of the launch's row 0 in the batch
  float value[kNoiseMasks] = {1, 1, 1};  // factor of what is kept; in evaluation of everything
  uint64_t threshold[kNoiseMasks] = {0, 0, 0};  // random words below it drop
};

// `seed` is null in evaluation.
inline Noise noise_of(DropKind mode, double drop, double zoneout_h, double zoneout_c, bool per_sequence,
                      int layer, const uint64_t* seed) {
  Noise n;
  // An inverted mask's expectation is the identity.
  n.mode = !seed && mode == DropKind::state ? DropKind::none : mode;
  n.per_sequence = per_sequence;
  n.seed = seed;
  n.layer = layer;
  const double p[kNoiseMasks] = {n.mode == DropKind::none ? 0 : drop, zoneout_h, zoneout_c};
  for (int i = 0; i < kNoiseMasks; i++) {
    n.value[i] = seed ? 1.f : static_cast<float>(1 - p[i]);
    n.threshold[i] = seed ? drop_threshold(p[i]) : 0;
  }
  if (n.mode == DropKind::state) n.value[0] = drop < 1 ? static_cast<float>(1 / (1 - drop)) : 0.f;
  return n;
}

// h0_masked: under "state", h0 of each direction times the mask of the row's first step (mask_state_kernel); the mail of
// the last phase is then no tensor of the caller's, since masked states are exchanged.
// An Elman layer's tape has h_t before zoneout (H).
struct RegularisedForwardParams : ForwardParams {
  Noise noise;
  const void* h0_masked[2] = {nullptr, nullptr};
};
struct RegularisedBackwardParams : BackwardParams {
  Noise noise;
};

// out = h * mask of each row's first step, of initial states; of each step, of the states before all steps.
struct MaskStateParams {
  const void* h = nullptr;  // (N, H), or with strides (T, N, H)
  void* out = nullptr;      // the same shape
  int T = 0, N = 0, H = 0;
  const int* lengths = nullptr;
  bool reverse = false;
  Noise noise;
  int64_t stride_t = 0, stride_n = 0;  // of rows, in elements; 0: initial states
};

}  // namespace fastrnn::cuda
