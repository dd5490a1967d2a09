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
#include "noise.cuh"

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

// Takes h as the new state, or zoneout's choice between it and the old one.
template <class A, class F>
FASTRNN_DEVICE float zoned(State& s, float h, const F& by) {
  if constexpr (F::kOn)
    if (by.zones_h) h = zoneout<A>(by.zone_h, h, s.h);
  return s.h = h;
}

template <class A, class F>
FASTRNN_DEVICE float gru_state(State& s, float z, float n, const F& by) {
  if constexpr (F::kOn)
    return zoned<A>(s, gru_output<A>(z, n, s.h, by.update), by);
  else
    return s.h = gru_output<A>(z, n, s.h);
}
template <class A, class F>
FASTRNN_DEVICE GruGrad<float> gru_gradient(const Saved& v, float un, float dh, const F& by) {
  if constexpr (F::kOn)
    return gru_backward<A>(v.gate[0], v.gate[1], v.gate[2], un, v.h_prev, dh, by.update);
  else
    return gru_backward<A>(v.gate[0], v.gate[1], v.gate[2], un, v.h_prev, dh);
}

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
  template <class A, int Phase, class F>
  FASTRNN_DEVICE static float forward(State& s, const float (&x)[4], const float (&r)[4], float,
                                      float (&tape)[4], const F& by) {
    tape[0] = A::sigmoid(x[0] + r[0]);
    tape[1] = A::sigmoid(x[1] + r[1]);
    tape[2] = A::tanh(x[2] + r[2]);
    tape[3] = A::sigmoid(x[3] + r[3]);
    if constexpr (F::kOn) {
      const float old = s.c;
      s.c = lstm_cell<A>(tape[0], tape[1], tape[2], old, by.update, by.cell);
      const float h = tape[3] * A::tanh(s.c);
      if (by.zones_c) s.c = zoneout<A>(by.zone_c, s.c, old);
      return zoned<A>(s, h, by);
    } else {
      s.c = lstm_cell<A>(tape[0], tape[1], tape[2], s.c);
      return s.h = tape[3] * A::tanh(s.c);
    }
  }
  // dh: all that reaches h_t (phase 0), the matmul's sum (phase 1). g: gradients of the recurrent part; returns n's on
  // the input side.
  template <class A, int Phase, class F>
  FASTRNN_DEVICE static float backward(Carry& k, const Saved& v, float dh, float (&g)[4], const F& by) {
    LstmGrad<float> d;
    const float old_h = zoned_h<A>(by, dh);
    if constexpr (F::kOn) {
      float c = v.c, old = 0.f;
      if (by.zones_c) {
        c = lstm_cell<A>(v.gate[0], v.gate[1], v.gate[2], v.c_prev, by.update, by.cell);  // before zoneout
        old = zoneout_backward<A>(by.zone_c, k.dc);
      }
      d = lstm_backward<A>(v.gate[0], v.gate[1], v.gate[2], v.gate[3], c, v.c_prev, dh, k.dc, by.update,
                           by.cell);
      d.c_prev += old;
    } else {
      d = lstm_backward<A>(v.gate[0], v.gate[1], v.gate[2], v.gate[3], v.c, v.c_prev, dh, k.dc);
    }
    g[0] = d.i;
    g[1] = d.f;
    g[2] = d.g;
    g[3] = d.o;
    k.dc = d.c_prev;
    k.dh = old_h;
    return 0.f;
  }
};

template <bool ResetAfter>
struct Gru;

template <>
struct Gru<true> : Shaped<CellKind::gru> {
  static constexpr bool kHasCell = false, kTwoGradients = true, kReadsPrevious = true, kReadsOutput = false;

  template <class A, int Phase, class F>
  FASTRNN_DEVICE static float forward(State& s, const float (&x)[4], const float (&r)[4], float bias_n,
                                      float (&tape)[4], const F& by) {
    tape[0] = A::sigmoid(x[0] + r[0]);
    tape[1] = A::sigmoid(x[1] + r[1]);
    tape[3] = r[2] + bias_n;
    tape[2] = A::tanh(gru_candidate<A>(tape[0], tape[3], x[2]));
    return gru_state<A>(s, tape[1], tape[2], by);
  }
  template <class A, int Phase, class F>
  FASTRNN_DEVICE static float backward(Carry& k, const Saved& v, float dh, float (&g)[4], const F& by) {
    const float old = zoned_h<A>(by, dh);
    const GruGrad<float> d = gru_gradient<A>(v, v.gate[3], dh, by);
    g[0] = d.r;
    g[1] = d.z;
    g[2] = d.un;
    k.dh = F::kOn ? d.h_prev + old : d.h_prev;
    return d.n;
  }
};

template <>
struct Gru<false> : Shaped<CellKind::gru_reset_before> {
  static constexpr bool kHasCell = false, kTwoGradients = false, kReadsPrevious = true, kReadsOutput = false;

  template <class A, int Phase, class F>
  FASTRNN_DEVICE static float forward(State& s, const float (&x)[4], const float (&r)[4], float,
                                      float (&tape)[4], const F& by) {
    if constexpr (Phase == 0) {
      tape[0] = A::sigmoid(x[0] + r[0]);
      tape[1] = s.held = A::sigmoid(x[1] + r[1]);
      if constexpr (F::kOn) return tape[0] * (s.h * by.state);
      return tape[0] * s.h;
    } else {
      tape[2] = A::tanh(x[0] + r[0]);
      return gru_state<A>(s, s.held, tape[2], by);
    }
  }
  // The reset gate's gradient needs the candidate's, through its matmul: un is that sum's factor of h_prev.
  template <class A, int Phase, class F>
  FASTRNN_DEVICE static float backward(Carry& k, const Saved& v, float dh, float (&g)[4], const F& by) {
    if constexpr (Phase == 0) {
      const float old = zoned_h<A>(by, dh);
      const GruGrad<float> d = gru_gradient<A>(v, 0.f, dh, by);
      g[1] = d.z;
      g[2] = d.n;
      k.held = d.z;
      k.dh = F::kOn ? d.h_prev + old : d.h_prev;
    } else {
      if constexpr (F::kOn) dh *= by.state;
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

  template <class A, int Phase, class F>
  FASTRNN_DEVICE static float forward(State& s, const float (&x)[4], const float (&r)[4], float,
                                      float (&tape)[4], const F& by) {
    const float h = Relu ? A::relu(x[0] + r[0]) : A::tanh(x[0] + r[0]);
    if constexpr (F::kOn) {
      tape[0] = h;
      return zoned<A>(s, h, by);
    }
    return s.h = h;
  }
  template <class A, int Phase, class F>
  FASTRNN_DEVICE static float backward(Carry& k, const Saved& v, float dh, float (&g)[4], const F& by) {
    k.dh = zoned_h<A>(by, dh);
    g[0] = rnn_backward<A, Relu>(F::kOn ? v.gate[0] : v.h, dh);
    return 0.f;
  }
};

// Values on the tape. Zoneout's new value is not the output that an Elman cell's backward reads otherwise.
template <class Cell, bool kNoisy>
constexpr int kTapeOf = kNoisy && Cell::kReadsOutput ? 1 : Cell::kTape;

}  // namespace fastrnn::cuda
