#include "cuda_cases.h"

FASTRNN_CELL_TESTS(gru_reset_before, Gru<false>)

int main(int argc, char** argv) { return check::run(argc, argv); }
