#include "instances.cuh"

#define FASTRNN_ENTRY(D, E, ...) backward_entry<Gru<false>, D, Tile<__VA_ARGS__>, E>(),
FASTRNN_SHORT_KERNEL_LIST(gru_reset_before_backward, TWO_MATMULS)
