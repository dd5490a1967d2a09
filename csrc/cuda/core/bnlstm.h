// What a launch of a batch-normalised LSTM is told; conventions as in params.h. Plain C++.
//
// Steps count from each sequence's own first step: step s of row n is time s, or length(n) - 1 - s in reverse; mail and
// statistics are by step, tensors by time. The input term is normalised before the launch: no step of it waits for another.
#pragma once
#include "params.h"

namespace fastrnn::cuda {

// Step s reads row min(s, rows - 1).
struct BnGiven {
  const float *mean = nullptr, *var = nullptr;
  int rows = 1;
};
// Of the recurrent term (4H) and of the cell (H).
constexpr int kBnTerms = 2;

struct BnLstmForwardDirection {
  const Vec4* weights = nullptr;
  Rows wx;  // gamma_x * normalised input term + bias (4H)
  const float *gamma_h = nullptr, *gamma_c = nullptr, *beta_c = nullptr;
  BnGiven given[kBnTerms];
  float* used[kBnTerms] = {nullptr, nullptr};  // (2, T, width): means, then biased variances
  const void *h0 = nullptr, *c0 = nullptr;     // (N, H), null: zeros
  void *h_n = nullptr, *c_n = nullptr;
  Rows y;
  Rows tape;   // activated gates and the normalised recurrent term (8H), or null data
  Rows cells;  // fp32
  Mail mail;
  bool reverse = false;
};
struct BnLstmForwardParams : Shape {
  BnLstmForwardDirection dir[2];
  const int* alive = nullptr;  // (T) rows that reach each step, or null: all
  float eps = 0;
  bool batch = false;  // statistics of the batch where a step has two rows
  bool wx_is_float = false;
};

struct BnLstmBackwardDirection {
  const Vec4* weights = nullptr;
  Rows dy, dcells;                              // null data: zeros; dcells fp32
  const void *dh_n = nullptr, *dc_n = nullptr;  // (N, H), null: zeros
  void *dh0 = nullptr, *dc0 = nullptr;
  const float *gamma_h = nullptr, *gamma_c = nullptr, *beta_c = nullptr;
  const float* used[kBnTerms] = {nullptr, nullptr};
  const void* c0 = nullptr;
  Rows tape, cells;  // from forward
  Rows dgates,
      dgates_h;  // (4H): gradients of the pre-activations and of the recurrent term; zero past a row's end
  Rows dm;       // (H): gradient of gamma_c * normalised cell + beta_c; zero past a row's end
  Mail mail;
  bool reverse = false;
};
struct BnLstmBackwardParams : Shape {
  BnLstmBackwardDirection dir[2];
  const int* alive = nullptr;
  float eps = 0;
  bool batch = false;
};

}  // namespace fastrnn::cuda
