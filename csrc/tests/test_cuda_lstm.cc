#include "cuda_cases.h"

FASTRNN_CELL_TESTS(lstm, Lstm)

int main(int argc, char** argv) { return check::run(argc, argv); }
