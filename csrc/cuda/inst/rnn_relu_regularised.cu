#include "instances.cuh"

#define FASTRNN_ENTRY(D, E, ...) FASTRNN_REGULARISED(Rnn<true>, D, E, __VA_ARGS__)
FASTRNN_SHORT_KERNEL_LIST(rnn_relu_regularised, REGULARISED)
