#include "instances.cuh"

FASTRNN_REGULARISED_LIST(rnn_tanh_regularised, Rnn<false>)
