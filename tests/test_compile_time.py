"""The script that reports compile times: it counts, it never judges a time."""

from __future__ import annotations

import pytest

from benchmarks import compile_time


@pytest.mark.compile
def test_one_operator_however_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--only", "fastrnn", "--backend", "eager", "--batch", "2", "--hidden", "3"]
    found = []
    for steps in ("4", "300"):
        assert compile_time.main([*arguments, "--steps", steps]) == 0
        row = capsys.readouterr().out.splitlines()[-1]
        assert row.startswith("| fastrnn | ")
        found.append(row.split("|")[-2])
    assert found[0] == found[1]
    assert int(found[0]) < 50


def test_rows() -> None:
    done = {"first": 3.5, "second": 0.25, "nodes": 12}
    assert compile_time.line("torch", done) == "| torch | 3.2 s | 250 ms | 12 |"
    assert "more than 60 s" in compile_time.line("torch", {"timeout": 60.0})
    assert "failed: no" in compile_time.line("torch", {"error": "no"})


def test_a_failure_of_ours_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_time, "in_a_process", lambda *_: {"timeout": 1.0})
    assert compile_time.main(["--steps", "3"]) == 1
