"""Drives CMake for the native module; everything else about the package stands in pyproject.toml.

torch is not imported: the native code includes no torch header, so the wheel does not depend on
which torch is installed, and ``pip install .`` works under build isolation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds each extension with the CMake target of the same name."""

    def build_extension(self, ext: Extension) -> None:
        # An optional extension may be absent, but not because its compilation failed.
        try:
            self._build(ext)
        except SetupError as error:
            hint = "; FASTRNN_CUDA=off leaves the CUDA module out" if ext.optional else ""
            raise SystemExit(f"error: {error}{hint}") from None

    def _build(self, ext: Extension) -> None:
        cmake = _tool("cmake")
        # Not in setuptools' temporary folders: the next build recompiles only what changed.
        tree = ROOT / "build" / str(sys.implementation.cache_tag)
        target = ext.name.rpartition(".")[2]
        if target == "_cpu":
            self._configure(cmake, tree)
        elif (tree / "cuda.txt").read_text().strip() != "ON":
            # CMakeLists.txt decides, its summary says why; an earlier build may have had one.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            return
        _run([cmake, "--build", str(tree), "--target", target])
        destination = Path(self.get_ext_fullpath(ext.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        built = tree / "module" / destination.name
        if not built.exists():
            raise SetupError(f"CMake target {target} did not make {built}")
        shutil.copy2(built, destination)
        if target == "_cpu":
            print((tree / "summary.txt").read_text().strip(), flush=True)

    def get_outputs(self) -> list[str]:
        """Without the module that was not to be built."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def _configure(self, cmake: str, tree: Path) -> None:
        import pybind11

        _run(
            [
                cmake,
                "-S",
                str(ROOT),
                "-B",
                str(tree),
                "-G",
                "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DFASTRNN_CUDA={os.environ.get('FASTRNN_CUDA') or 'auto'}",
                f"-DFASTRNN_CUDA_ARCHS={os.environ.get('FASTRNN_CUDA_ARCHS', '')}",
            ]
        )


def _tool(name: str) -> str:
    """Path of a build tool: the one installed beside this Python first, then any on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise SetupError(f"{name} was not found; `pip install {name}` provides it")
    return found


def _run(command: list[str]) -> None:
    """Runs a build step; its own output says what went wrong, so no traceback is added to it."""
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        step = "compiling" if "--build" in command else "configuring"
        raise SetupError(
            f"{step} the native library failed (exit status {error.returncode}); the reason stands "
            "above. A C++17 compiler is needed: g++ 10 or newer, or clang 12 or newer"
        ) from None


setup(
    # In this order: the first configures for both.
    ext_modules=[
        Extension("fastrnn._cpu", sources=[]),
        Extension("fastrnn._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
