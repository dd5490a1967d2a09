// Batch-normalised LSTM layers: the part of the CUDA module that fastrnn/backends/cuda_bnlstm.py calls.
#include "cuda.h"

namespace fastrnn::cuda {
namespace {

// Address of the counts of live rows, eps, whether statistics are the batch's.
template <class Params>
void read_options(const py::tuple& fields, Params& p) {
  Fields f(fields);
  p.alive = static_cast<const int*>(f.address());
  p.eps = static_cast<float>(f.real());
  p.batch = f.integer() != 0;
  f.end();
}

void forward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
             const py::tuple& directions, const py::tuple& options) {
  const Kernel& kernel = read_kernel(name);
  BnLstmForwardParams p;
  read_shape(shape, kernel, p);
  read_options(options, p);
  p.wx_is_float = true;
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    BnLstmForwardDirection& d = p.dir[i];
    d.reverse = i == 1;
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
  f.end();
  start(ordinal, stream, kernel, p);
}

void backward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
              const py::tuple& directions, const py::tuple& options) {
  const Kernel& kernel = read_kernel(name);
  BnLstmBackwardParams p;
  read_shape(shape, kernel, p);
  read_options(options, p);
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    BnLstmBackwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.weights = static_cast<const Vec4*>(f.address());
    for (const float** to : {&d.gamma_h, &d.gamma_c, &d.beta_c, &d.used[0], &d.used[1]}) *to = read_floats(f);
    d.c0 = f.address();
    d.dh_n = f.address();
    d.dc_n = f.address();
    d.dh0 = f.address();
    d.dc0 = f.address();
    for (Rows* rows : {&d.dy, &d.dcells, &d.tape, &d.cells, &d.dgates, &d.dgates_h, &d.dm})
      read_rows(f, *rows);
    read_rows(f, d.mail);
  }
  f.end();
  start(ordinal, stream, kernel, p);
}

}  // namespace

void bind_bnlstm(py::module_& m) {
  m.def("bnlstm_forward", &forward);
  m.def("bnlstm_backward", &backward);
}

}  // namespace fastrnn::cuda
