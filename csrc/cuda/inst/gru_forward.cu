#include "instances.cuh"

#define FASTRNN_ENTRY(D, E, ...) forward_entry<Gru<true>, D, Tile<__VA_ARGS__>, E>(),
FASTRNN_KERNEL_LIST(gru_forward)
