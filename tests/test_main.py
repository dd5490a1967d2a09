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


def test_a_backend_that_cannot_run_is_a_failure() -> None:
    result = run(FASTRNN_BACKEND="cuda")
    assert result.returncode == 1
    assert "FAILED: FASTRNN_BACKEND: the cuda backend cannot serve this call" in result.stdout


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
