// What a launch is told. Plain C++: the host fills it, kernels read it.
//
// T steps, N rows, H units, G gates of the cell in torch's order; tensors are dense in their last dimension. I/O types are the
// kernel's format unless a comment says otherwise. A direction is one recurrent chain; both run in one launch, side by side.
#pragma once
#include <cstdint>

namespace fastrnn::cuda {

struct Vec4;

// Where CTAs read each other's results: row (t, n) starts at data + t * stride_t + n * stride_n elements, 16-byte
// aligned. Every byte is 0xff before the launch.
struct Mail {
  void* data = nullptr;
  int64_t stride_t = 0, stride_n = 0;
};

// A tensor (T, N, width) by address of its row (t, n).
struct Rows {
  void* data = nullptr;
  int64_t stride_t = 0, stride_n = 0;
};

struct Shape {
  int T = 0, N = 0, H = 0;
  int H_padded = 0;  // H rounded up to a 16-byte vector
  int directions = 1;
  int groups = 1, ctas = 1;        // batch groups, CTAs of each; the grid is directions * groups * ctas
  const int* lengths = nullptr;    // (N) steps of each row, 1..T, or null: all T
  const uint8_t* reset = nullptr;  // (T, N), or null: the state is zeroed before step (t, n) where non-zero
  uint32_t* flags = nullptr;  // release/acquire exchange: kFlagStride words a CTA, zero before the launch
  uint32_t* error = nullptr;  // set by a CTA that waited for too long, or null: wait forever
};
constexpr int kFlagStride = 32;  // one 128-byte line a flag

struct ForwardDirection {
  const Vec4* weights = nullptr;            // packed W_hh, see pack.cuh
  Rows wx;                                  // W_ih x + b_ih + b_hh (G * H), GRU reset_after: without b_hn
  const float* bias_n = nullptr;            // b_hn (H) of GRU reset_after, or null
  const void *h0 = nullptr, *c0 = nullptr;  // (N, H), null: zeros
  void *h_n = nullptr, *c_n = nullptr;      // (N, H)
  Rows y;                                   // H
  Rows tape;                                // what backward needs of the gates, Cell::kTape * H, or null data
  Rows cells;                               // c_t in fp32 (H), or null data
  Mail mail[2];                             // by phase; the last phase's may be y itself
  bool reverse = false;
};

struct ForwardParams : Shape {
  ForwardDirection dir[2];
  bool wx_is_float = false;  // wx is fp32 instead of the I/O type
};

struct BackwardDirection {
  const Vec4* weights = nullptr;
  Rows dy;                                      // null data: zeros
  Rows dcells;                                  // gradient of the cell sequence, fp32, or null data
  const void *dh_n = nullptr, *dc_n = nullptr;  // (N, H), null: zeros
  void *dh0 = nullptr, *dc0 = nullptr;          // (N, H)
  Rows y, tape, cells;                          // from forward
  const void *h0 = nullptr, *c0 = nullptr;
  Rows dgates;                    // gradient of wx (G * H); zero past a row's end
  Rows dgates_h;                  // GRU reset_after: of the recurrent part, W_hn h + b_hn in place of n's
  Mail mail[2];                   // by phase; may be (part of) the gradient of the recurrent part
  bool mail_is_gradient = false;  // and then it is not stored once more
  bool reverse = false;
};

struct BackwardParams : Shape {
  BackwardDirection dir[2];
};

}  // namespace fastrnn::cuda
