"""The Triton backend in a process where Triton interprets its kernels, and where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn.backends.triton.plan import (
    BATCH_ROWS,
    SHARED,
    choose,
    least_rows,
    padded,
    refusal,
)

HERE = Path(__file__).parent
FILES = sorted(path.name for path in (HERE / "interpreted").glob("test_*.py"))
# No test there draws examples, and the plugin of hypothesis takes seconds to start.
QUICK = ("-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FASTRNN_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.first
@needs_triton
@pytest.mark.parametrize("name", FILES)
def test_under_the_interpreter(name: str) -> None:
    path = f"tests/interpreted/{name}"
    done = _run("-m", "pytest", *QUICK, path, TRITON_INTERPRET="1")
    assert done.returncode == 0, f"{path}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"


def test_triton_is_imported_only_when_asked_for() -> None:
    script = (
        "import sys, torch, fastrnn\n"
        "fastrnn.LSTM(3, 4)(torch.zeros(2, 1, 3))\n"
        "fastrnn.explain(fastrnn.LSTM(3, 4), torch.zeros(2, 1, 3))\n"
        "sys.exit('triton' in sys.modules)\n"
    )
    done = _run("-c", script)
    assert done.returncode == 0, done.stderr


@needs_triton
def test_cpu_tensors_need_the_interpreter() -> None:
    script = (
        "import torch, fastrnn\n"
        "with fastrnn.use_backend('triton'):\n"
        "    fastrnn.LSTM(3, 4)(torch.zeros(2, 1, 3))\n"
    )
    done = _run("-c", script)
    assert "RuntimeError" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


@needs_triton
def test_triton_imported_too_early() -> None:
    """The setting comes too late for a triton that is there already, and the reason says so."""
    script = (
        "import os, torch, triton, fastrnn\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "with fastrnn.use_backend('triton'):\n"
        "    fastrnn.LSTM(3, 4)(torch.zeros(2, 1, 3))\n"
    )
    done = _run("-c", script)
    assert "triton was imported before TRITON_INTERPRET was set" in done.stderr


def test_without_triton() -> None:
    script = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "import fastrnn\n"
        "with fastrnn.use_backend('triton', strict=False) as used:\n"
        "    fastrnn.LSTM(3, 4)(torch.zeros(2, 1, 3))\n"
        "print(used.fallbacks)\n"
    )
    done = _run("-c", script, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "triton is not installed: pip install triton" in done.stdout


@pytest.mark.parametrize(
    "hidden, itemsize, fits", [(256, 2, True), (257, 2, False), (128, 4, True), (129, 4, False)]
)
def test_largest_hidden_size(hidden: int, itemsize: int, fits: bool) -> None:
    why = refusal("lstm", hidden, itemsize, 8)
    assert (why == "") == fits
    if not fits:
        assert f"hidden size is {hidden - 1} " in why
    assert refusal("lstm", 128, 2, 8, shared=99 * 1024) == ""
    assert "is 128 in this dtype" in refusal("lstm", 129, 2, 8, shared=99 * 1024)


def test_largest_batch_with_statistics() -> None:
    assert refusal("bnlstm", 64, 4, 128) == ""
    assert "129 rows of 64 units" in refusal("bnlstm", 64, 4, 129)
    assert refusal("lstm", 64, 4, 129) == ""


@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 64, 100, 128, 200, 256])
@pytest.mark.parametrize("size", [1, 16, 17, 5000, 40000])
def test_plan(hidden: int, size: int) -> None:
    """Tiles hold the layer, are powers of two, and stay within what registers hold."""
    for cell, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1)):
        plan = choose(cell, gates, hidden, hidden, 2, size, 2)
        assert plan.units == padded(hidden) >= max(16, hidden)
        assert plan.units & (plan.units - 1) == 0
        assert plan.rows in (16, 32, 64)
        assert plan.rows == 16 or size > 16 * plan.rows
        assert plan.units * plan.rows <= 16 * 32 * plan.warps
        assert plan.stream or gates * plan.units**2 * 2 <= SHARED


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("rows", BATCH_ROWS)
def test_the_smallest_batch_of_a_tile(rows: int, directions: int) -> None:
    size = least_rows(rows, directions)
    assert choose("lstm", 4, 32, 32, 2, size, directions).rows == rows
    if rows > BATCH_ROWS[0]:
        assert choose("lstm", 4, 32, 32, 2, size - 1, directions).rows < rows


def test_serves_says_why_not() -> None:
    from fastrnn.backends import SERVES, Problem

    p = Problem("lstm", "cuda", torch.float32, False, 3, 2, 4, 8, 0, 1, 1)
    if not torch.cuda.is_available() and find_spec("triton"):
        assert SERVES["triton"](p) == "torch finds no GPU"
    assert SERVES["triton"](p._replace(device="xpu")) == "the input is on xpu"


def test_use_backend_takes_the_name() -> None:
    with fastrnn.use_backend("triton", strict=False):
        y, _ = fastrnn.LSTM(3, 4)(torch.zeros(2, 1, 3))
    assert y.shape == (2, 1, 4)
