#include "instances.cuh"

#define FASTRNN_ENTRY(D, E, ...) FASTRNN_REGULARISED(Gru<false>, D, E, __VA_ARGS__)
FASTRNN_SHORT_KERNEL_LIST(gru_reset_before_regularised, REGULARISED)
