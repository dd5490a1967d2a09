"""Peak memory of one training step, the same measure for every contestant.

Each measurement is a process of its own, forked from a parent that has imported everything and
computed nothing. It builds the module, the input and the output gradients, takes one training step
of a tiny problem, with its own module and torch.nn's (thread teams, library start-up), hands freed
memory back to the system, notes the resident set, resets the kernel's high-water mark (VmHWM),
takes one full training step and reports by how much the high-water mark exceeded what was resident
before. So the number holds the outputs, everything saved for backward, workspaces, packed weights
and gradients, native buffers included.

mallopt fixes malloc's mmap threshold: else a threshold that adapts keeps freed blocks resident and
the number depends on history. Resolution is about 1 MiB (allocator pages, lazily touched code);
smaller differences mean nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case

RESOLUTION = 1 << 20
M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD_BYTES = 128 << 10


def measure(cases: Sequence[Case], threads: int) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yields each case with {contestant: peak growth in bytes}, or with {"error": text}."""
    command = [sys.executable, "-m", "benchmarks.memory", str(threads)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for case in cases:
            process.stdin.write(json.dumps(case.to_dict()) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            yield case, json.loads(line) if line else {"error": "the measuring process ended"}
            if not line:
                return


def status_bytes(key: str) -> int:
    """A field of /proc/self/status in bytes, such as VmRSS or VmHWM."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {key}: memory can only be measured on Linux")
    return int(found.group(1)) * 1024


def peak_growth(case: Case, name: str, threads: int) -> int:
    """Runs in a fresh child: bytes by which one training step of `name` raises the resident set."""
    import torch

    from benchmarks.peers import build

    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    torch.set_num_threads(threads)
    tiny = replace(case, T=2, N=min(2, case.N), H=32, I=0, proj=0)
    # A module of ours may hand the step over to torch's kernel.
    for each in dict.fromkeys((name, "torch")):
        build(tiny, each).call()
    contestant = build(case, name)
    libc.malloc_trim(0)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    contestant.call()
    return max(0, status_bytes("VmHWM") - before)


def in_child(case: Case, name: str, threads: int) -> dict[str, Any]:
    """Forks, measures in the child and hands the answer back through a pipe."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                answer: dict[str, Any] = {"bytes": peak_growth(case, name, threads)}
            except Exception as error:  # reported by the parent, which raises it
                answer = {"error": f"{type(error).__name__}: {error}"}
            os.write(writer, json.dumps(answer).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"error": f"child ended with status {status}"}


def serve() -> None:
    import torch  # noqa: F401

    import fastrnn  # noqa: F401 - imported once here, so that children start with it

    threads = int(sys.argv[1])
    for line in sys.stdin:
        case = Case.from_dict(json.loads(line))
        answers = {name: in_child(case, name, threads) for name in case.contestants}
        failed = {name: each["error"] for name, each in answers.items() if "error" in each}
        reply = (
            {"error": str(failed)}
            if failed
            else {name: each["bytes"] for name, each in answers.items()}
        )
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
