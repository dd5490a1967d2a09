// What a layer's call is made of, out of tuples in the order that fastrnn/backends/cpu.py writes them.
#pragma once
#include "fields.h"

namespace fastrnn {

inline void read_problem(Fields& f, Problem& p) {
  p.cell = static_cast<Cell>(f.integer());
  p.type = static_cast<Type>(f.integer());
  p.partition = static_cast<Partition>(f.integer());
  p.linear = f.integer() != 0;
  p.threads = static_cast<int>(f.integer());
  p.directions = static_cast<int>(f.integer());
  p.T = f.integer();
  p.N = f.integer();
  p.I = f.integer();
  p.H = f.integer();
  p.O = f.integer();
  p.projected = f.integer() != 0;
}

inline void read_sequence(Fields& f, Problem& p) {
  p.batch_sizes = static_cast<const int64_t*>(f.address());
  p.lengths = static_cast<const int64_t*>(f.address());
  p.reset = static_cast<const uint8_t*>(f.address());
  p.reset_stride_t = f.integer();
  p.reset_stride_n = f.integer();
}

// Where a call has none, its tuple ends before.
inline void read_noise(Fields& f, Problem& p) {
  if (f.at_end()) return;
  Noise& n = p.noise;
  n.seed = static_cast<const uint64_t*>(f.address());
  n.layer = f.integer();
  n.training = f.integer() != 0;
  n.mode = static_cast<Drop>(f.integer());
  n.per_sequence = f.integer() != 0;
  n.drop = f.real();
  n.zoneout_h = f.real();
  n.zoneout_c = f.real();
}

inline void read_weights(Fields& f, const Problem& p, Weights* w) {
  for (int d = 0; d < p.directions; d++) {
    w[d] = {f.address(), f.address(), f.address(), f.address(), f.address()};
    if (!normalises(p.cell)) continue;
    w[d].ln_ih = f.address();
    w[d].ln_hh = f.address();
    w[d].ln_c = f.address();
    w[d].ln_bias_c = f.address();
  }
}

inline ForwardArgs forward_args(const pybind11::tuple& problem, const pybind11::tuple& tensors) {
  ForwardArgs a;
  Fields f(problem);
  read_problem(f, a);
  f.end();
  Fields g(tensors);
  a.x = g.strides();
  a.y = g.strides();
  a.cells = g.strides();
  a.x.data = g.address();
  a.y.data = g.address();
  a.cells.data = g.address();
  a.h0 = g.address();
  a.c0 = g.address();
  a.h_n = g.address();
  a.c_n = g.address();
  a.packed = g.address();
  a.gates = g.address();
  read_sequence(g, a);
  read_weights(g, a, a.weights);
  read_noise(g, a);
  g.end();
  return a;
}

inline BackwardArgs backward_args(const pybind11::tuple& problem, const pybind11::tuple& tensors) {
  BackwardArgs a;
  Fields f(problem);
  read_problem(f, a);
  f.end();
  Fields g(tensors);
  a.x = a.dx = g.strides();
  a.y = a.dy = g.strides();
  a.cells = a.dcells = g.strides();
  a.x.data = g.address();
  a.y.data = g.address();
  a.cells.data = g.address();
  a.dx.data = g.address();
  a.dy.data = g.address();
  a.dcells.data = g.address();
  a.h0 = g.address();
  a.c0 = g.address();
  a.dh_n = g.address();
  a.dc_n = g.address();
  a.dh0 = g.address();
  a.dc0 = g.address();
  a.gates = g.address();
  a.want_weights = g.integer() != 0;
  read_sequence(g, a);
  read_weights(g, a, a.weights);
  for (int d = 0; d < a.directions && a.want_weights; d++) {
    a.grads[d] = {g.address(), g.address(), g.address(), g.address(), g.address()};
    if (!normalises(a.cell)) continue;
    a.grads[d].ln_ih = g.address();
    a.grads[d].ln_hh = g.address();
    a.grads[d].ln_c = g.address();
    a.grads[d].ln_bias_c = g.address();
  }
  read_noise(g, a);
  g.end();
  return a;
}

}  // namespace fastrnn
