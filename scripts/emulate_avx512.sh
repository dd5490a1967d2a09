#!/usr/bin/env bash
# usage: emulate_avx512.sh PYTHON [arguments of pytest]
# The kernels for AVX-512, with and without BF16, as code for AVX2 (csrc/tests/emulated/avx512.h), under the C++ tests and the Python
# tests of the CPU library. A copy of the sources holds the module, so that the library in place stays what it is.
set -euo pipefail
python=$1
shift
tools=$(cd "$(dirname "$python")" && pwd)
tree=build/emulated-avx512
sources=$tree/sources

"$tools/cmake" -S . -B "$tree" -G Ninja "-DCMAKE_MAKE_PROGRAM=$tools/ninja" "-DPython_EXECUTABLE=$tools/python" \
  "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" "-DFASTRNN_OUTPUT_DIR=$PWD/$sources/fastrnn" \
  -DFASTRNN_EMULATE_AVX512=ON -DFASTRNN_BUILD_TESTS=ON -DFASTRNN_CUDA=off > /dev/null
rm -rf "$sources"
mkdir -p "$sources"
cp -r fastrnn tests benchmarks examples pyproject.toml "$sources"
rm -f "$sources"/fastrnn/*.so

programs=()
for source in csrc/tests/test_*.cc; do
  name=$(basename "$source" .cc)
  if [[ $name != test_cuda_* ]]; then programs+=("$name"); fi
done
"$tools/cmake" --build "$tree" --target _cpu "${programs[@]}"
"$tools/ctest" --test-dir "$tree" --output-on-failure --exclude-regex '^test_cuda_' --parallel "$(nproc)"

cd "$sources"
files=()
for file in tests/test_*.py; do
  if [[ ! $file =~ _(benchmark|cuda|descriptions|documented|examples|gpu|triton) ]]; then files+=("$file"); fi
done
# The set with BF16 is the one that is chosen; without it only products of bfloat16 differ.
"$tools/python" -m pytest -n "$(nproc)" --dist worksteal -m "not wheel and not slow" "${files[@]}" "$@"
FASTRNN_ISA=avx512 "$tools/python" -m pytest -n "$(nproc)" --dist worksteal -m "not slow" \
  tests/test_kernels.py tests/test_kernels_bits.py "$@"
