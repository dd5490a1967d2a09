// Batch-normalised LSTM layers: the part of the CUDA module that fastrnn/backends/cuda_bnlstm.py calls.
#include "cuda.h"

namespace fastrnn::cuda {

void read_direction(Fields& f, BnLstmForwardDirection& d) {
  d.weights = static_cast<const Vec4*>(f.address());
  for (const float** to : {&d.gamma_h, &d.gamma_c, &d.beta_c}) *to = read_floats(f);
  for (int term = 0; term < kBnTerms; term++) {
    d.given[term].mean = read_floats(f);
    d.given[term].var = read_floats(f);
    d.given[term].rows = static_cast<int>(f.integer());
    d.used[term] = static_cast<float*>(f.address());
  }
  d.h0 = f.address();
  d.c0 = f.address();
  d.h_n = f.address();
  d.c_n = f.address();
  for (Rows* rows : {&d.wx, &d.y, &d.tape, &d.cells}) read_rows(f, *rows);
  read_rows(f, d.mail);
}

void read_direction(Fields& f, BnLstmBackwardDirection& d) {
  d.weights = static_cast<const Vec4*>(f.address());
  for (const float** to : {&d.gamma_h, &d.gamma_c, &d.beta_c, &d.used[0], &d.used[1]}) *to = read_floats(f);
  d.c0 = f.address();
  d.dh_n = f.address();
  d.dc_n = f.address();
  d.dh0 = f.address();
  d.dc0 = f.address();
  for (Rows* rows : {&d.dy, &d.dcells, &d.tape, &d.cells, &d.dgates, &d.dgates_h, &d.dm}) read_rows(f, *rows);
  read_rows(f, d.mail);
}

namespace {

void forward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
             const py::tuple& directions, const py::tuple& options) {
  const Kernel& kernel = read_kernel(name);
  BnLstmForwardParams p;
  read_shape(shape, kernel, p);
  read_batch_norm(directions, options, p);
  p.wx_is_float = true;
  start(ordinal, stream, kernel, p);
}

void backward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
              const py::tuple& directions, const py::tuple& options) {
  const Kernel& kernel = read_kernel(name);
  BnLstmBackwardParams p;
  read_shape(shape, kernel, p);
  read_batch_norm(directions, options, p);
  start(ordinal, stream, kernel, p);
}

}  // namespace

void bind_bnlstm(py::module_& m) {
  m.def("bnlstm_forward", &forward);
  m.def("bnlstm_backward", &backward);
}

}  // namespace fastrnn::cuda
