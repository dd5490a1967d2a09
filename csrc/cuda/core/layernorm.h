// What a launch of a layer-normalised LSTM or GRU is told; conventions as in params.h. Plain C++.
//
// The input term is normalised before the launch: no step of it waits for another. Inside, the statistics of a row go from
// CTA to CTA in pairs of floats, one for each 16 units: rows of 2 * ceil(H / 16) floats, rounded up to a 16-byte vector.
#pragma once
#include "params.h"

namespace fastrnn::cuda {

struct LayerNormForwardDirection {
  const Vec4* weights = nullptr;
  Rows wx;                        // gain_ih * normalised input term + b_ih + b_hh (G * H), GRU: without b_hn
  const float* gain_h = nullptr;  // (G * H)
  const float* bias_n = nullptr;  // b_hn (H) of GRU, or null
  const float *gain_c = nullptr, *bias_c = nullptr;  // (H), LSTM
  const void *h0 = nullptr, *c0 = nullptr;           // (N, H), null: zeros
  void *h_n = nullptr, *c_n = nullptr;
  Rows y;           // H
  Rows tape;        // activated gates and the normalised recurrent term (2 * G * H), or null data
  Rows cells;       // c_t in fp32 (H), LSTM, or null data
  Rows statistics;  // fp32, kRowStatistics, or null data
  Mail mail;        // h_t (H); may be y itself
  Mail pairs[2];    // fp32: of the recurrent term, and of the cell (LSTM)
  bool reverse = false;
};
// 1 / sqrt(var + eps) of the recurrent term; LSTM: mean of the cell and its 1 / sqrt(var + eps).
constexpr int kRowStatistics = 3;

struct LayerNormForwardParams : Shape {
  LayerNormForwardDirection dir[2];
  float eps = 0;
  bool wx_is_float = false;
};

struct LayerNormBackwardDirection {
  const Vec4* weights = nullptr;
  const float *gain_h = nullptr, *bias_n = nullptr, *gain_c = nullptr, *bias_c = nullptr;
  Rows dy, dcells;                              // null data: zeros; dcells fp32
  const void *dh_n = nullptr, *dc_n = nullptr;  // (N, H), null: zeros
  void *dh0 = nullptr, *dc0 = nullptr;
  Rows y, tape, cells, statistics;  // from forward
  const void *h0 = nullptr, *c0 = nullptr;
  Rows dgates;    // gradient of wx (G * H); zero past a row's end, as all that follows
  Rows dgates_h;  // of the recurrent term before its norm (G * H)
  Rows dm;        // LSTM: of gain_c * normalised cell + bias_c (H)
  Mail mail;      // dgates_h; may be that itself
  Mail pairs[2];  // fp32: of the recurrent term, and of the cell (LSTM)
  bool reverse = false;
};
struct LayerNormBackwardParams : Shape {
  LayerNormBackwardDirection dir[2];
};

}  // namespace fastrnn::cuda
