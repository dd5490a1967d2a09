// What a launch of an LSTM with projection is told; conventions as in params.h. Plain C++.
//
// P is the width of h: h_t = W_hr m_t, m_t = o * tanh(c_t). W_hh is (4H, P), W_hr (P, H), and P < H.
#pragma once
#include "params.h"

namespace fastrnn::cuda {

struct ProjectedShape : Shape {
  int P = 0, P_padded = 0;
};

struct ProjectedForwardDirection {
  const Vec4* weights = nullptr;            // packed W_hh and W_hr
  Rows wx;                                  // W_ih x + b_ih + b_hh (4H)
  const void *h0 = nullptr, *c0 = nullptr;  // (N, P), (N, H), null: zeros
  void *h_n = nullptr, *c_n = nullptr;
  Rows y;            // P
  Rows tape;         // activated gates (4H), or null data
  Rows cells;        // c_t in fp32 (H), or null data
  Mail middle_mail;  // m_t (H)
  Mail state_mail;   // h_t (P); may be y itself
  bool reverse = false;
};
struct ProjectedForwardParams : ProjectedShape {
  ProjectedForwardDirection dir[2];
  bool wx_is_float = false;
};

struct ProjectedBackwardDirection {
  const Vec4* weights = nullptr;
  Rows dy;                                      // P; null data: zeros
  Rows dcells;                                  // fp32 (H), or null data
  const void *dh_n = nullptr, *dc_n = nullptr;  // (N, P), (N, H), null: zeros
  void *dh0 = nullptr, *dc0 = nullptr;
  Rows tape, cells;  // from forward
  const void* c0 = nullptr;
  Rows dgates;  // gradient of wx (4H); zero past a row's end
  Rows dh;      // all that reaches h_t (P), and m_t (H): dW_hr is their product; dh is zero past a row's end
  Rows middle;
  Mail gradient_mail;  // dgates (4H); may be `dgates` itself
  Mail state_mail;     // dh (P); may be `dh` itself
  bool reverse = false;
};
struct ProjectedBackwardParams : ProjectedShape {
  ProjectedBackwardDirection dir[2];
};

}  // namespace fastrnn::cuda
