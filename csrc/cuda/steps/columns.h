// What the launches of a batch-normalised LSTM are told that runs step by step, and the sizes of its pointwise part. Plain C++.
//
// Directions, tape and statistics are those of the persistent kernels (core/bnlstm.h), whose weights and mail are not read: backward
// may be of either family. Steps count from each row's own first one, as there.
#pragma once
#include "../core/bnlstm.h"
#include "../core/geometry.h"
#include "params.h"

namespace fastrnn::cuda {

struct StepsBnForwardParams : StepsParams {
  BnLstmForwardDirection dir[2];
  const int* alive = nullptr;  // (T) rows that reach each step, or null: all
  float eps = 0;
  bool batch = false;  // statistics of the batch where a step has two rows
  bool wx_is_float = false;
};
struct StepsBnBackwardParams : StepsParams {
  BnLstmBackwardDirection dir[2];
  const int* alive = nullptr;
  float eps = 0;
  bool batch = false;
};
static_assert(sizeof(StepsBnForwardParams) <= kStepsBlockBytes &&
                  sizeof(StepsBnBackwardParams) <= kStepsBlockBytes,
              "a kernel takes the block by value");

// A CTA has `units` adjacent units, with all their gates, of every row of the batch; units are next to each other in a warp.
struct StepsColumns {
  int units = 0, threads = 0;
  // Of a reduction: a gate's column of each unit, from each warp, two sums of four gates at most; and its results.
  static constexpr int kMost = 8;
  FASTRNN_CONSTEXPR int warps() const { return threads / 32; }
  FASTRNN_CONSTEXPR int line() const { return warps() + 1; }  // against bank conflicts
  FASTRNN_CONSTEXPR int parts() const { return kMost * units * line(); }
  FASTRNN_CONSTEXPR int results() const { return kMost * units; }
  FASTRNN_CONSTEXPR int shared_bytes() const { return 4 * (parts() + results()); }
};

}  // namespace fastrnn::cuda
