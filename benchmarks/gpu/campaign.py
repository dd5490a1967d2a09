"""The driver: stages in the order of their value, each in a process of its own with a time limit.

state.json holds what became of each. A stage that is complete (or complete with red results) is not
run again unless forced; a partial one goes on where it was. A stage whose process says that the
device is lost to it is started again, and leaves out what killed it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu.stage import (
    COMPLETE,
    MARK,
    PARTIAL,
    RED,
    RESTART,
    TESTS,
    load,
    save,
    say,
)

FILE = "state.json"
CUT = "cut.json"
GRACE = 20.0  # seconds after its deadline until a stage is ended
LEAST = 15.0  # with less time left no stage is started
RESTARTS = 4
OVERRUN = 1000
STATUS = {
    COMPLETE: "complete",
    RED: "red",
    PARTIAL: "partial",
    RESTART: "lost the device",
    OVERRUN: "out of time",
}
DONE = ("complete", "red")
# Times of several of these are not one table.
PLACE = ("device", "sms", "cuda", "cudnn", "fastrnn", "torch", "triton")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A request to end ends the stage that is running too, as Ctrl-C does."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Stage:
    """seconds: its own limit. always: cheap, and run on whatever there is. gpu: needs one.

    needs: a stage without which this one is pointless. valid: whether an earlier run still holds.
    resumable: it notes what it is at, so that it is started again when its process dies.
    """

    name: str
    seconds: float
    text: str
    needs: str = ""
    always: bool = False
    gpu: bool = True
    resumable: bool = False
    valid: Callable[[], bool] = lambda: True


class Runner(Protocol):
    def __call__(self, stage: Stage, seconds: float) -> int | None:
        """Runs a stage; its exit status, or None if it had to be ended."""
        ...


class ProcessRunner:
    """`python -m benchmarks.gpu --inside STAGE`, ended with all its children when it overruns."""

    def __init__(self, results: Path, more: Sequence[str] = ()) -> None:
        self._results, self._more = results, more

    def command(self, stage: Stage, seconds: float) -> list[str]:
        where = ["--results", str(self._results), "--seconds", f"{seconds:.0f}"]
        inside = [sys.executable, "-m", "benchmarks.gpu", "--inside", stage.name]
        return [*inside, *where, *self._more]

    def __call__(self, stage: Stage, seconds: float) -> int | None:
        root = Path(__file__).resolve().parent.parent.parent
        command = self.command(stage, seconds)
        child = subprocess.Popen(command, cwd=root, start_new_session=True)
        try:
            return child.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                self._forgive()

    def _forgive(self) -> None:
        """What was running when time was over is run again, once: then it is taken to hang."""
        cut = load(self._results / CUT).get("running", [])
        mark, tests = self._results / MARK, self._results / TESTS
        if mark.exists() and mark.read_text().strip() not in cut:
            cut.append(mark.read_text().strip())
            mark.unlink()
        kept = {}
        for name, each in load(tests).get("tests", {}).items():
            if each["outcome"] == "running" and name not in cut:
                cut.append(name)
            else:
                kept[name] = each
        if tests.exists():
            save(tests, {"tests": kept})
        save(self._results / CUT, {"running": cut})


class Campaign:
    """What was done, and what is to do."""

    def __init__(
        self,
        stages: Sequence[Stage],
        results: Path,
        runner: Runner,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stages, self.path, self._runner, self._now = stages, results / FILE, runner, now
        self.state: dict[str, Any] = load(self.path) or {"schema": 1, "stages": {}}

    def status(self, name: str) -> str:
        return str(self.state["stages"].get(name, {}).get("status", "not run"))

    def other_place(self, environment: dict[str, Any] | None) -> str:
        """The device and versions of the results so far, where they are others; else empty."""
        held = self.state.get("environment")
        if held is None or environment is None:
            return ""
        differ = [name for name in PLACE if held.get(name) != environment.get(name)]
        return ", ".join(
            f"{name} {held.get(name)} (here {environment.get(name)})" for name in differ
        )

    def to_do(self, stage: Stage, force: bool) -> bool:
        return force or stage.always or self.status(stage.name) not in DONE or not stage.valid()

    def run(
        self, budget: float, force: bool = False, environment: dict[str, Any] | None = None
    ) -> bool:
        """Runs what is to do within `budget` seconds; True if every stage is complete and green."""
        if environment is not None:
            self.state["environment"] = environment
        end = self._now() + budget
        for number, stage in enumerate(self.stages, 1):
            head = f"=== {number}/{len(self.stages)} {stage.name}: "
            if not self.to_do(stage, force):
                say(f"{head}{self.status(stage.name)} before")
                continue
            if stage.needs and self.status(stage.needs) not in (*DONE, "not run"):
                self._put(stage, "skipped", 0.0, f"{stage.needs} is {self.status(stage.needs)}")
                say(f"{head}left out, {stage.needs} is {self.status(stage.needs)}")
                continue
            left = end - self._now()
            if left < LEAST:
                say(f"{head}no time left")
                continue
            say(f"{head}{stage.text} ({min(stage.seconds, left):.0f} s at most, {left:.0f} s left)")
            self._one(stage, end)
        return all(self.status(stage.name) == "complete" for stage in self.stages)

    def _one(self, stage: Stage, end: float) -> None:
        begin, code = self._now(), RESTART
        for _ in range(RESTARTS):
            # The grace after a stage's deadline is inside the budget.
            seconds = min(stage.seconds - (self._now() - begin), end - self._now() - GRACE / 2)
            if seconds <= 0:
                code = PARTIAL
                break
            found = self._runner(stage, seconds)
            code = OVERRUN if found is None else found
            died = code == RESTART or (found is not None and found < 0)
            if not (stage.resumable and died):
                break
        status = STATUS.get(code, "failed")
        self._put(stage, status, self._now() - begin, f"exit status {code}")
        say(f"    {stage.name}: {status}, {self._now() - begin:.0f} s")

    def _put(self, stage: Stage, status: str, seconds: float, message: str) -> None:
        before = self.state["stages"].get(stage.name, {})
        self.state["stages"][stage.name] = {
            "status": status,
            "seconds": round(seconds + before.get("seconds", 0.0), 1),
            "runs": before.get("runs", 0) + (status != "skipped"),
            "message": message,
        }
        save(self.path, self.state)
