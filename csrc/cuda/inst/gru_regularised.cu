#include "instances.cuh"

#define FASTRNN_ENTRY(D, E, ...) FASTRNN_REGULARISED(Gru<true>, D, E, __VA_ARGS__)
FASTRNN_SHORT_KERNEL_LIST(gru_regularised, REGULARISED)
