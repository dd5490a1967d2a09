"""A wheel, and an empty environment that holds it and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of the tree under test."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$FASTRNN_WHEEL, or one built from the sdist under build isolation: what pip would do."""
    given = os.environ.get("FASTRNN_WHEEL")
    if given:
        path = Path(given).resolve()
        assert path.is_file(), f"FASTRNN_WHEEL names no file: {given}"
        return path
    folder = tmp_path_factory.mktemp("wheel")
    pins = str(ROOT / "constraints.txt")
    environment = {**os.environ, "PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins}
    archive = request.getfixturevalue("sdist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(archive)], env=environment, check=True)
    (path,) = folder.glob("*.whl")
    return path


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it; `run` starts its Python with no source tree in reach."""

    python: Path
    site_packages: Path
    empty: Path

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FASTRNN_"))
        }
        # -I: neither the current folder nor PYTHONPATH nor the user's packages are on sys.path.
        return subprocess.run(
            [str(self.python), "-I", *arguments],
            cwd=self.empty,
            env={**inherited, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a virtual environment that has nothing but torch and what torch requires.

    Installing torch again would cost a download of 200 MB and a minute. Instead a folder of links
    lends the distributions that torch requires, transitively, and no others: an import that the
    wheel's metadata does not declare still fails. pip itself then resolves the wheel's
    requirements against that folder.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True
    )
    python = folder / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    command = [str(python), "-I", "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    site_packages = Path(found.stdout.strip())

    lent = folder / "lent"
    lent.mkdir()
    _lend("torch", lent, set())
    (site_packages / "lent.pth").write_text(f"{lent}\n")

    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    unpinned = {name: value for name, value in os.environ.items() if "CONSTRAINT" not in name}
    command = [*pip, "install", "--quiet", "--no-index", str(wheel)]
    subprocess.run(command, check=True, cwd=folder, env=unpinned)
    empty = folder / "empty"
    empty.mkdir()
    return Installed(python, site_packages, empty)


def _lend(name: str, folder: Path, seen: set[str]) -> None:
    """Links a distribution of this environment, and those it requires, into `folder`."""
    if name in seen:
        return
    seen.add(name)
    source = distribution(name)
    tops = {file.parts[0] for file in source.files or ()} - {"..", "__pycache__"}
    for top in tops:
        link = folder / top
        if not link.exists():
            link.symlink_to(Path(str(source.locate_file(top))).resolve())
    for line in source.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _lend(requirement.name, folder, seen)
