#!/usr/bin/env bash
# usage: sanitize.sh CMAKE SANITIZERS
# Builds the C++ tests of csrc/tests with the named sanitizers (address,undefined or thread) and runs them.
set -euo pipefail
cmake=$1
sanitizers=$2
tools=$(cd "$(dirname "$cmake")" && pwd)
tree=build/sanitize-${sanitizers//,/-}

# Instruction sets that the machine cannot run would only be compiled.
can() { grep -qw "$1" /proc/cpuinfo; }
isas=baseline
if can avx2; then isas="$isas;avx2"; fi
if can avx512vl; then isas="$isas;avx512"; fi
if can avx512_bf16; then isas="$isas;avx512bf16"; fi

"$cmake" -S . -B "$tree" -G Ninja "-DCMAKE_MAKE_PROGRAM=$tools/ninja" -DFASTRNN_BUILD_MODULE=OFF \
  -DFASTRNN_BUILD_TESTS=ON "-DFASTRNN_ISAS=$isas" "-DFASTRNN_SANITIZE=$sanitizers" > /dev/null
"$cmake" --build "$tree" --target fastrnn_tests

# g++ 12 aligns the stack frames that it keeps to see a use after return to 32 bytes, and then moves 64 at a time to and
# from them as if aligned.
frames=1
if can avx512vl; then frames=0; fi
export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=$frames:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
run=()
# ThreadSanitizer needs the memory layout that newer kernels randomise too far for older runtimes.
if [ "$sanitizers" = thread ] && setarch -R true 2> /dev/null; then run=(setarch -R); fi
"${run[@]}" "$tools/ctest" --test-dir "$tree" --output-on-failure --parallel "$(nproc)"
