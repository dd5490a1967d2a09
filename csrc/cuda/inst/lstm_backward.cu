#include "instances.cuh"

#define FASTRNN_ENTRY(D, E, ...) backward_entry<Lstm, D, Tile<__VA_ARGS__>, E>(),
FASTRNN_KERNEL_LIST(lstm_backward)
