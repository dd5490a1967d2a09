// test_math.cc with AVX2's flags (CMakeLists.txt), for machines that have no more.
#include "test_math.cc"
