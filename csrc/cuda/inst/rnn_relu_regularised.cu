#include "instances.cuh"

FASTRNN_REGULARISED_LIST(rnn_relu_regularised, Rnn<true>)
