"""The benchmark cases, as data: what is run, never how.

A case is one module call (or training step) at one shape. Sizes follow torch.nn: T time steps, N
sequences, H hidden units, I inputs (I = H unless said). Contestants are names that `peers.build`
understands.
"""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass, fields
from typing import Any

CELLS = ("lstm", "gru", "rnn")
MODES = ("forward", "training", "step")
LOOP_CELLS = ("rhn", "bnlstm")  # no peer in torch.nn: the peer is a loop
GROUPS = (
    *("grid", "step", "overhead", "bf16", "isa", "options", "loops", "regularised", "layer_norm"),
    "memory",
)
GATES = {"lstm": 4, "gru": 3, "rnn": 1, "rhn": 2, "bnlstm": 4}


@dataclass(frozen=True)
class Case:
    """One line of the result table.

    mode: "forward" is inference (eval, no_grad), "training" is forward + backward with gradients
      through output and h_n into input and every weight, "step" is one `module.step` call beside
      torch.nn's cell.
    ragged: "" (all sequences have T steps), "lengths" (padded batch with lengths) or "packed"
      (PackedSequence).
    depth: micro-steps of an RHN. option: one of `loops.OPTIONS`, or "compiled": every contestant
      through torch.compile.
    dtype: of the whole module, as torch spells it; "" is float32 (the GPU campaign has others).
    """

    cell: str
    mode: str
    T: int
    N: int
    H: int
    group: str = "grid"
    I: int = 0
    bidirectional: bool = False
    proj: int = 0
    ragged: str = ""
    depth: int = 1
    option: str = ""
    dtype: str = ""
    contestants: tuple[str, ...] = ("fastrnn", "torch")
    quick: bool = False

    @property
    def input_size(self) -> int:
        return self.I or self.H

    @property
    def output_size(self) -> int:
        return self.proj or self.H

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def id(self) -> str:
        extras = [self.group] if self.group not in ("grid", "step") else []
        extras += ["bidirectional"] if self.bidirectional else []
        extras += [f"proj{self.proj}"] if self.proj else []
        extras += [self.ragged] if self.ragged else []
        extras += [self.dtype] if self.dtype else []
        extras += [self.option] if self.option not in ("", self.group) else []
        extras += ["recompute"] if "fastrnn-recompute" in self.contestants else []
        size = f"T{self.T}-N{self.N}-H{self.H}" + (f"-I{self.I}" if self.I else "")
        size += f"-L{self.depth}" if self.depth > 1 else ""
        return "/".join([self.cell, self.mode, size, *extras])

    @property
    def lengths(self) -> list[int]:
        """Steps of each sequence; of ragged ones spread evenly over T/4..T, about 5/8 of T N."""
        if not self.ragged:
            return [self.T] * self.N
        least, gaps = max(1, self.T // 4), max(1, self.N - 1)
        return [round(least + (self.T - least) * n / gaps) for n in range(self.N)]

    @property
    def flops(self) -> float:
        """Operations of the matrix products, 2 per multiply-add; training is three times forward.

        Per direction and row: G H (I + L R) multiply-adds with G gates, L micro-steps and R
        recurrent inputs, + H R for a projection. Padding is no row; the products with the zero
        state before the first step count.
        """
        inputs = self.input_size + self.depth * self.output_size
        per_row = GATES[self.cell] * self.H * inputs + self.H * self.proj
        return (
            2.0
            * per_row
            * sum(self.lengths)
            * self.directions
            * (3 if self.mode == "training" else 1)
        )

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Case:
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        return cls(**{**values, "contestants": tuple(values["contestants"])})


# (T, N, H) of the full grid: common shapes, then odd sizes and the corners of the range.
GRID = (
    *((1, 1, 128), (100, 1, 128), (100, 1, 512), (100, 1, 1024), (100, 8, 256), (100, 32, 256)),
    *((100, 32, 512), (100, 64, 512), (100, 32, 1024), (50, 128, 128), (784, 64, 128)),
    *((1, 1, 1024), (1, 32, 512), (1, 128, 256), (10, 3, 256), (20, 1, 256), (28, 13, 33)),
    *((35, 20, 650), (37, 13, 100), (50, 5, 100), (100, 1, 33), (100, 2, 512), (100, 3, 33)),
    *((100, 4, 1024), (100, 17, 200), (100, 128, 32), (784, 1, 32), (784, 1, 128), (25, 128, 1024)),
)
QUICK = {(1, 1, 128), (100, 1, 128), (100, 1, 512), (100, 8, 256), (37, 13, 100), (50, 128, 128)}

WITH_ONNX = ("fastrnn", "torch", "onnx")
BF16 = ("fastrnn", "fastrnn-bf16", "torch", "torch-bf16")
BF16_SHAPES = (
    (100, 1, 512),
    (100, 1, 1024),
    (100, 2, 1024),
    (100, 4, 1024),
    (100, 8, 256),
    (100, 8, 1024),
    (100, 32, 512),
)
ISAS = ("fastrnn@auto", "fastrnn@avx2")
ISA_SHAPES = ((100, 1, 512), (100, 8, 256), (100, 32, 512), (37, 13, 100))
RECOMPUTE_SHAPE = (200, 32, 512)


def grid() -> list[Case]:
    """LSTM, GRU and RNN, forward and training, over the shapes above."""
    return [
        Case(
            cell,
            mode,
            *shape,
            contestants=WITH_ONNX if mode == "forward" else ("fastrnn", "torch"),
            quick=shape in QUICK,
        )
        for cell in CELLS
        for mode in ("forward", "training")
        for shape in GRID
    ]


def step() -> list[Case]:
    """One streaming step against torch.nn's cell."""
    return [
        Case(cell, "step", 1, 1, 256, "step", contestants=("fastrnn", "torch-cell"), quick=True)
        for cell in CELLS
    ]


def overhead() -> list[Case]:
    """A call with next to nothing to compute, eager and through torch.compile."""
    return [
        Case(
            cell, mode, 1, 1, 16, "overhead",
            option=option, quick=cell == "lstm" and not option,
        )
        for option in ("", "compiled")
        for cell in CELLS
        for mode in ("forward", "training")
    ]  # fmt: skip


def bf16() -> list[Case]:
    """float32 modules under torch's bf16 switch beside float32 and torch's own bfloat16 LSTM."""
    return [
        Case("lstm", "forward", *shape, "bf16", contestants=BF16, quick=shape == (100, 1, 512))
        for shape in BF16_SHAPES
    ]


def isa() -> list[Case]:
    """The widest instruction set beside AVX2, each in its own process."""
    return [
        Case(
            cell,
            mode,
            *shape,
            "isa",
            contestants=ISAS,
            quick=shape == (100, 8, 256) and cell == "lstm",
        )
        for cell in CELLS
        for mode in ("forward", "training")
        for shape in ISA_SHAPES
    ]


def options() -> list[Case]:
    """What users add to a plain layer: directions, projection, sequence lengths, recomputation."""
    both = ("forward", "training")
    cases = [
        Case(cell, mode, 100, 32, 256, "options", bidirectional=True)
        for cell in CELLS
        for mode in both
    ]
    cases += [
        Case(
            cell,
            mode,
            100,
            32,
            256,
            "options",
            ragged=ragged,
            quick=(cell, ragged) == ("lstm", "lengths"),
        )
        for cell in CELLS
        for mode in both
        for ragged in ("lengths", "packed")
    ]
    cases += [Case("lstm", mode, 100, 32, 512, "options", proj=128) for mode in both]
    cases += [Case(cell, mode, 64, 64, 128, "options", I=1) for cell in CELLS for mode in both]
    recompute = ("fastrnn", "fastrnn-recompute", "torch")
    cases += [
        Case(cell, "training", *RECOMPUTE_SHAPE, "options", contestants=recompute) for cell in CELLS
    ]
    return cases


def memory() -> list[Case]:
    """Peak memory of one training step: every grid shape, and recomputation at its shape."""
    cases = [
        Case(cell, "training", *shape, "memory", quick=cell == "lstm" and shape == (100, 32, 512))
        for cell in CELLS
        for shape in GRID
    ]
    recompute = ("fastrnn", "fastrnn-recompute", "torch")
    cases += [
        Case(
            cell,
            "training",
            *RECOMPUTE_SHAPE,
            "memory",
            contestants=recompute,
            quick=cell == "lstm",
        )
        for cell in CELLS
    ]
    return cases


RHN_SHAPES = (  # T, N, H, depth
    *((35, 20, 830, 10), (100, 1, 512, 5), (50, 32, 256, 5), (100, 64, 128, 3)),
    *((35, 20, 333, 4), (64, 8, 100, 2)),
)
BNLSTM_SHAPES = ((100, 32, 256), (50, 64, 512), (784, 64, 100), (100, 128, 256), (50, 32, 100))
COMPILED = ((50, 32, 256), (100, 32, 256))  # compiling takes a minute or so each


def loops() -> list[Case]:
    """RHN and BN-LSTM against loops, and BN-LSTM beside our plain LSTM of the same shape."""

    def peers(*shape: int) -> tuple[str, ...]:
        return ("loop", "loop-compiled") if shape in COMPILED else ("loop",)

    cases = [
        Case(
            "rhn", "training", T, N, H, "loops",
            depth=depth, contestants=("fastrnn", *peers(T, N, H)), quick=H == 128,
        )
        for T, N, H, depth in RHN_SHAPES
    ]  # fmt: skip
    cases += [
        Case("rhn", "forward", T, N, H, "loops", depth=depth, contestants=("fastrnn", "loop"))
        for T, N, H, depth in RHN_SHAPES[:3]
    ]
    cases += [
        Case(
            "bnlstm", "training", *shape, "loops",
            contestants=("fastrnn", *peers(*shape), "fastrnn-plain"),
            quick=shape == (50, 32, 100),
        )
        for shape in BNLSTM_SHAPES
    ]  # fmt: skip
    return cases


def regularised() -> list[Case]:
    """Regularised layers beside the plain ones, and an eager loop for recurrent dropout."""
    cases = []
    for cell in ("lstm", "gru"):
        for option in ("update", "cell", "state", "zoneout", "weight"):
            if cell == "gru" and option == "cell":
                continue
            looped = cell == "lstm" and option == "update"
            contestants = ("fastrnn", "fastrnn-plain", *(("loop",) if looped else ()))
            for shape in ((100, 32, 256), (100, 8, 512), (200, 64, 128)):
                quick = shape == (100, 32, 256) and option in ("update", "zoneout")
                cases.append(
                    Case(
                        cell, "training", *shape, "regularised",
                        option=option, contestants=contestants, quick=quick and cell == "lstm",
                    )
                )  # fmt: skip
    return cases


def layer_norm() -> list[Case]:
    """Layer-normalised layers against an eager loop, beside the plain ones."""
    return [
        Case(
            cell, "training", *shape, "layer_norm", option="layer_norm",
            contestants=("fastrnn", "loop", "fastrnn-plain"),
            quick=cell == "lstm" and shape == (100, 32, 256),
        )
        for cell in ("lstm", "gru")
        for shape in ((100, 32, 256), (100, 8, 512), (100, 1, 512), (200, 64, 128))
    ]  # fmt: skip


def registry() -> list[Case]:
    """Every case, in the order it is run."""
    return [
        *grid(), *step(), *overhead(), *bf16(), *isa(), *options(), *loops(), *regularised(),
        *layer_norm(), *memory(),
    ]  # fmt: skip


def select(*, quick: bool, only: str | None = None) -> list[Case]:
    """The cases of --quick or --full, narrowed by a glob over ids (a part of the id is enough).

    Raises ValueError if nothing matches.
    """
    chosen = [case for case in registry() if case.quick or not quick]
    if only is not None:
        pattern = only if "*" in only else f"*{only}*"
        chosen = [case for case in chosen if fnmatch.fnmatchcase(case.id, pattern)]
        if not chosen:
            size = "--quick" if quick else "--full"
            raise ValueError(
                f"--only {only!r} matches no case of {size}; see `python -m benchmarks --list`"
            )
    return chosen
