"""`python -m fastrnn` as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn import __main__ as report

# The package as it is where the native library was not built.
WITHOUT = (
    "import runpy, sys; sys.modules['fastrnn._cpu'] = None; sys.argv = ['fastrnn']; "
    "runpy.run_module('fastrnn', run_name='__main__', alter_sys=True)"
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(command or ("-m", "fastrnn"))],
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
    assert report.main([]) == 0
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
    assert report.main([]) == 1


def test_an_error_in_a_check_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(module: nn.Module) -> str:
        raise RuntimeError("broken in this test")

    monkeypatch.setattr(report, "self_check", fail)
    assert report.main([]) == 1
    assert "FAILED: broken in this test" in capsys.readouterr().out


def test_without_the_native_library_nothing_has_passed() -> None:
    result = run("-c", WITHOUT, FASTRNN_BACKEND="")
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stdout.rstrip().splitlines()
    assert result.stdout.count("reference  not compared") == len(report._LAYERS)
    nothing = next(line for line in lines if line.startswith("NOTHING COMPARED: 0 of 0"))
    assert nothing.endswith(f"; {len(report._LAYERS)} not compared")
    assert lines[lines.index(nothing) + 1].startswith("FAILED: the native library does not load: ")
    assert "self-check" not in result.stdout


def test_a_backend_that_was_asked_for_needs_no_native_library() -> None:
    result = run("-c", WITHOUT, FASTRNN_BACKEND="reference")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.rstrip().splitlines()[-1].startswith("ok: ")


def test_the_source_tree_is_named_with_the_way_out(tmp_path: Path) -> None:
    assert report._source_tree(tmp_path) == ""
    (tmp_path / "setup.py").touch()
    assert report._source_tree(tmp_path) == ""
    (tmp_path / "csrc").mkdir()
    said = report._source_tree(tmp_path)
    for part in (
        f"{tmp_path} is the source tree, not the installed package",
        "cd ..",
        "make build",
    ):
        assert part in said


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        report.main(["--verbose"])
    assert end.value.code == 2
    assert "unrecognized arguments: --verbose" in capsys.readouterr().err


def test_the_stub_names_what_the_library_has() -> None:
    from fastrnn import _cpu

    stub = Path(fastrnn.__file__).with_name("_cpu.pyi").read_text()
    named = set(re.findall(r"^(?:def )?(\w+)[(:]", stub, re.MULTILINE))
    assert named == {name for name in vars(_cpu) if not name.startswith("__")}
