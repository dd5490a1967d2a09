"""Stages `tests` and `sanitize`: tests/gpu under pytest, test by test resumable.

Every test's outcome is written as it ends. A test that has one is not run again; the one that was
running when a process died counts as failed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.stage import (
    COMPLETE,
    PARTIAL,
    RED,
    RESTART,
    STICKY,
    TESTS,
    Stop,
    load,
    save,
    say,
)

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "tests" / "gpu"
SANITIZER = FOLDER / "test_sanitizer.py"


class Recorder:
    """A pytest plugin: skips what is done, writes what ends, stops in time."""

    def __init__(self, path: Path, stop: Stop) -> None:
        self._path, self._stop = path, stop
        self.outcomes: dict[str, dict[str, Any]] = load(path).get("tests", {})
        self.stopped = self.broken = False
        lost = [name for name, each in self.outcomes.items() if each["outcome"] == "running"]
        for name in lost:
            self._put(name, "failed", 0.0, "the process did not survive this test")

    def _put(self, name: str, outcome: str, seconds: float, message: str = "") -> None:
        self.outcomes[name] = {
            "outcome": outcome,
            "seconds": round(seconds, 3),
            "message": message[-2000:],
        }
        save(self._path, {"tests": self.outcomes})

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        done = [item for item in items if item.nodeid in self.outcomes]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self.outcomes]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        if self.broken or self._stop:
            self.stopped = not self.broken
            item.session.shouldstop = "the device is lost" if self.broken else "time is over"
            return True
        self._put(item.nodeid, "running", 0.0)
        return None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        text = report.longrepr[-1] if report.outcome == "skipped" else report.longreprtext
        self._put(report.nodeid, report.outcome, report.duration, str(text))
        self.broken |= report.outcome == "failed" and any(sign in text for sign in STICKY)


def run(paths: list[Path], results: Path, stop: Stop) -> int:
    """The stage's exit status: complete, red, partial, or to be started again."""
    recorder = Recorder(results / TESTS, stop)
    # Whatever else is installed there: no plugins of others, and their warnings are no errors.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    ignored = [] if SANITIZER in paths else [f"--ignore={SANITIZER}"]
    status = pytest.main([*options, *ignored, *map(str, paths)], plugins=[recorder])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED,
                      pytest.ExitCode.NO_TESTS_COLLECTED, pytest.ExitCode.INTERRUPTED):  # fmt: skip
        return int(status) + 20
    # pytest says the same of a file that cannot be collected as of our own stop.
    cut = status == pytest.ExitCode.INTERRUPTED and not (recorder.broken or recorder.stopped)
    # Both stages keep their outcomes in one file.
    mine = {
        name: each
        for name, each in recorder.outcomes.items()
        if (SANITIZER.name in name) == (SANITIZER in paths)
    }
    if cut or not (mine or recorder.stopped):
        return int(status) + 20
    counts: dict[str, int] = {}
    for each in recorder.outcomes.values():
        counts[each["outcome"]] = counts.get(each["outcome"], 0) + 1
    say(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    if recorder.broken:
        return RESTART
    if recorder.stopped:
        return PARTIAL
    failed = any(each["outcome"] == "failed" for each in mine.values())
    return RED if failed else COMPLETE
