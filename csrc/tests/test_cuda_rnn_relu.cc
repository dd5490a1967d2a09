#include "cuda_cases.h"

FASTRNN_CELL_TESTS(rnn_relu, Rnn<true>)

int main(int argc, char** argv) { return check::run(argc, argv); }
