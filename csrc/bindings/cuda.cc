// Python's door to the CUDA library: integers in (sizes, device addresses, a stream), nothing kept, the GIL released.
// fastrnn/backends/cuda_native.py is the only caller; it owns every buffer. Each launch has a tuple of its shape
// (Launcher) and one of its directions, whose fields the file of the layer's backend names in this order.
//
// Compiled twice: over the CUDA runtime as fastrnn._cuda, and for the tests over the SIMT emulator.
#include "cuda.h"

namespace fastrnn::cuda {

void read_forward(const py::tuple& directions, ForwardParams& p) {
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    ForwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.weights = static_cast<const Vec4*>(f.address());
    d.bias_n = read_floats(f);
    d.h0 = f.address();
    d.c0 = f.address();
    d.h_n = f.address();
    d.c_n = f.address();
    for (Rows* rows : {&d.wx, &d.y, &d.tape, &d.cells}) read_rows(f, *rows);
    for (Mail& mail : d.mail) read_rows(f, mail);
  }
  f.end();
}

void read_backward(const py::tuple& directions, BackwardParams& p) {
  Fields f(directions);
  for (int i = 0; i < p.directions; i++) {
    BackwardDirection& d = p.dir[i];
    d.reverse = i == 1;
    d.mail_is_gradient = f.integer() != 0;
    d.weights = static_cast<const Vec4*>(f.address());
    d.h0 = f.address();
    d.c0 = f.address();
    d.dh_n = f.address();
    d.dc_n = f.address();
    d.dh0 = f.address();
    d.dc0 = f.address();
    for (Rows* rows : {&d.dy, &d.dcells, &d.y, &d.tape, &d.cells, &d.dgates, &d.dgates_h})
      read_rows(f, *rows);
    for (Mail& mail : d.mail) read_rows(f, mail);
  }
  f.end();
}

namespace {

Device read_device_numbers(const py::tuple& numbers) {
  Fields f(numbers);
  Device d;
  for (int* to : {&d.sms, &d.shared_bytes, &d.registers, &d.compute_capability, &d.most_clusters})
    *to = static_cast<int>(f.integer());
  f.end();
  return d;
}

py::tuple kernel_fields(const PlanProblem& q, const Plan& p) {
  return py::make_tuple(static_cast<int>(q.cell), static_cast<int>(q.format), q.backward, q.regularised,
                        static_cast<int>(p.exchange), p.tile.units, p.tile.row_tiles, p.tile.chunks,
                        p.tile.resident, p.tile.warps, p.tile.teams);
}

// (text, refused, exchange, kernel, rows of a group, groups, ctas, launches, us of a step), the best first.
py::list plans(const py::tuple& device, const py::tuple& problem) {
  Fields f(problem);
  PlanProblem q = read_problem(f);
  for (int* to : {&q.N, &q.H, &q.directions, &q.depth, &q.O}) *to = static_cast<int>(f.integer());
  q.normed = f.integer() != 0;
  q.gate_masks = f.integer() != 0;
  f.end();
  py::list out;
  for (Plan& p : candidates(q, read_device_numbers(device))) {
    if (p.possible() && p.exchange != ExchangeKind::steps && !find_kernel(q, p))
      p.refused = "it is not compiled in";
    out.append(py::make_tuple(p.text(), p.refused, name_of(p.exchange), kernel_fields(q, p), p.rows, p.groups,
                              p.ctas, p.launches, p.step_us));
  }
  return out;
}

void forward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
             const py::tuple& directions) {
  const Kernel& kernel = read_kernel(name);
  ForwardParams p;
  read_shape(shape, kernel, p);
  read_forward(directions, p);
  start(ordinal, stream, kernel, p);
}

void backward(int ordinal, intptr_t stream, const py::tuple& name, const py::tuple& shape,
              const py::tuple& directions) {
  const Kernel& kernel = read_kernel(name);
  BackwardParams p;
  read_shape(shape, kernel, p);
  read_backward(directions, p);
  start(ordinal, stream, kernel, p);
}

}  // namespace

void bind(py::module_& m) {
  m.doc() = "fastrnn's CUDA kernels; see fastrnn/backends/cuda_native.py";
  m.attr("version") = FASTRNN_VERSION;
#if defined(FASTRNN_EMU)
  m.attr("emulated") = true;
#else
  m.attr("emulated") = false;
#endif
  m.attr("flag_bytes") = kFlagStride * sizeof(uint32_t);  // of a CTA
  m.def("device", [](int ordinal) {
    Device d;
    check(select_device(ordinal), "selecting the device");
    check(read_device(&d), "reading the device's numbers");
    return py::make_tuple(d.sms, d.shared_bytes, d.registers, d.compute_capability, d.most_clusters);
  });
  m.def("plans", &plans);
  m.def("resident_ctas", [](int ordinal, const py::tuple& name, int ctas_of_a_cluster, int extent) {
    int count = 0;
    check(select_device(ordinal), "selecting the device");
    check(resident_ctas(read_kernel(name), ctas_of_a_cluster, &count, extent), "counting resident CTAs");
    return count;
  });
  m.def("packed_bytes",
        [](const py::tuple& name, int ctas) { return packed_bytes(read_kernel(name), ctas); });
  // projection, P: of an LSTM with projection, or zeros.
  m.def("pack", [](int ordinal, intptr_t stream, const py::tuple& name, intptr_t weights, intptr_t packed,
                   int H, int ctas, intptr_t projection, int P) {
    const Kernel& kernel = read_kernel(name);
    const PackJob job{reinterpret_cast<const void*>(weights),
                      reinterpret_cast<void*>(packed),
                      H,
                      ctas,
                      reinterpret_cast<const void*>(projection),
                      P};
    py::gil_scoped_release release;
    check(select_device(ordinal), "selecting the device");
    check(pack(kernel, job, reinterpret_cast<void*>(stream)), "packing weights");
  });
  m.def("prepare_mail", [](int ordinal, intptr_t stream, intptr_t mail, size_t bytes) {
    py::gil_scoped_release release;
    check(select_device(ordinal), "selecting the device");
    check(prepare_mail(reinterpret_cast<void*>(mail), bytes, reinterpret_cast<void*>(stream)),
          "filling mail");
  });
  m.def("clear", [](int ordinal, intptr_t stream, intptr_t words, size_t bytes) {
    py::gil_scoped_release release;
    check(select_device(ordinal), "selecting the device");
    check(clear(reinterpret_cast<void*>(words), bytes, reinterpret_cast<void*>(stream)), "clearing flags");
  });
  m.def("forward", &forward);
  m.def("backward", &backward);
}

}  // namespace fastrnn::cuda

PYBIND11_MODULE(FASTRNN_MODULE, m) {
  fastrnn::cuda::bind(m);
  fastrnn::cuda::bind_regularised(m);
  fastrnn::cuda::bind_rhn(m);
  fastrnn::cuda::bind_bnlstm(m);
  fastrnn::cuda::bind_projected(m);
  fastrnn::cuda::bind_layer_norm(m);
  fastrnn::cuda::bind_steps(m);
}
