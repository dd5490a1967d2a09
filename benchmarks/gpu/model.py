"""The cost model of csrc/cuda/plan.h, evaluated by itself, and its constants as data.

The model is C++; csrc/cuda/probes/model.cc wraps it as a filter, compiled by the host's compiler
when first asked for. So there is one model, and what is fitted is what plans are made by.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "probes" / "model.cc"
HEADER = ROOT / "csrc" / "cuda" / "cost_model.h"
_LINE = re.compile(r"^  double (\w+)(?:\[4\])? = (\{[^}]*\}|[0-9.e+-]+);( *//.*)?$", re.MULTILINE)
_PROVENANCE = re.compile(r"^// Provenance: .*$", re.MULTILINE)

CELLS = {"lstm": 0, "gru": 1, "gru_reset_before": 2, "rnn": 3, "rnn_tanh": 3, "rnn_relu": 4}
FORMATS = {"bfloat16": 0, "float16": 1, "tf32": 2, "bf16x3": 3}
EXCHANGES = ("local", "cluster", "sentinel", "flags")


@dataclass(frozen=True)
class Step:
    """One kernel at one shape, as the filter takes it: the problem, the tile, the launch."""

    cell: int
    format: int
    backward: int
    N: int
    H: int
    directions: int
    depth: int
    exchange: int
    units: int
    row_tiles: int
    chunks: int
    resident: int
    warps: int
    teams: int
    groups: int
    ctas: int
    launches: int

    @property
    def words(self) -> str:
        return " ".join(str(int(value)) for value in astuple(self))


class CostModel:
    """The filter, a process; use it in a `with` block."""

    def __init__(self, folder: Path | None = None) -> None:
        self._places = {name: index for index, name in enumerate(read_constants())}
        self._process = subprocess.Popen(
            [str(_compiled(folder))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> CostModel:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, requests: Sequence[str]) -> list[str]:
        """The answers, line by line. Raises ValueError on a request that is not understood."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answers = []
        for first in range(0, len(requests), 256):  # less than what a pipe holds
            part = requests[first : first + 256]
            self._process.stdin.write("".join(f"{line}\n" for line in part))
            self._process.stdin.flush()
            answers += [self._process.stdout.readline().strip() for _ in part]
        for request, answer in zip(requests, answers, strict=True):
            if answer in ("", "not understood", "no such constant", "five numbers expected"):
                raise ValueError(f"cost model: {request!r}: {answer or 'no answer'}")
        return answers

    def set(self, constants: Mapping[str, float]) -> None:
        try:
            requests = [f"set {self._places[k]} {float(v)!r}" for k, v in constants.items()]
        except KeyError as error:
            raise ValueError(f"cost model: {HEADER.name} has no constant {error}") from None
        self.ask(requests)

    def device(self, numbers: Sequence[int]) -> None:
        """SMs, shared memory, registers, capability, clusters, as fastrnn._cuda has them."""
        self.ask(["device " + " ".join(str(number) for number in numbers)])

    def microseconds(self, steps: Sequence[Step]) -> list[float]:
        return [float(answer) for answer in self.ask([f"step {step.words}" for step in steps])]

    def best(
        self,
        cell: int,
        number_format: int,
        backward: bool,
        N: int,
        H: int,
        directions: int = 1,
        depth: int = 1,
    ) -> tuple[Step, float] | None:
        """The plan made with the header's constants, and its microseconds; None if none can run."""
        problem = (cell, number_format, int(backward), N, H, directions, depth)
        answer = self.ask(["best " + " ".join(str(value) for value in problem)])[0]
        if answer == "none":
            return None
        *numbers, microseconds = answer.split()
        return Step(*problem, *(int(number) for number in numbers)), float(microseconds)


def _compiled(folder: Path | None) -> Path:
    folder = folder or ROOT / "build" / "gpu"
    target = folder / "model"
    sources = [SOURCE, *SOURCE.parent.parent.glob("*.h"), *SOURCE.parent.parent.glob("core/*.h")]
    if target.exists() and target.stat().st_mtime > max(s.stat().st_mtime for s in sources):
        return target
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("the cost model needs a C++ compiler: g++ was not found, CXX is not set")
    folder.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-std=c++17", "-O1", str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def read_constants(header: Path = HEADER) -> dict[str, float]:
    """The constants by name, in the header's order; hop[4] is hop_local .. hop_flags."""
    found: dict[str, float] = {}
    for name, value, _ in _LINE.findall(header.read_text()):
        if value.startswith("{"):  # one for each exchange
            parts = zip(EXCHANGES, value.strip("{}").split(","), strict=True)
            found |= {f"{name}_{exchange}": float(part) for exchange, part in parts}
        else:
            found[name] = float(value)
    if not found:
        raise ValueError(f"{header} has no line of the form '  double name = value;'")
    return found


def write_constants(constants: Mapping[str, float], provenance: str, header: Path = HEADER) -> None:
    """Puts the constants and where they are from into the header; all else stays."""
    known = read_constants(header)
    if set(constants) != set(known):
        odd = sorted(set(constants) ^ set(known))
        raise ValueError(f"constants differ from those of {header.name}: {', '.join(odd)}")
    text = _PROVENANCE.sub(lambda _: f"// Provenance: {provenance}", header.read_text())

    def line(found: re.Match[str]) -> str:
        name, value, comment = found.groups()
        declared, text = name, f"{constants.get(name, 0.0):.6g}"
        if value.startswith("{"):
            parts = [f"{constants[f'{name}_{exchange}']:.6g}" for exchange in EXCHANGES]
            declared, text = f"{name}[4]", f"{{{', '.join(parts)}}}"
        return f"  double {declared} = {text};" + (f"  {comment.strip()}" if comment else "")

    header.write_text(_LINE.sub(line, text))
