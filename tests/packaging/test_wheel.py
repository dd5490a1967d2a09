"""The wheel as a stranger meets it: installed alone, with the source tree out of sight."""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel

TRAINING_STEP = """
import torch, fastrnn
torch.manual_seed(0)
ours = fastrnn.LSTM(7, 9, num_layers=2, bidirectional=True)
theirs = torch.nn.LSTM(7, 9, num_layers=2, bidirectional=True)
theirs.load_state_dict(ours.state_dict())
x = torch.randn(5, 3, 7)
grads = []
for module in (ours, theirs):
    module(x)[0].square().sum().backward()
    grads.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
torch.testing.assert_close(*grads)
print(fastrnn.__file__)
print(fastrnn._cpu.__file__)
"""


def _version(root: Path) -> str:
    text = (root / "fastrnn" / "_version.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    return found[1]


def _members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_self_check(installed, root):
    result = installed.run("-m", "fastrnn")
    assert result.returncode == 0, result.stdout + result.stderr
    assert _version(root) in result.stdout
    assert str(root) not in result.stdout + result.stderr


def test_self_check_on_the_portable_kernels(installed):
    result = installed.run("-m", "fastrnn", FASTRNN_ISA="baseline")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "baseline" in result.stdout


def test_trains_like_torch(installed):
    result = installed.run("-c", "import fastrnn._cpu\n" + TRAINING_STEP)
    assert result.returncode == 0, result.stdout + result.stderr
    for line in result.stdout.splitlines():
        assert line.startswith(str(installed.site_packages))


def test_metadata(wheel, root):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == _version(root)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert required == ["torch>=2.6"]


def test_holds_the_package_and_nothing_else(wheel, root):
    members = _members(wheel)
    tops = {name.split("/")[0] for name in members}
    assert tops == {"fastrnn", f"fastrnn-{_version(root)}.dist-info"}
    assert not [n for n in members if n.endswith((".cc", ".h", ".map"))]
    sources = {str(p.relative_to(root)) for p in (root / "fastrnn").rglob("*.py")}
    assert sources <= set(members)
    assert {"fastrnn/py.typed", "fastrnn/gpu/table.json"} <= set(members)
    assert any(n.endswith("licenses/LICENSE") for n in members)


def test_sdist_can_build_the_library(sdist, root):
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "LICENSE",
        "Makefile",
    }
    native = {str(p.relative_to(root)) for p in (root / "csrc").rglob("*") if p.is_file()}
    tests = {str(p.relative_to(root)) for p in (root / "tests").rglob("*.py")}
    assert needed | native | tests <= members
    assert not [
        n for n in members if n.endswith((".so", ".pyc")) or n.startswith(("build/", ".venv"))
    ]


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory) -> Path:
    """The native module taken out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if re.fullmatch(r"fastrnn/_cpu\..*so", n)]
        return Path(archive.extract(name, tmp_path_factory.mktemp("library")))


def _read(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def test_library_exports_only_its_entry_point(library):
    lines = _read("nm", "--dynamic", "--defined-only", library).splitlines()
    assert [line.split()[-1] for line in lines] == ["PyInit__cpu"]


def test_library_needs_neither_torch_nor_openmp(library):
    dynamic = _read("readelf", "--dynamic", "--wide", library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    system = r"(libc|libm|libdl|libpthread|libgcc_s|libstdc\+\+|ld-linux[\w-]*)\.so\.\d+"
    assert [name for name in needed if not re.fullmatch(system, name)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_library_asks_for_no_executable_stack_and_no_text_relocation(library):
    (stack,) = [
        line
        for line in _read("readelf", "--segments", "--wide", library).splitlines()
        if "GNU_STACK" in line
    ]
    assert "RWE" not in stack
    assert "TEXTREL" not in _read("readelf", "--dynamic", library)


def test_library_takes_no_undefined_symbol_from_torch_or_openmp(library):
    undefined = _read("nm", "--dynamic", "--undefined-only", library)
    assert (
        re.findall(r"\b(GOMP_\w+|omp_\w+|__kmpc_\w+|_ZN2at\w+|_ZN3c10\w+|THP\w+)", undefined) == []
    )
