// What a launch of a Recurrent Highway layer is told; conventions as in params.h. Plain C++.
//
// Micro-step l of step t is row t * depth + l of the tensors that say so. Masks are the variational ones, shared by all
// steps and micro-steps: that of the input is in wx already, that of the state meets the matmul's operand only.
#pragma once
#include "params.h"

namespace fastrnn::cuda {

struct RhnForwardDirection {
  const Vec4* weights = nullptr;    // depth slabs, each packed as a layer's W_hh by pack.cuh
  Rows wx;                          // W_ih x + bias of micro-step 0 (G * H)
  const float* bias = nullptr;      // (depth, G * H), of which row 0 is not read, or null
  const void* mask = nullptr;       // (N, H), or null
  const void* h0 = nullptr;         // (N, H), null: zeros
  const void* h0_masked = nullptr;  // h0 * mask; without a mask h0 itself
  void* h_n = nullptr;
  Rows y;
  Rows tape;  // by micro-step: activated gates and the state before it, (G + 1) * H, or null data
  Mail mail;  // by micro-step
  bool reverse = false;
};
struct RhnForwardParams : Shape {
  RhnForwardDirection dir[2];
  int depth = 1;
  bool wx_is_float = false;
};

struct RhnBackwardDirection {
  const Vec4* weights = nullptr;
  Rows dy;                     // null data: zeros
  const void* dh_n = nullptr;  // (N, H), null: zeros
  void* dh0 = nullptr;
  const void* mask = nullptr;
  Rows tape;    // from forward
  Rows dgates;  // by micro-step (G * H): gradients of the pre-activations; zero past a row's end
  Mail mail;    // by micro-step; may be dgates itself
  bool mail_is_gradient = false;  // and then it is not stored once more
  bool reverse = false;
};
struct RhnBackwardParams : Shape {
  RhnBackwardDirection dir[2];
  int depth = 1;
};

}  // namespace fastrnn::cuda
