#include "instances.cuh"

#define FASTRNN_ENTRY(D, E, ...) FASTRNN_REGULARISED(Lstm, D, E, __VA_ARGS__)
FASTRNN_SHORT_KERNEL_LIST(lstm_regularised, REGULARISED)
