#include "instances.cuh"

FASTRNN_REGULARISED_LIST(gru_regularised, Gru<true>)
