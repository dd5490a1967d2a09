// Recurrent dropout and zoneout: the part of the CUDA module that fastrnn/backends/cuda_noise.py calls.
#include "cuda.h"

namespace fastrnn::cuda {

Noise read_noise(const py::tuple& fields) {
  Fields f(fields);
  const auto mode = static_cast<DropKind>(f.integer());
  const bool per_sequence = f.integer() != 0;
  const auto* seed = static_cast<const uint64_t*>(f.address());
  const int layer = static_cast<int>(f.integer()), first_row = static_cast<int>(f.integer());
  const double drop = f.real(), zoneout_h = f.real(), zoneout_c = f.real();
  f.end();
  Noise n = noise_of(mode, drop, zoneout_h, zoneout_c, per_sequence, layer, seed);
  n.first_row = first_row;
  return n;
}

namespace {

// masked: addresses of each direction's masked initial state, or zeros.
void forward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
             const py::tuple& directions, const py::tuple& noise, const py::tuple& masked) {
  const Kernel& kernel = read_kernel(name);
  RegularisedForwardParams p;
  read_shape(shape, kernel, p);
  read_forward(directions, p);
  p.noise = read_noise(noise);
  Fields f(masked);
  for (int d = 0; d < p.directions; d++) p.h0_masked[d] = f.address();
  f.end();
  start(ordinal, stream, kernel, p);
}

void backward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
              const py::tuple& directions, const py::tuple& noise) {
  const Kernel& kernel = read_kernel(name);
  RegularisedBackwardParams p;
  read_shape(shape, kernel, p);
  read_backward(directions, p);
  p.noise = read_noise(noise);
  start(ordinal, stream, kernel, p);
}

// states: address, address of the result, T, N, H, address of lengths, reverse, strides of steps and rows or zeros.
void mask(int ordinal, intptr_t stream, int format, const py::tuple& noise, const py::tuple& states) {
  MaskStateParams p;
  p.noise = read_noise(noise);
  Fields f(states);
  p.h = f.address();
  p.out = f.address();
  for (int* to : {&p.T, &p.N, &p.H}) *to = static_cast<int>(f.integer());
  p.lengths = static_cast<const int*>(f.address());
  p.reverse = f.integer() != 0;
  p.stride_t = f.integer();
  p.stride_n = f.integer();
  f.end();
  py::gil_scoped_release release;
  check(select_device(ordinal), "selecting the device");
  check(mask_state(static_cast<Format>(format), p, reinterpret_cast<void*>(stream)), "masking states");
}

}  // namespace

void bind_regularised(py::module_& m) {
  m.def("regularised_forward", &forward);
  m.def("regularised_backward", &backward);
  m.def("mask_states", &mask);
}

}  // namespace fastrnn::cuda
