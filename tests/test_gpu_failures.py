"""What becomes of the GPU campaign when a stage fails, is cut off or meets another machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build, campaign, device, probes
from benchmarks.gpu.stage import COMPLETE, PARTIAL, RED, Stop, load, save
from tests.campaigns import AT

ROOT = Path(__file__).resolve().parent.parent
SUITE = (
    "import sys; from pathlib import Path; from benchmarks.gpu import suite; "
    "from benchmarks.gpu.stage import Stop; here = Path(sys.argv[1]); "
    "sys.exit(suite.run([here / 'tests'], here, Stop(60)))"
)
DRIVER = """
import sys
from pathlib import Path
from benchmarks.gpu.campaign import Campaign, ProcessRunner, Stage, ended_by_signals
class Sleeps(ProcessRunner):
    def command(self, stage, seconds):
        write = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'))"
        return [sys.executable, "-c", write + "; time.sleep(60)", str(self._results / "pid")]
here = Path(sys.argv[1])
with ended_by_signals():
    Campaign([Stage("one", 50, "")], here, Sleeps(here)).run(100)
"""


def test_tests_that_cannot_be_collected_are_no_complete_stage(tmp_path: Path) -> None:
    """In processes of their own: pytest inside pytest."""
    (tmp_path / "tests").mkdir()

    def go() -> int:
        words = [sys.executable, "-c", SUITE, str(tmp_path)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode

    assert go() not in campaign.STATUS  # no test at all: "failed"
    (tmp_path / "tests" / "test_one.py").write_text("def test_one(): pass\n")
    other = tmp_path / "tests" / "test_other.py"
    other.write_text("import nothing_of_this_name\n")
    assert go() not in campaign.STATUS
    other.unlink()
    assert go() == COMPLETE
    assert go() == COMPLETE  # with nothing left to run


def test_probes_that_are_cut_off_keep_what_they_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(words: list[str], **_: Any) -> Any:
        if words == ["compile"]:
            return None
        text = b'{"probe": "device", "ok": true, "message": "", "sms": 132}\n{"probe": "hop_fl'
        raise subprocess.TimeoutExpired(words, 60, output=text)

    monkeypatch.setattr(probes, "ROOT", tmp_path)
    monkeypatch.setattr(probes.subprocess, "run", run)
    monkeypatch.setattr(probes, "compile_command", lambda *_: ["compile"])
    monkeypatch.setattr(probes, "ceilings", lambda *_: {})
    for name, value in (("describe", AT), ("architecture", "90a")):
        monkeypatch.setattr(device, name, lambda value=value: value)
    monkeypatch.setattr(command.shutil, "which", lambda name: "nvcc")
    assert command.inside("probes", tmp_path, Stop(60)) == PARTIAL
    found = load(tmp_path / "probes.json")
    assert [each["probe"] for each in found["probes"]] == ["device"]
    assert found["environment"]["device"] == "A GPU"
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    assert command.inside("probes", tmp_path, Stop(60)) not in (COMPLETE, RED)  # tried again


def test_a_campaign_that_is_ended_ends_its_stage(tmp_path: Path) -> None:
    """SIGTERM is what `timeout` and batch systems send; a stage has a process group of its own."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], cwd=ROOT)
    mark, pid = tmp_path / "running.txt", tmp_path / "pid"
    try:
        end = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        mark.write_text("a case")
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(30) == 128 + signal.SIGTERM
    finally:
        driver.kill()
        driver.wait()
    assert not mark.exists()  # it is run again
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_results_of_another_machine_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {**AT, "torch": "2.99"}
    monkeypatch.setattr(device, "no_gpu", lambda: "")
    monkeypatch.setattr(device, "describe", lambda: here)
    monkeypatch.setattr(command, "ProcessRunner", lambda *_: lambda stage, seconds: COMPLETE)
    save(tmp_path / "state.json", {"schema": 1, "stages": {}, "environment": AT})
    words = ["--results", str(tmp_path), "--stage"]
    with pytest.raises(SystemExit):
        command.main([*words, "probes"])
    assert "is of torch 2 (here 2.99); name a folder" in capsys.readouterr().err
    assert command.main([*words, "report"]) == 0
    assert load(tmp_path / "state.json")["environment"] == AT
    here.update(AT, driver="2")
    assert command.main([*words, "probes"]) == 0
    assert load(tmp_path / "state.json")["environment"]["driver"] == "2"


def test_a_build_is_of_the_sources_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("csrc", "fastrnn", "build"):
        (tmp_path / name).mkdir()
    (tmp_path / "CMakeLists.txt").write_text("project(x)")
    source = tmp_path / "csrc" / "a.cu"
    source.write_text("first")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "TREE", tmp_path / "build")
    assert not build.built("90a")
    (tmp_path / "fastrnn" / f"_cuda.{sys.implementation.cache_tag}-x.so").write_text("")
    (tmp_path / "build" / "built.txt").write_text(build.made_of("90a") + "\n")
    assert build.built("90a")
    assert not build.built("80")
    source.write_text("second")
    assert not build.built("90a")
