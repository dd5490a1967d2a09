"""A contestant in a process of its own, for settings fixed at import (FASTRNN_ISA).

`python -m benchmarks.worker THREADS` reads one JSON request per line ({"case": ..., "want": "turn"
| "check" | "digest" | "isa"}) and answers with one JSON line. The parent waits for the answer, so
that workers interleave like contestants in a process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks import verify
from benchmarks.cases import Case
from benchmarks.peers import Problem, build
from benchmarks.timing import LocalRunner, Turn


class Worker:
    """The parent's end: one child process with the given environment on top of ours."""

    def __init__(self, threads: int, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, case: Case, want: str) -> Any:
        """Sends a request and waits. Raises RuntimeError with the child's message if it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"case": case.to_dict(), "want": want}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"worker process ended with status {self._process.wait()} during {case.id}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"worker process failed on {case.id}: {answer['error']}")
        return answer[want]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class RemoteRunner:
    """A timing.Runner whose turns happen in a worker."""

    def __init__(self, worker: Worker, case: Case) -> None:
        self._worker = worker
        self._case = case

    def turn(self) -> Turn:
        return Turn(**self._worker.ask(self._case, "turn"))


def isa_name() -> str:
    """The instruction set of fastrnn's kernels here; "unknown" without the native library."""
    try:
        from fastrnn import _cpu
    except ImportError:
        return "unknown"
    isa = getattr(_cpu, "isa", "unknown")
    return str(isa() if callable(isa) else isa)


def digest(outputs: dict[str, torch.Tensor]) -> dict[str, str]:
    """A hash of every output's bits."""
    return {
        name: hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, value in outputs.items()
    }


def serve() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    current, problem, contestant, runner = None, None, None, None
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        want = request["want"]
        try:
            case = Case.from_dict(request["case"])
            if problem is None or contestant is None or runner is None or case != current:
                problem = Problem(case)
                contestant = build(case, "fastrnn", problem)
                runner, current = LocalRunner(contestant.call, contestant.context), case
            if want == "turn":
                answer: Any = vars(runner.turn())
            elif want == "check":
                truth, peer = (
                    verify.truth(case, problem),
                    verify.peer_outputs(case, problem, "fastrnn"),
                )
                answer = verify.check(contestant, truth, peer).to_dict()
            elif want == "digest":
                with contestant.context():
                    answer = digest(contestant.outputs())
            else:
                answer = isa_name()
            reply = {want: answer}
        except Exception as error:  # handed to the parent, which raises it
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
