#!/usr/bin/env bash
# Says in one sentence what this machine lacks for a build, before anything is downloaded.
set -u
python=${PYTHON:-python3}
cxx=${CXX:-g++}

lacking() {
  echo "fastrnn cannot be built here: $1" >&2
  exit 1
}

command -v "$python" > /dev/null || lacking "no '$python' on PATH; install Python 3.10 or newer, or name one with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  lacking "'$python' is $("$python" -V 2>&1), 3.10 or newer is needed; name another with PYTHON=..."
"$python" -c 'import venv, ensurepip' 2> /dev/null ||
  lacking "'$python' cannot make virtual environments; install its venv package (Debian, Ubuntu: python3-venv)"
[ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
  lacking "Python.h of '$python' is missing; install its development package (Debian, Ubuntu: python3-dev)"
command -v "$cxx" > /dev/null || lacking "no '$cxx' on PATH; install g++ 10 or newer, or name a C++17 compiler with CXX=..."
echo 'int main() { if constexpr (__cplusplus >= 201703L) return 0; else return 1; }' |
  "$cxx" -std=c++17 -x c++ -fsyntax-only - 2> /dev/null ||
  lacking "'$cxx' does not compile C++17; g++ 10 or newer is needed, or name another with CXX=..."
