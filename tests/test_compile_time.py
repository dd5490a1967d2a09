"""The script that reports compile times: it counts, it never judges a time."""

from __future__ import annotations

import pytest
import torch

from benchmarks import compile_time


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_one_operator_however_many_steps() -> None:
    found = []
    for steps in (4, 300):
        torch._dynamo.reset()
        found.append(compile_time.measure("fastrnn", steps, 2, 3, "eager")["nodes"])
    assert found[0] == found[1] < 50
    torch._dynamo.reset()
    assert compile_time.measure("torch", 300, 2, 3, "eager")["first"] > 0


def test_a_row_from_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "4", "--batch", "2", "--hidden", "3", "--backend", "eager"]
    assert compile_time.main([*small, "--only", "fastrnn"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| fastrnn | ")
    bad = [*small[:-1], "no_such_backend", "--only", "fastrnn"]
    assert compile_time.main(bad) == 1
    assert "| fastrnn | failed: InvalidBackend: " in capsys.readouterr().out


def test_rows() -> None:
    done = {"first": 3.5, "second": 0.25, "nodes": 12}
    assert compile_time.line("torch", done) == "| torch | 3.2 s | 250 ms | 12 |"
    assert "more than 60 s" in compile_time.line("torch", {"timeout": 60.0})
    assert "failed: no" in compile_time.line("torch", {"error": "no"})


def test_a_failure_is_told_by_its_exception_not_by_a_hint() -> None:
    told = (
        "/a/b.py:3: UserWarning: old\nTraceback (most recent call last):\n  File x\n"
        "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:\n{}"
        "\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace\n"
    )
    inner = "RuntimeError: no compiler"
    assert compile_time.failure(told.format(inner), 1) == inner
    outer = "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:"
    assert compile_time.failure(told.format(""), 1) == outer
    assert compile_time.failure("killed\n", -9) == "killed"
    assert compile_time.failure("", -9) == "no result, exit status -9"


@pytest.mark.parametrize("flag", ["steps", "batch", "hidden", "timeout"])
def test_sizes_are_checked(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compile_time.main([f"--{flag}", "0"])
    assert f"--{flag} is 0" in capsys.readouterr().err


def test_a_failure_of_ours_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_time, "in_a_process", lambda *_: {"timeout": 1.0})
    assert compile_time.main(["--steps", "3"]) == 1
