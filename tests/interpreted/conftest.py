"""Tests of the Triton kernels on the CPU.

Triton reads TRITON_INTERPRET where it is imported, so they are for a process that has it from the
start: tests/test_triton.py makes one for each file here.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
