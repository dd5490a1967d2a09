"""The CUDA backend: on emulated kernels in a process of its own, and without any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn.backends import SERVES, Problem, cuda_missing, cuda_native

ROOT = Path(__file__).parent.parent
FILES = sorted(path.name for path in (Path(__file__).parent / "emulated").glob("test_*.py"))
# No test there draws examples, and the plugin of hypothesis takes seconds to start.
QUICK = ("-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")


def _library() -> str:
    """The emulated library: of the environment, or where `make pytest` builds it."""
    folder = ROOT / "build" / str(sys.implementation.cache_tag) / "module"
    built = sorted(folder.glob("_cuda_emulated*.so"))
    return os.environ.get("FASTRNN_EMULATED") or (str(built[0]) if built else "")


LIBRARY = _library()
needs_emulated = pytest.mark.skipif(
    not LIBRARY, reason="the CUDA kernels were not compiled for the emulator: make pytest does"
)
not_built = pytest.mark.skipif(
    cuda_native._import_error is None, reason="the CUDA library is built here"
)


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTRNN_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.first
@needs_emulated
@pytest.mark.parametrize("name", FILES)
def test_on_the_emulator(name: str) -> None:
    path = f"tests/emulated/{name}"
    done = _run("-m", "pytest", *QUICK, path, FASTRNN_EMULATED=LIBRARY)
    assert done.returncode == 0, f"{path}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert "passed" in done.stdout


def problem(**changes: object) -> Problem:
    usual = Problem("lstm", "cuda", torch.float32, False, 5, 2, 3, 4, 0, 1, 1)
    return usual._replace(**changes)  # type: ignore[arg-type]


def test_reasons_that_need_no_gpu() -> None:
    serves = SERVES["cuda"]
    assert serves(problem(device="xpu")) == "the input is on xpu"
    assert serves(problem(device="cpu")) == "the input is on cpu"
    if not torch.cuda.is_available():
        assert serves(problem()) == cuda_missing() != ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dtype": torch.float64}, "it has no torch.float64 kernels"),
        ({"cell": "rhn", "gates": 2, "depth": 3}, ""),
        ({"cell": "rhn", "gates": 3, "gate_masks": True}, ""),
        ({"cell": "bnlstm", "batch": 9999}, ""),
        ({"cell": "bnlstm", "process_group": True}, "statistics over a process group"),
        ({"cell": "gru_layer_norm"}, ""),
        ({"proj_size": 2}, ""),
        ({"cell": "lstm_layer_norm", "proj_size": 2, "regularisers": "zoneout 0.1"}, ""),
        ({"regularisers": "zoneout 0.1"}, ""),
        ({"hidden_size": 0}, "an input or hidden size of 0"),
        ({"input_size": 0}, "an input or hidden size of 0"),
        ({"transforms": True}, "torch.func transforms"),
        ({"hidden_size": 9999}, "too large in this test"),
        ({}, ""),
    ],
    ids=str,
)
def test_reasons_of_a_machine_with_a_gpu(
    changes: dict, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrnn.backends.cuda_missing", lambda: "")
    monkeypatch.setattr(
        "fastrnn.backends._cuda_refusal",
        lambda ordinal, cell, dtype, size, hidden, *_: (
            "too large in this test" if hidden > 99 else ""
        ),
    )
    found = SERVES["cuda"](problem(**changes))
    assert (why in found) if why else not found, found


@not_built
def test_not_built_says_how_to_build() -> None:
    assert "FASTRNN_CUDA=on pip install ." in cuda_missing()
    assert "\n" not in cuda_missing()
    with fastrnn.use_backend("cuda"), pytest.raises(RuntimeError, match="the input is on cpu"):
        fastrnn.RNN(2, 3)(torch.zeros(1, 1, 2))
    weights = [torch.zeros(3, 2), torch.zeros(3, 3)]
    with pytest.raises(RuntimeError, match="is not built"):
        torch.ops.fastrnn.layer_forward(
            torch.zeros(1, 1, 2), torch.zeros(1, 1, 3), None, weights, None, None, None, None,
            "rnn_tanh", False, False, "cuda",
        )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_report_of_a_machine_without_a_gpu() -> None:
    done = _run("-m", "fastrnn")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("CUDA")]
    assert cuda_missing() in line
    assert line.endswith("tensors on a GPU run on Triton's kernels or torch's own")


def test_a_library_that_finds_no_driver(tmp_path: Path) -> None:
    """It imports; the reason is the runtime's, and layers on the CPU do not care."""
    script = (
        "import sys, types, torch\n"
        "native = types.ModuleType('fastrnn._cuda')\n"
        "native.emulated = False\n"
        "def device(ordinal): raise RuntimeError('CUDA driver version is insufficient')\n"
        "native.device = device\n"
        "sys.modules['fastrnn._cuda'] = native\n"
        "import fastrnn\n"
        "from fastrnn.backends import cuda_missing\n"
        "fastrnn.LSTM(3, 4)(torch.zeros(2, 1, 3))\n"
        "print(cuda_missing())\n"
    )
    done = _run("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "the CUDA library is built, but it finds no GPU it can use: "
        "CUDA driver version is insufficient"
    )


def test_cuda_is_imported_only_when_asked_for() -> None:
    script = (
        "import sys, torch, fastrnn\n"
        "fastrnn.LSTM(3, 4)(torch.zeros(2, 1, 3))\n"
        "fastrnn.explain(fastrnn.LSTM(3, 4), torch.zeros(2, 1, 3))\n"
        "sys.exit('fastrnn.backends.cuda_native' in sys.modules)\n"
    )
    done = _run("-c", script)
    assert done.returncode == 0, done.stderr
