// Layer-normalised LSTM and GRU: the part of the CUDA module that fastrnn/backends/cuda_layer_norm.py calls.
#include "cuda.h"

namespace fastrnn::cuda {
namespace {

void forward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
             const py::tuple& directions, float eps) {
  const Kernel& kernel = read_kernel(name);
  LayerNormForwardParams p;
  read_shape(shape, kernel, p);
  p.eps = eps;
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    LayerNormForwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.weights = static_cast<const Vec4*>(f.address());
    for (const float** to : {&d.gain_h, &d.bias_n, &d.gain_c, &d.bias_c}) *to = read_floats(f);
    d.h0 = f.address();
    d.c0 = f.address();
    d.h_n = f.address();
    d.c_n = f.address();
    for (Rows* rows : {&d.wx, &d.y, &d.tape, &d.cells, &d.statistics}) read_rows(f, *rows);
    for (Mail* mail : {&d.mail, &d.pairs[0], &d.pairs[1]}) read_rows(f, *mail);
  }
  f.end();
  start(ordinal, stream, kernel, p);
}

void backward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
              const py::tuple& directions) {
  const Kernel& kernel = read_kernel(name);
  LayerNormBackwardParams p;
  read_shape(shape, kernel, p);
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    LayerNormBackwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.weights = static_cast<const Vec4*>(f.address());
    for (const float** to : {&d.gain_h, &d.bias_n, &d.gain_c, &d.bias_c}) *to = read_floats(f);
    d.h0 = f.address();
    d.c0 = f.address();
    d.dh_n = f.address();
    d.dc_n = f.address();
    d.dh0 = f.address();
    d.dc0 = f.address();
    for (Rows* rows :
         {&d.dy, &d.dcells, &d.y, &d.tape, &d.cells, &d.statistics, &d.dgates, &d.dgates_h, &d.dm})
      read_rows(f, *rows);
    for (Mail* mail : {&d.mail, &d.pairs[0], &d.pairs[1]}) read_rows(f, *mail);
  }
  f.end();
  start(ordinal, stream, kernel, p);
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  m.attr("row_statistics") = kRowStatistics;
  m.def("pair_line", &pair_line);  // floats of a row of pairs, of H units
  m.def("layer_norm_forward", &forward);
  m.def("layer_norm_backward", &backward);
}

}  // namespace fastrnn::cuda
