// A layer of a call without gradients, as described once: cpu_inference.cc makes the call, each family of cells its layers.
#pragma once
#include "tensors.h"

namespace fastrnn {

// What differs from one call to the next.
struct Step {
  const void* x;
  void* y;
  const void *h0, *c0;  // null where a cell has none
  void *h_n, *c_n;
  int64_t first;  // the number of the first step
};

// The arguments of a layer's call, described but for these.
template <typename Args>
Args with_step(const Args& described, const Step& step) {
  Args a = described;
  a.x.data = const_cast<void*>(step.x);
  a.y.data = step.y;
  a.h0 = step.h0;
  a.h_n = step.h_n;
  return a;
}

class InferenceLayer {
 public:
  // `matrices`: gates times what a unit of each reads, in units of I + H.
  InferenceLayer(const Problem& p, int64_t matrices)
      : threads(p.threads),
        h_bytes(p.directions * p.N * p.O * item(p.type)),
        c_bytes(p.directions * p.N * p.H * item(p.type)),
        products(p.T * p.N * p.H * (p.I + p.H) * matrices) {}
  virtual ~InferenceLayer() = default;
  virtual void run(const Step& step, bool brief) = 0;

  const int threads;
  const int64_t h_bytes, c_bytes;  // of a layer's states
  const int64_t products;

 private:
  static int64_t item(Type type) { return type == Type::f64 ? 8 : type == Type::bf16 ? 2 : 4; }
};

constexpr const char* kInferenceLayer = "fastrnn.inference_layer";

inline py::capsule in_capsule(std::unique_ptr<InferenceLayer> layer) {
  return py::capsule(layer.release(), kInferenceLayer, [](PyObject* capsule) {
    delete static_cast<InferenceLayer*>(PyCapsule_GetPointer(capsule, kInferenceLayer));
  });
}
inline InferenceLayer& inference_layer(PyObject* capsule) {
  void* const at = PyCapsule_GetPointer(capsule, kInferenceLayer);
  if (!at) throw py::error_already_set();
  return *static_cast<InferenceLayer*>(at);
}

}  // namespace fastrnn
