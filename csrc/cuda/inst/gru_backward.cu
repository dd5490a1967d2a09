#include "instances.cuh"

#define FASTRNN_ENTRY(D, E, ...) backward_entry<Gru<true>, D, Tile<__VA_ARGS__>, E>(),
FASTRNN_KERNEL_LIST(gru_backward)
