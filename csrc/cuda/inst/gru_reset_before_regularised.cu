#include "instances.cuh"

FASTRNN_REGULARISED_LIST(gru_reset_before_regularised, Gru<false>)
