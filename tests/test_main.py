"""`python -m fastrnn` as a user runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn import __main__ as report


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "fastrnn"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_report_names_what_is_there_and_passes() -> None:
    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    for text in (fastrnn.__version__, torch.__version__, "CPU", "CUDA", "instructions"):
        assert text in result.stdout
    assert result.stdout.count("self-check ok") == len(report._LAYERS)
    assert "FAILED" not in result.stdout
    assert result.stdout.rstrip().splitlines()[-1].startswith("ok: ")


@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_a_backend_that_serves_nothing_has_not_passed(backend: str) -> None:
    result = run(FASTRNN_BACKEND=backend)
    assert result.returncode == 1
    refusal = f"not run: FASTRNN_BACKEND: the {backend} backend cannot serve this call"
    assert result.stdout.count(refusal) == len(report._LAYERS)
    assert "FAILED" not in result.stdout
    last = result.stdout.rstrip().splitlines()[-1]
    assert last.startswith("NOTHING COMPARED: 0 of 0 cells agree")


def test_a_cell_that_is_refused_leaves_the_others_to_judge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explain = fastrnn.explain

    def refuse_gru(module: nn.Module, *args: object, **options: object) -> object:
        if isinstance(module, fastrnn.GRU):
            raise RuntimeError("no GRU in this test")
        return explain(module, *args, **options)

    monkeypatch.setattr(fastrnn, "explain", refuse_gru)
    monkeypatch.setattr(report, "self_check", lambda module: "ok")
    assert report.main() == 0
    printed = capsys.readouterr().out
    assert "not run: no GRU in this test" in printed
    assert "ok: 8 of 8 cells agree" in printed
    assert printed.rstrip().endswith("; 3 not run")


def test_self_check_finds_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    module = report._LAYERS["gru"]
    assert report.self_check(module) == "ok"
    run_layer = report._run

    def slightly_wrong(module: nn.Module, x: torch.Tensor, dtype: torch.dtype, backend: str | None):
        results = run_layer(module, x, dtype, backend)
        return [value * 1.001 for value in results] if backend is None else results

    monkeypatch.setattr(report, "_run", slightly_wrong)
    assert report.self_check(module).startswith("FAILED: result 0 is off by")
    monkeypatch.setattr(report, "self_check", lambda module: "FAILED: of course")
    assert report.main() == 1


def test_an_error_in_a_check_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(module: nn.Module) -> str:
        raise RuntimeError("broken in this test")

    monkeypatch.setattr(report, "self_check", fail)
    assert report.main() == 1
    assert "FAILED: broken in this test" in capsys.readouterr().out
