#include "../core/projected.cuh"
#include "instances.cuh"

namespace fastrnn::cuda {
template <class D, class T, template <class, class, int> class E>
static Kernel projected_entry() {
  return {CellKind::lstm_projected,
          true,
          D::kFormat,
          KindOf<E>::value,
          T::kShape,
          ProjectedBackward<D, T, E>::kLayout.bytes,
          reinterpret_cast<const void*>(&projected_backward_kernel<D, T, E>)};
}
}  // namespace fastrnn::cuda

#define FASTRNN_ENTRY(D, E, ...) projected_entry<D, Tile<__VA_ARGS__>, E>(),
FASTRNN_SHORT_KERNEL_LIST(lstm_projected_backward, PROJECTED)
