#include "../core/bnlstm_forward.cuh"
#include "instances.cuh"

namespace fastrnn::cuda {
template <class D, class T, template <class, class, int> class E>
static Kernel bnlstm_entry() {
  return {CellKind::bnlstm,
          false,
          D::kFormat,
          KindOf<E>::value,
          T::kShape,
          BnLstmForward<D, T, E>::kLayout.bytes,
          reinterpret_cast<const void*>(&bnlstm_forward_kernel<D, T, E>)};
}
}  // namespace fastrnn::cuda

#define FASTRNN_ENTRY(D, E, ...) bnlstm_entry<D, Tile<__VA_ARGS__>, E>(),
FASTRNN_SHORT_KERNEL_LIST(bnlstm_forward, BNLSTM_FORWARD)
