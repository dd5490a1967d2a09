#include "cuda_cases.h"

FASTRNN_CELL_TESTS(gru, Gru<true>)

int main(int argc, char** argv) { return check::run(argc, argv); }
