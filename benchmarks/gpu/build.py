"""Stage `build`: fastrnn's native modules for the present GPU, in place, without a package index.

CMake is driven directly: the CUDA module for one architecture and the CPU module for the baseline
instruction set (whose operators draw masks), in the environment that runs. Objects stay in
build/gpu-<python>, so a run that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import device
from benchmarks.gpu.stage import Stop, say

ROOT = Path(__file__).resolve().parent.parent.parent
TREE = ROOT / "build" / f"gpu-{sys.implementation.cache_tag}"


def configure_command(arch: str, tree: Path = TREE) -> list[str]:
    import pybind11

    return [
        _tool("cmake"), "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DFASTRNN_OUTPUT_DIR={ROOT / 'fastrnn'}",
        "-DFASTRNN_ISAS=baseline", "-DFASTRNN_CUDA=on", f"-DFASTRNN_CUDA_ARCHS={arch}",
        "-DCMAKE_CUDA_FLAGS=--split-compile=4",  # a file holds dozens of kernels
    ]  # fmt: skip


def built(arch: str) -> bool:
    """Whether this environment can import a CUDA module that was built here for this GPU, from
    the sources as they are."""
    stamp = TREE / "built.txt"
    modules = list((ROOT / "fastrnn").glob(f"_cuda.{sys.implementation.cache_tag}*.so"))
    return bool(modules) and stamp.exists() and stamp.read_text().strip() == made_of(arch)


def made_of(arch: str) -> str:
    """What a build depends on: the architecture, and a hash of the sources."""
    found = hashlib.sha256()
    for path in sorted([ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*")]):
        if path.is_file():
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return f"{arch} {found.hexdigest()}"


def run(stop: Stop) -> None:
    """Builds with a job per core. Raises RuntimeError with the compiler's last words."""
    arch = device.architecture()
    made = made_of(arch)  # before: a change that comes in between makes the build stale
    _run(configure_command(arch), stop)
    jobs = str(len(os.sched_getaffinity(0)))
    build = [_tool("cmake"), "--build", str(TREE), "--target"]
    # The longer one first: ninja fills the cores from both.
    _run([*build, "_cuda", "_cpu", "-j", jobs], stop)
    for name, seconds in seconds_per_file(TREE / ".ninja_log")[:12]:
        say(f"{seconds:6.1f} s  {name}")
    check = "from fastrnn import _cpu, _cuda; print(_cuda.version, _cuda.emulated)"
    _run([sys.executable, "-c", check], stop)
    (TREE / "built.txt").write_text(made + "\n")


def seconds_per_file(log: Path) -> list[tuple[str, float]]:
    """What ninja took for each output, the slowest first."""
    found = {}
    for line in log.read_text().splitlines():
        fields = line.split("\t")
        if len(fields) == 5 and not line.startswith("#"):
            found[Path(fields[3]).name] = (int(fields[1]) - int(fields[0])) / 1000
    return sorted(found.items(), key=lambda each: -each[1])


def _tool(name: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(f"{name} was not found beside {sys.executable} or in PATH")
    return found


def _run(command: list[str], stop: Stop) -> None:
    """Prints what the command prints, and raises RuntimeError with its end if it fails."""
    say(" ".join(command)[:200])
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=stop.left()
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}:\n{tail}")
