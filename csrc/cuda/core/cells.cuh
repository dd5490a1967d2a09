// Recurrent cells as the persistent kernels see them: which gates each matmul of a step makes, and what becomes of the
// sums. The arithmetic is csrc/cells, shared with the CPU.
//
// A step has one phase, or two where the second matmul needs the first one's result (GRU reset_before). A phase sums
// W h for its gates, turns the sums into one value per unit and publishes it to all CTAs for the next phase.
#pragma once
#include "../../cells/gru.h"
#include "../../cells/lstm.h"
#include "../../cells/rnn.h"
#include "activations.cuh"
#include "geometry.h"

namespace fastrnn::cuda {

constexpr int kMaxGates = 4;

// State of a unit in fp32: carried in registers over the whole sequence.
struct State {
  float h, c, held;  // held: between the phases of a step
};

// Gradients carried backwards: dh without the matmul's share, dc.
struct Carry {
  float dh, dc, held;
};

// What backward reads of a step.
struct Saved {
  float gate[kMaxGates];
  float h_prev, h, c_prev, c;
};

template <CellKind Kind>
struct Shaped {
  static constexpr CellKind kKind = Kind;
  static constexpr CellShape kShape = cell_shape(Kind);
  static constexpr int kGates = kShape.gates, kTape = kShape.tape, kPhases = kShape.phases;
};

// kTwoGradients: the input part's gradient differs from the recurrent part's. kReadsPrevious, kReadsOutput: backward needs
// h_{t-1}, h_t.
struct Lstm : Shaped<CellKind::lstm> {
  static constexpr bool kHasCell = true, kTwoGradients = false, kReadsPrevious = false, kReadsOutput = false;

  // x, r: input and recurrent part of the phase's gates; returns what is published, in the last phase h.
  template <class A, int Phase>
  FASTRNN_DEVICE static float forward(State& s, const float (&x)[4], const float (&r)[4], float,
                                      float (&tape)[4]) {
    tape[0] = A::sigmoid(x[0] + r[0]);
    tape[1] = A::sigmoid(x[1] + r[1]);
    tape[2] = A::tanh(x[2] + r[2]);
    tape[3] = A::sigmoid(x[3] + r[3]);
    s.c = lstm_cell<A>(tape[0], tape[1], tape[2], s.c);
    return s.h = tape[3] * A::tanh(s.c);
  }
  // dh: all that reaches h_t (phase 0), the matmul's sum (phase 1). g: gradients of the recurrent part; returns n's on
  // the input side.
  template <class A, int Phase>
  FASTRNN_DEVICE static float backward(Carry& k, const Saved& v, float dh, float (&g)[4]) {
    const LstmGrad<float> d =
        lstm_backward<A>(v.gate[0], v.gate[1], v.gate[2], v.gate[3], v.c, v.c_prev, dh, k.dc);
    g[0] = d.i;
    g[1] = d.f;
    g[2] = d.g;
    g[3] = d.o;
    k.dc = d.c_prev;
    k.dh = 0.f;
    return 0.f;
  }
};

template <bool ResetAfter>
struct Gru;

template <>
struct Gru<true> : Shaped<CellKind::gru> {
  static constexpr bool kHasCell = false, kTwoGradients = true, kReadsPrevious = true, kReadsOutput = false;

  template <class A, int Phase>
  FASTRNN_DEVICE static float forward(State& s, const float (&x)[4], const float (&r)[4], float bias_n,
                                      float (&tape)[4]) {
    tape[0] = A::sigmoid(x[0] + r[0]);
    tape[1] = A::sigmoid(x[1] + r[1]);
    tape[3] = r[2] + bias_n;
    tape[2] = A::tanh(gru_candidate<A>(tape[0], tape[3], x[2]));
    return s.h = gru_output<A>(tape[1], tape[2], s.h);
  }
  template <class A, int Phase>
  FASTRNN_DEVICE static float backward(Carry& k, const Saved& v, float dh, float (&g)[4]) {
    const GruGrad<float> d = gru_backward<A>(v.gate[0], v.gate[1], v.gate[2], v.gate[3], v.h_prev, dh);
    g[0] = d.r;
    g[1] = d.z;
    g[2] = d.un;
    k.dh = d.h_prev;
    return d.n;
  }
};

template <>
struct Gru<false> : Shaped<CellKind::gru_reset_before> {
  static constexpr bool kHasCell = false, kTwoGradients = false, kReadsPrevious = true, kReadsOutput = false;

  template <class A, int Phase>
  FASTRNN_DEVICE static float forward(State& s, const float (&x)[4], const float (&r)[4], float,
                                      float (&tape)[4]) {
    if constexpr (Phase == 0) {
      tape[0] = A::sigmoid(x[0] + r[0]);
      tape[1] = s.held = A::sigmoid(x[1] + r[1]);
      return tape[0] * s.h;
    } else {
      tape[2] = A::tanh(x[0] + r[0]);
      return s.h = gru_output<A>(s.held, tape[2], s.h);
    }
  }
  // The reset gate's gradient needs the candidate's, through its matmul: un is that sum's factor of h_prev.
  template <class A, int Phase>
  FASTRNN_DEVICE static float backward(Carry& k, const Saved& v, float dh, float (&g)[4]) {
    if constexpr (Phase == 0) {
      const GruGrad<float> d = gru_backward<A>(v.gate[0], v.gate[1], v.gate[2], 0.f, v.h_prev, dh);
      g[1] = d.z;
      g[2] = d.n;
      k.held = d.z;
      k.dh = d.h_prev;
    } else {
      g[0] = dh * v.h_prev * A::dsigmoid(v.gate[0]);
      g[1] = k.held;
      k.dh = A::fma(dh, v.gate[0], k.dh);
    }
    return 0.f;
  }
};

template <bool Relu>
struct Rnn : Shaped<Relu ? CellKind::rnn_relu : CellKind::rnn_tanh> {
  static constexpr bool kHasCell = false, kTwoGradients = false, kReadsPrevious = false, kReadsOutput = true;

  template <class A, int Phase>
  FASTRNN_DEVICE static float forward(State& s, const float (&x)[4], const float (&r)[4], float,
                                      float (&)[4]) {
    return s.h = Relu ? A::relu(x[0] + r[0]) : A::tanh(x[0] + r[0]);
  }
  template <class A, int Phase>
  FASTRNN_DEVICE static float backward(Carry& k, const Saved& v, float dh, float (&g)[4]) {
    g[0] = rnn_backward<A, Relu>(v.h, dh);
    k.dh = 0.f;
    return 0.f;
  }
};

}  // namespace fastrnn::cuda
