// Recurrent Highway layers: the part of the CUDA module that fastrnn/backends/cuda_rhn.py calls.
#include "cuda.h"

namespace fastrnn::cuda {
namespace {

void forward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
             const py::tuple& directions, int depth) {
  const Kernel& kernel = read_kernel(name);
  RhnForwardParams p;
  read_shape(shape, kernel, p);
  p.depth = depth;
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    RhnForwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.weights = static_cast<const Vec4*>(f.address());
    d.bias = read_floats(f);
    d.mask = f.address();
    d.h0 = f.address();
    d.h0_masked = f.address();
    d.h_n = f.address();
    for (Rows* rows : {&d.wx, &d.y, &d.tape}) read_rows(f, *rows);
    read_rows(f, d.mail);
  }
  f.end();
  start(ordinal, stream, kernel, p);
}

void backward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
              const py::tuple& directions, int depth) {
  const Kernel& kernel = read_kernel(name);
  RhnBackwardParams p;
  read_shape(shape, kernel, p);
  p.depth = depth;
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    RhnBackwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.mail_is_gradient = f.integer() != 0;
    d.weights = static_cast<const Vec4*>(f.address());
    d.mask = f.address();
    d.dh_n = f.address();
    d.dh0 = f.address();
    for (Rows* rows : {&d.dy, &d.tape, &d.dgates}) read_rows(f, *rows);
    read_rows(f, d.mail);
  }
  f.end();
  start(ordinal, stream, kernel, p);
}

}  // namespace

void bind_rhn(py::module_& m) {
  m.def("rhn_forward", &forward);
  m.def("rhn_backward", &backward);
}

}  // namespace fastrnn::cuda
