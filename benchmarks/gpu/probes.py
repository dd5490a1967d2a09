"""Stage `probes`: csrc/cuda/probes on the present GPU, and torch's copy and matmul ceilings."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu import device
from benchmarks.gpu.clock import Clock, CudaClock
from benchmarks.gpu.refit import probed_constants
from benchmarks.gpu.stage import Stop, Wrong, save, say

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "probes" / "main.cu"
COPY_BYTES = 1 << 31
MATMUL = 8192


def compile_command(nvcc: str, arch: str, target: Path) -> list[str]:
    return [
        nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}",
        f"-gencode=arch=compute_{arch},code=sm_{arch}", str(SOURCE), "-o", str(target),
    ]  # fmt: skip


def parse(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The JSON objects among the lines of the probes' output. A last line may be cut off."""
    whole = [line for line in lines if line.startswith("{") and line.rstrip().endswith("}")]
    return [json.loads(line) for line in whole]


def red(probes: list[dict[str, Any]]) -> list[str]:
    return [f"{each['probe']}: {each['message']}" for each in probes if not each["ok"]]


def run(results: Path, stop: Stop, nvcc: str) -> None:
    """Writes probes.json.

    Raises:
        Wrong: a wrapper or an exchange is.
        subprocess.TimeoutExpired: what was found until then is written.
    """
    target = ROOT / "build" / "gpu" / "probes"
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        compile_command(nvcc, device.architecture(), target), check=True, timeout=stop.left()
    )
    late = None
    try:
        done = subprocess.run(
            [str(target)], capture_output=True, text=True, check=False, timeout=stop.left() * 0.7
        )
        output, status = done.stdout, str(done.returncode)
    except subprocess.TimeoutExpired as error:
        late, raw = error, error.stdout or ""
        output, status = raw.decode() if isinstance(raw, bytes) else raw, "a time-out"
    found: dict[str, Any] = {"environment": device.describe(), "status": status}
    found["probes"] = parse(output.splitlines())
    save(results / "probes.json", found)
    found["constants"] = probed_constants(found)
    found["ceilings"] = ceilings(CudaClock(), "cuda")
    hop = next(
        (
            line["us"] * 1e-6
            for line in reversed(found["probes"])
            if line["probe"] == "hop_sentinel" and line.get("words") == 1 and line["ok"]
        ),
        0.0,
    )
    found["ceilings"]["hop_seconds"] = hop
    save(results / "probes.json", found)
    for name, value in found["constants"].items():
        say(f"{name:16} {value:10.1f}")
    wrong = red(found["probes"])
    if wrong or (late is None and status != "0"):
        raise Wrong("\n".join(wrong) or f"the probes ended with {status}")
    if late is not None:
        raise late


def ceilings(clock: Clock, where: str, scale: int = 1) -> dict[str, Any]:
    """Copy, bytes read plus bytes written per second, and matmul FLOP/s by dtype.

    scale: how many times smaller than usual, for tests.
    """
    import torch

    words = COPY_BYTES // 4 // scale
    copy = _copy_seconds(clock, torch.randn(words, device=where))
    size = MATMUL // scale
    rates = {}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for name in ("bfloat16", "float16", "float32"):
            x = torch.randn(size, size, device=where).to(getattr(torch, name))
            taken = statistics.median(clock.samples(lambda x=x: torch.mm(x, x), 1, 10)[2:])
            rates[name] = 2.0 * size**3 / taken
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"copy_bytes": 2.0 * 4 * words / copy, "matmul_flops": rates}


def _copy_seconds(clock: Clock, data: Any) -> float:
    to = data.clone()
    return statistics.median(clock.samples(lambda: to.copy_(data), 1, 8)[2:])
