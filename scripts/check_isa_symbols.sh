#!/usr/bin/env bash
# usage: check_isa_symbols.sh NM OBJECT...
# An object compiled for AVX-512 must not define a mergeable (weak) symbol under a name that another
# object may define too: the linker keeps one copy for everybody, and an older CPU would meet it.
# Everything such an object emits has to carry its instruction set's namespace, fastrnn::isa_<name>.
# (DW.ref.* are pointers to the exception personality, data without instructions.)
set -euo pipefail
nm=$1
shift
bad=$("$nm" --demangle --defined-only "$@" |
  grep -E '^[0-9a-f]+ [WVu] ' | grep -vE 'fastrnn::isa_| DW\.ref\.' | sort -u || true)
if [ -n "$bad" ]; then
  echo "These symbols are shared between instruction sets; move them into the FASTRNN_ISA namespace or inline them:" >&2
  echo "$bad" >&2
  exit 1
fi
echo "no shared symbols in $# objects"
