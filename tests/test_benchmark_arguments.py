"""Bad arguments and files of the benchmark programs: one line, before anything is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from benchmarks import __main__ as program
from benchmarks import driver, models, peers, plot, report, schema
from benchmarks.cases import Case
from benchmarks.gpu import __main__ as campaign
from benchmarks.gpu import device
from benchmarks.schema import Results
from tests.campaigns import AT


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls a program's main, which has to end with status 2; what it says."""

    def call(module: ModuleType, *arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            module.main([str(each) for each in arguments])
        assert end.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise AssertionError("measured before the arguments were checked")

    monkeypatch.setattr(driver, "run", run)
    monkeypatch.setattr(models, "verify", run)


# ---- where results go ------------------------------------------------------------------------


@pytest.mark.parametrize("module", [program, models], ids=["cases", "models"])
@pytest.mark.parametrize(
    "out, words",
    [
        ("result.csv", "expected a name that ends in .json"),
        ("result", "expected a name that ends in .json"),
        ("folder.json", "is a folder or read-only"),
        ("beside.json", "beside.csv is a folder or read-only"),
        ("file/result.json", "nothing can be written in its folder"),
    ],
)
def test_a_bad_out_is_found_at_once(
    module: ModuleType, out: str, words: str, tmp_path: Path, refused: Any
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "beside.csv").mkdir()
    (tmp_path / "file").write_text("")
    said = refused(module, "--out", tmp_path / out)
    assert f"--out {'is ' if 'expected' in words else ''}{tmp_path / out}" in said
    assert words in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--verify-only"], "--plot draws times and --verify-only takes none"),
        (["--only", "lstm/step"], "--plot draws cases of the grid, and --only leaves none"),
    ],
)
def test_a_plot_without_its_numbers_is_refused_at_once(
    arguments: list[str], words: str, refused: Any
) -> None:
    assert words in refused(program, "--plot", *arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--threads", "0"], "--threads is 0; expected at least 1"),
        (["--seconds", "0"], "--seconds is 0.0; expected a number above 0"),
        (["--seconds", "nan"], "--seconds is nan; expected a number above 0"),
    ],
)
def test_numbers_of_the_models(arguments: list[str], words: str, refused: Any) -> None:
    assert words in refused(models, *arguments)


# ---- files that are read ---------------------------------------------------------------------

WHOLE = Results({**AT}, {"verify_only": False}).to_dict()
BROKEN = {
    "not JSON": ("{", "JSONDecodeError"),
    "not text": (b"\xff\xfe\x00", "UnicodeDecodeError"),
    "a list": ([1], "AttributeError"),
    "another schema": ({**WHOLE, "schema": 0}, "have schema 0, expected 1"),
    "another kind": ({**WHOLE, "kind": "models"}, "of kind 'models', expected 'cases'"),
    "no records": ({k: v for k, v in WHOLE.items() if k != "records"}, "KeyError: 'records'"),
    "no place": ({**WHOLE, "environment": {"cpu": "A"}}, "the environment has no cores, threads"),
    "empty records": ({**WHOLE, "records": [{}]}, "KeyError"),
}


@pytest.mark.parametrize("module", [report, plot, campaign], ids=["report", "plot", "gpu --plot"])
@pytest.mark.parametrize("content, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(
    module: ModuleType, content: Any, words: str, tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / "grid.json"
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(b"{" if content == "{" else raw)
    arguments = ["--plot", "--results", tmp_path] if module is campaign else [path]
    said = refused(module, *arguments)
    assert str(path) in said
    assert words in said


@pytest.mark.parametrize("module", [report, plot, campaign], ids=["report", "plot", "gpu --plot"])
def test_a_file_that_is_not_there_is_named(
    module: ModuleType, tmp_path: Path, refused: Any
) -> None:
    arguments = ["--plot", "--results"] if module is campaign else []
    name = tmp_path if module is campaign else tmp_path / "grid.json"
    assert f"No such file or directory: '{tmp_path / 'grid.json'}'" in refused(
        module, *arguments, name
    )


@pytest.mark.parametrize("module", [plot, campaign], ids=["plot", "gpu --plot"])
def test_results_without_times_draw_nothing(
    module: ModuleType, tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(WHOLE))
    arguments = ["--plot", "--results", tmp_path] if module is campaign else [path]
    said = refused(module, *arguments)
    assert str(path) in said
    assert "results hold n" in said


def test_files_without_a_kind_are_of_cases() -> None:
    old = {key: value for key, value in WHOLE.items() if key != "kind"}
    assert Results.from_dict(old).to_dict() == WHOLE


# ---- what is not there -----------------------------------------------------------------------


def test_stages_without_a_gpu_ask_for_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "no_gpu", lambda: "no GPU campaign: of course")
    assert campaign.main(["--stage", "report", "--stage", "refit"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("no GPU campaign: of course; report and refit need none if --results ")
    assert campaign.main(["--stage", "probes"]) == 2
    assert capsys.readouterr().err == "no GPU campaign: of course\n"


@pytest.mark.parametrize(
    "module, name, arguments",
    [
        (program, "numpy", []),
        (program, "tqdm", []),
        (program, "matplotlib", ["--plot"]),
        (campaign, "matplotlib", ["--plot", "--results", "nowhere"]),
    ],
)
def test_a_missing_package_is_named(
    module: ModuleType,
    name: str,
    arguments: list[str],
    refused: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    said = refused(module, *arguments)
    assert f"{name} is not installed; pip install 'fastrnn[bench]'" in said


def test_without_onnx_runtime_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # this one measures
    assert peers.onnx_missing() == ""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    case = Case("rnn", "forward", 3, 2, 5, contestants=("fastrnn", "torch", "onnx"))
    assert driver.without(case, "onnx").contestants == ("fastrnn", "torch")
    monkeypatch.setattr(driver.roofline, "measure", lambda _: driver.roofline.Roofline(
        1, 1e11, "a test", {1 << 20: 1e10}
    ))  # fmt: skip
    results = driver.run([case], driver.quick_settings(1, True), None, lambda *_: None)
    [record] = results.records
    assert record.ok, record.error
    assert set(record.checks) == {"fastrnn"}
    why = "ONNX Runtime, onnxruntime not installed; pip install 'fastrnn[bench]'"
    assert f"\nleft out: {why}\n" in report.header(results)
    assert schema.Results.from_dict(results.to_dict()).settings["left_out"] == [why]
