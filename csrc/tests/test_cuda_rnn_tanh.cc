#include "cuda_cases.h"

FASTRNN_CELL_TESTS(rnn_tanh, Rnn<false>)

int main(int argc, char** argv) { return check::run(argc, argv); }
