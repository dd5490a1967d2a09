"""The Makefile's interpreter: .venv's where there is one, and not another than was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make(tmp_path: Path):
    """Runs make in a folder that has the Makefile and a .venv of a Python that never was."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    sources = ("constraints.txt", "pyproject.toml", "CMakeLists.txt", "setup.py")
    folders = ("scripts/preflight.sh", "fastrnn/_version.py", ".venv/.tools", ".venv/.installed")
    for name in (*sources, *folders):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho cpython-20\n")
    python.chmod(0o755)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # Without what a make above this test has set.
        own = ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        inherited = {k: v for k, v in os.environ.items() if k not in own}
        show = "--eval=show: ; @echo $(BUILD)"
        return subprocess.run(
            ["make", show, *arguments], cwd=tmp_path, env=inherited, capture_output=True, text=True
        )

    return run


def test_the_build_folder_follows_the_environment(make, tmp_path):
    asked = f"PYTHON={sys.executable}"
    assert make("show").stdout == "build/cpython-20\n"
    assert make("show", asked).stdout == "build/cpython-20\n"
    shutil.rmtree(tmp_path / ".venv")
    assert make("show", asked).stdout == f"build/{sys.implementation.cache_tag}\n"
    assert make("same-python", asked).returncode == 0


def test_an_environment_of_another_version_is_not_built_in(make):
    assert make("same-python").returncode == 0
    assert make("same-python", "PYTHON=.venv/bin/python").returncode == 0
    assert "Nothing to be done" in make("build").stdout
    for target in ("same-python", "build"):
        refused = make(target, f"PYTHON={sys.executable}")
        assert refused.returncode == 2
        assert f".venv is of cpython-20, not of PYTHON={sys.executable}: `make clean`" in (
            refused.stderr
        )
