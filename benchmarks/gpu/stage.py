"""What the body of a stage needs: when to stop, where results go, how to say something."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Exit statuses of a stage's process; any other is a failure. RED: through, but something was wrong.
COMPLETE, PARTIAL, RESTART, RED = 0, 10, 11, 12
# What an error says after which nothing else works in a process.
STICKY = ("CUDA error", "AcceleratorError", "illegal memory access")
# Among the results: the outcome of each test, and the case that the grid is at.
TESTS, MARK = "tests.json", "running.txt"


class Wrong(RuntimeError):
    """A stage is through, and what it tried gave a wrong result."""


class Stop:
    """The deadline of a stage; a body asks between two parts of its work."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self._now())

    def __bool__(self) -> bool:
        return self.left() <= 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load(path: Path) -> Any:
    """A JSON file; {} if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, data: Any) -> None:
    """Atomically: a run that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, path)
