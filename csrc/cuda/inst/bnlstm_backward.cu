#include "../core/bnlstm_backward.cuh"
#include "instances.cuh"

namespace fastrnn::cuda {
template <class D, class T, template <class, class, int> class E>
static Kernel bnlstm_entry() {
  return {CellKind::bnlstm,
          true,
          D::kFormat,
          KindOf<E>::value,
          T::kShape,
          BnLstmBackward<D, T, E>::kLayout.bytes,
          reinterpret_cast<const void*>(&bnlstm_backward_kernel<D, T, E>)};
}
}  // namespace fastrnn::cuda

#define FASTRNN_ENTRY(D, E, ...) bnlstm_entry<D, Tile<__VA_ARGS__>, E>(),
FASTRNN_SHORT_KERNEL_LIST(bnlstm_backward, BNLSTM_BACKWARD)
