#include "instances.cuh"

#define FASTRNN_FORWARD(E, ...) forward_entry<Lstm, Bf16, Tile<__VA_ARGS__>, E>(),
#define FASTRNN_BACKWARD(E, ...) backward_entry<Lstm, Bf16, Tile<__VA_ARGS__>, E>(),

namespace fastrnn::cuda {
KernelList lstm_flags() {
  static const Kernel all[] = {FASTRNN_TILES_FLAGS(FASTRNN_FORWARD) FASTRNN_TILES_FLAGS(FASTRNN_BACKWARD)};
  return {all, static_cast<int>(sizeof all / sizeof *all)};
}
}  // namespace fastrnn::cuda
