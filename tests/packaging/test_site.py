"""The documentation site builds without a warning, and docstrings come out as Markdown."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("mkdocs", reason="mkdocs is not installed: it needs Python 3.11, `make build`")
pytest.importorskip("griffe", reason="griffe is not installed: it needs Python 3.11, `make build`")


def test_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()
    layers = (tmp_path / "api" / "layers" / "index.html").read_text()
    for name in ("LSTM", "GRU", "RNN", "RHN", "BNLSTM"):
        assert f'id="fastrnn.{name}"' in layers
    assert "::</p>" not in layers


def test_docstrings_become_markdown() -> None:
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "scripts" / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = """A layer computes::

    y = f(x)

Args:
    size: H.

Call `layer(input)`:
    input: (T, N, I), or
        (T, I).
    h_n, c_n: states.

Raises what torch raises."""
    expected = """A layer computes:

    y = f(x)

Args:
    size: H.

Call `layer(input)`:

- `input`: (T, N, I), or
  (T, I).
- `h_n, c_n`: states.

Raises what torch raises."""
    assert module.markdown(text) == expected
