#include "../core/layernorm.cuh"
#include "instances.cuh"

namespace fastrnn::cuda {
template <class Cell, class D, class T, template <class, class, int> class E>
static Kernel layer_norm_entry() {
  return {Cell::kKind,
          true,
          D::kFormat,
          KindOf<E>::value,
          T::kShape,
          LayerNormBackward<Cell, D, T, E>::kSharedBytes,
          reinterpret_cast<const void*>(&layer_norm_backward_kernel<Cell, D, T, E>)};
}
}  // namespace fastrnn::cuda

#define FASTRNN_ENTRY(D, E, ...)                              \
  layer_norm_entry<LayerNormLstm, D, Tile<__VA_ARGS__>, E>(), \
      layer_norm_entry<LayerNormGru, D, Tile<__VA_ARGS__>, E>(),
FASTRNN_SHORT_KERNEL_LIST(layer_norm_backward, LAYER_NORM)
