#include "instances.cuh"

FASTRNN_REGULARISED_LIST(lstm_regularised, Lstm)
