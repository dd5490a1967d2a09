#include "../core/rhn.cuh"
#include "instances.cuh"

namespace fastrnn::cuda {
template <class Cell, class D, class T, template <class, class, int> class E>
static Kernel rhn_entry() {
  return {Cell::kKind,
          true,
          D::kFormat,
          KindOf<E>::value,
          T::kShape,
          RhnBackward<Cell, D, T, E>::kLayout.bytes,
          reinterpret_cast<const void*>(&rhn_backward_kernel<Cell, D, T, E>)};
}
}  // namespace fastrnn::cuda

#define FASTRNN_ENTRY(D, E, ...) \
  rhn_entry<Rhn<true>, D, Tile<__VA_ARGS__>, E>(), rhn_entry<Rhn<false>, D, Tile<__VA_ARGS__>, E>(),
FASTRNN_SHORT_KERNEL_LIST(rhn_backward, RHN)
