// What the bindings of the CUDA library share: kernels, shapes and rows read from tuples, and launches.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../cuda/launch.h"
#include "fields.h"

namespace fastrnn::cuda {

namespace py = pybind11;

// One file for each family of kernels.
void bind(py::module_& m);
void bind_regularised(py::module_& m);
void bind_rhn(py::module_& m);
void bind_bnlstm(py::module_& m);
void bind_projected(py::module_& m);
void bind_layer_norm(py::module_& m);
void bind_steps(py::module_& m);

inline void check(const Status& status, const char* what) {
  if (!status.ok())
    throw std::runtime_error(std::string("fastrnn CUDA library: ") + what + ": " + status.text);
}

inline PlanProblem read_problem(Fields& f) {
  PlanProblem q;
  q.cell = static_cast<CellKind>(f.integer());
  q.format = static_cast<Format>(f.integer());
  q.backward = f.integer() != 0;
  q.regularised = f.integer() != 0;
  return q;
}

// What names a kernel: cell, format, backward, regularised, exchange, tile.
inline const Kernel& read_kernel(const py::tuple& fields) {
  Fields f(fields);
  const PlanProblem q = read_problem(f);
  Plan p;
  p.exchange = static_cast<ExchangeKind>(f.integer());
  for (int* to :
       {&p.tile.units, &p.tile.row_tiles, &p.tile.chunks, &p.tile.resident, &p.tile.warps, &p.tile.teams})
    *to = static_cast<int>(f.integer());
  f.end();
  const Kernel* kernel = find_kernel(q, p);
  if (!kernel) throw std::invalid_argument("fastrnn CUDA library: a kernel that is not compiled in");
  return *kernel;
}

inline void read_shape(const py::tuple& fields, const Kernel& kernel, Shape& s) {
  Fields f(fields);
  for (int* to : {&s.T, &s.N, &s.H, &s.directions, &s.groups, &s.ctas}) *to = static_cast<int>(f.integer());
  s.H_padded = round_up(s.H, vector_elements(kernel.format));
  s.lengths = static_cast<const int*>(f.address());
  s.reset = static_cast<const uint8_t*>(f.address());
  s.flags = static_cast<uint32_t*>(f.address());
  s.error = static_cast<uint32_t*>(f.address());
  f.end();
  if (s.directions < 1 || s.directions > 2) throw std::invalid_argument("fastrnn CUDA library: directions");
}

// Address and strides of a tensor's rows, in elements.
template <class To>
void read_rows(Fields& f, To& r) {
  r.data = f.address();
  r.stride_t = f.integer();
  r.stride_n = f.integer();
}

inline const float* read_floats(Fields& f) { return static_cast<const float*>(f.address()); }

// Mode, per sequence, address of the seed on the device, layer, number of the launch's first row, three probabilities.
Noise read_noise(const py::tuple& fields);

// Of LSTM, GRU and RNN, with and without regularisers.
void read_forward(const py::tuple& directions, ForwardParams& p);
void read_backward(const py::tuple& directions, BackwardParams& p);

// Of a batch-normalised LSTM, persistent or step by step: a direction's fields, then the address of the counts of live rows, eps,
// whether statistics are the batch's.
void read_direction(Fields& f, BnLstmForwardDirection& d);
void read_direction(Fields& f, BnLstmBackwardDirection& d);
template <class Params>
void read_batch_norm(const py::tuple& directions, const py::tuple& options, Params& p) {
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    p.dir[i].reverse = i == 1;
    read_direction(f, p.dir[i]);
  }
  f.end();
  Fields o(options);
  p.alive = static_cast<const int*>(o.address());
  p.eps = static_cast<float>(o.real());
  p.batch = o.integer() != 0;
  o.end();
}

template <class Params>
void start(int ordinal, intptr_t stream, const Kernel& kernel, const Params& params) {
  py::gil_scoped_release release;
  check(select_device(ordinal), "selecting the device");
  check(launch(kernel, params, reinterpret_cast<void*>(stream)), "launching a kernel");
}

}  // namespace fastrnn::cuda
