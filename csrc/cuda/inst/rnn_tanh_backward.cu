#include "instances.cuh"

#define FASTRNN_ENTRY(D, E, ...) backward_entry<Rnn<false>, D, Tile<__VA_ARGS__>, E>(),
FASTRNN_KERNEL_LIST(rnn_tanh_backward)
