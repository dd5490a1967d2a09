// LSTM with projection: the part of the CUDA module that fastrnn/backends/cuda_projected.py calls.
#include "cuda.h"

namespace fastrnn::cuda {
namespace {

void read_width(ProjectedShape& p, const Kernel& kernel, int P) {
  p.P = P;
  p.P_padded = round_up(P, vector_elements(kernel.format));
}

void forward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
             const py::tuple& directions, int P) {
  const Kernel& kernel = read_kernel(name);
  ProjectedForwardParams p;
  read_shape(shape, kernel, p);
  read_width(p, kernel, P);
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    ProjectedForwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.weights = static_cast<const Vec4*>(f.address());
    d.h0 = f.address();
    d.c0 = f.address();
    d.h_n = f.address();
    d.c_n = f.address();
    for (Rows* rows : {&d.wx, &d.y, &d.tape, &d.cells}) read_rows(f, *rows);
    for (Mail* mail : {&d.middle_mail, &d.state_mail}) read_rows(f, *mail);
  }
  f.end();
  start(ordinal, stream, kernel, p);
}

void backward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
              const py::tuple& directions, int P) {
  const Kernel& kernel = read_kernel(name);
  ProjectedBackwardParams p;
  read_shape(shape, kernel, p);
  read_width(p, kernel, P);
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    ProjectedBackwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.weights = static_cast<const Vec4*>(f.address());
    d.c0 = f.address();
    d.dh_n = f.address();
    d.dc_n = f.address();
    d.dh0 = f.address();
    d.dc0 = f.address();
    for (Rows* rows : {&d.dy, &d.dcells, &d.tape, &d.cells, &d.dgates, &d.dh, &d.middle}) read_rows(f, *rows);
    for (Mail* mail : {&d.gradient_mail, &d.state_mail}) read_rows(f, *mail);
  }
  f.end();
  start(ordinal, stream, kernel, p);
}

}  // namespace

void bind_projected(py::module_& m) {
  m.def("projected_forward", &forward);
  m.def("projected_backward", &backward);
}

}  // namespace fastrnn::cuda
