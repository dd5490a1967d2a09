// The tensor types of the layer kernels, and the entry points that kernels.cc has from its neighbours, which are
// units of their own so that they compile side by side.
#pragma once
#include <type_traits>

#include "layer.h"
#include "microkernel.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// AVX512_BF16 adds something for bfloat16 operands only: dispatch.cc takes everything else from AVX-512.
#if defined(__AVX512BF16__)
constexpr bool kBf16Only = true;
#else
constexpr bool kBf16Only = false;
#endif

using F32 = Types<float, float, float>;
using F64 = Types<double, double, double>;
using BF16 = Types<float, bf16, bf16>;
using F32xBF16 = Types<float, float, bf16>;
using BF16Grad = Types<float, bf16, float>;

// f(types) for the types of this set's forward kernels.
template <class F>
auto with_own_type(Type type, F&& f) {
  if (type == Type::bf16) return f(BF16{});
  if constexpr (!kBf16Only) {
    if (type == Type::f32) return f(F32{});
    if (type == Type::f64) return f(F64{});
  }
  return f(F32xBF16{});
}

// The linear mode exists for tests, in the types that have a reference to compare with.
template <class E>
constexpr bool kHasLinear = std::is_same<typename E::IO, typename E::A>::value && sizeof(typename E::IO) > 2;

size_t layer_forward_workspace(const ForwardArgs&);
void layer_forward(const ForwardArgs&);
size_t layer_backward_workspace(const BackwardArgs&);
void layer_backward(const BackwardArgs&);

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
