#include "instances.cuh"

#define FASTRNN_ENTRY(D, E, ...) FASTRNN_REGULARISED(Rnn<false>, D, E, __VA_ARGS__)
FASTRNN_SHORT_KERNEL_LIST(rnn_tanh_regularised, REGULARISED)
