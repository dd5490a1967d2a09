"""From a campaign's results to what dispatch on a GPU goes by, with results made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
import fastrnn
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, stage, table
from benchmarks.gpu.stage import Stop
from benchmarks.schema import Results
from fastrnn import dispatch
from fastrnn.gpu import times
from tests.campaigns import AT, timed
from tests.gpu import test_gpu_modules as on_modules


def outcomes_of(*, broken: str = "", **modules: str) -> dict[str, Any]:
    """tests.json of modules on both backends, and of one layer test."""
    tests = {"tests/gpu/test_gpu_layer.py::test_layer[case]": "passed"}
    for name, outcome in modules.items():
        for dtype in ("bfloat16", "float32"):
            module = f"{name.replace('_', '-')}-torch.{dtype}"
            for call in ("plain", "reset"):
                tests[f"tests/gpu/test_gpu_modules.py::test_module[{module}-{call}]"] = outcome
                tests[f"tests/gpu/test_gpu_triton.py::test_module[{call}-{module}]"] = "passed"
    if broken:
        tests[broken] = "failed"
    return {key: {"outcome": value, "message": "", "seconds": 1} for key, value in tests.items()}


def test_what_tests_verify() -> None:
    tests = outcomes_of(
        lstm="passed", lstm_zoneout="passed", gru_reset_before="skipped", rhn_deep="failed"
    )
    found = table.verified(tests)
    assert [each for each in found if each[0] == "cuda"] == [
        ["cuda", "lstm", "bfloat16"], ["cuda", "lstm", "tf32"],
        ["cuda", "lstm+regularisers", "bfloat16"], ["cuda", "lstm+regularisers", "tf32"],
    ]  # fmt: skip
    assert ["triton", "gru_reset_before", "tf32"] in found
    assert ["triton", "rhn", "bfloat16"] in found
    one = "tests/gpu/test_gpu_modules.py::test_module[lstm-torch.bfloat16-lengths]"
    assert ["cuda", "lstm", "bfloat16"] not in table.verified(
        outcomes_of(broken=one, lstm="passed")
    )
    bits = "tests/gpu/test_gpu_runtime.py::test_the_same_bits_a_hundred_times[gru-]"
    found = table.verified(outcomes_of(broken=bits, lstm="passed"))
    assert {each[0] for each in found} == {"triton"}
    assert table.verified({}) == []


@pytest.mark.parametrize("name", on_modules.MODULES)
def test_families_are_those_of_dispatch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    honest = dispatch.decide
    monkeypatch.setattr(dispatch, "decide", lambda p, *a: seen.append(p) or honest(p, *a))
    fastrnn.explain(on_modules.MODULES[name](), torch.zeros(6, 5, on_modules.I))
    assert table.family_of(name) == times.family(seen[0])


def test_a_campaign_writes_what_dispatch_goes_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has steps to fit the cost model to."""
    results = Results(AT, {"verify_only": False})
    record = timed(cases.GRIDS["grid-16bit"]()[0], fastrnn=1e-3, torch=3e-3)
    record.details = {"us_per_step": {"fastrnn": 0.9, "torch": -1.0}}  # a slope that is noise
    red = timed(cases.GRIDS["grid-16bit"]()[4], fastrnn=1e-3, torch=3e-3)
    red.error = "off"
    loop = timed(cases.GRIDS["grid-loops"]()[1], fastrnn=1e-3, fastrnn_triton=2e-3, loop=5e-2)
    results.records = [record, red, loop]
    results.save(tmp_path / "grid.json")
    stage.save(tmp_path / "tests.json", {"tests": outcomes_of(lstm="passed")})
    held = tmp_path / "table.json"
    held.write_text(times.TABLE.read_text())
    monkeypatch.setattr(table, "TABLE", held)
    monkeypatch.setattr(table.write, "__defaults__", (held,))
    for _ in range(2):  # the second takes the place of the first
        assert command.inside("refit", tmp_path, Stop(60), write=True) == 3
    found = times.Table(json.loads(held.read_text()))
    (entry,) = found.data["devices"]
    assert entry == json.loads((tmp_path / "dispatch.json").read_text())
    assert entry["source"] == "A GPU, 2000-01-01 00:00 UTC"
    assert entry["rows"] == [
        {
            "cell": "lstm", "format": "bfloat16", "training": False, "directions": 1,
            "packed": False, "depth": 1, "T": 1024, "N": 16, "H": 768,
            "us": {"cuda": 0.9, "torch": 2.9297}, "call": {"cuda": 78.4},
        },
        {
            "cell": "bnlstm", "format": "bfloat16", "training": True, "directions": 1,
            "packed": False, "depth": 1, "T": 100, "N": 128, "H": 512,
            "us": {"cuda": 10.0, "triton": 20.0, "reference": 500.0}, "call": {},
        },
    ]  # fmt: skip
    at = times.Device("A GPU", 132)
    assert found.verified(at, "cuda", "lstm", "bfloat16")
    assert found.entry(times.Device("A GPU", 66)) == {}
    monkeypatch.setattr(times, "_table", [found])
    p = dispatch.Problem("lstm", "cuda", torch.bfloat16, False, 1024, 16, 768, 768, 0, 1, 1)
    ours = times.estimate("cuda", p, at)
    assert ours is not None
    assert (str(ours), ours.source) == ("measured 0.9 us a step", entry["source"])
