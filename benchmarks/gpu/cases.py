"""The campaign's grid, as data: stage -> cases, the most telling shapes first.

I = H. A stage that is cut off by its time limit has done the first of its cases and goes on there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from benchmarks.cases import Case

STEPS = 1024
OURS = ("fastrnn", "torch")
BOTH = ("fastrnn", "fastrnn-triton", "torch")
LOOPED = ("fastrnn", "fastrnn-triton", "loop", "loop-compiled")
MODES = ("forward", "training")

# (H, N) of the wide grid. 16 rows first: the shape in which published numbers are.
WIDE = tuple(product((768, 512, 1024, 256), (16, 64, 1, 32, 8)))
SMALL = tuple(product((128, 64, 192, 32), (64, 1, 16, 256)))
LARGE = (*product((1536, 2048), (16, 1, 64)), *product((512, 1024, 256), (128, 256)))
MANY_ROWS = tuple(product((128, 64, 32), (512, 2048, 1024)))


def headline() -> Iterator[Case]:
    """The shape of the published comparison."""
    for dtype in ("float16", "bfloat16"):
        for mode in MODES:
            yield Case(
                "lstm", mode, STEPS, 16, 768, "headline", dtype=dtype,
                contestants=(*BOTH[:1], "torch", "flashrnn"),
            )  # fmt: skip


def wide(group: str, dtype: str, shapes: tuple[tuple[int, int], ...] = WIDE) -> Iterator[Case]:
    for (H, N), cell, mode in product(shapes, ("lstm", "gru"), MODES):
        yield Case(cell, mode, STEPS, N, H, group, dtype=dtype, contestants=OURS)


def options() -> Iterator[Case]:
    """Two directions, and packed batches: where torch always asks for STANDARD."""
    for (H, N), cell, mode in product(product((512, 256, 1024), (16, 64)), ("lstm", "gru"), MODES):
        extra = {"dtype": "bfloat16", "contestants": OURS}
        yield Case(cell, mode, 512, N, H, "options", bidirectional=True, **extra)
        yield Case(cell, mode, 512, N, H, "options", ragged="packed", **extra)


def small() -> Iterator[Case]:
    """Where cuDNN has kernels made for few units."""
    for (H, N), cell, mode in product(SMALL, ("lstm", "gru", "rnn"), MODES):
        contestants = BOTH if H <= 128 else OURS
        yield Case(cell, mode, 512, N, H, "small", dtype="bfloat16", contestants=contestants)


def many_rows() -> Iterator[Case]:
    """Few units and many rows: Triton's region."""
    for (H, N), cell, mode in product(MANY_ROWS, ("lstm", "gru"), MODES):
        yield Case(cell, mode, 256, N, H, "many_rows", dtype="bfloat16", contestants=BOTH)


def loops() -> Iterator[Case]:
    """Cells that torch.nn lacks, against loops. Depth 5 at H=1024 and depth 10 at H=830: Zilly et
    al.'s language models; T=784, H=100: pixel by pixel, Cooijmans et al."""
    for dtype, mode in product(("bfloat16", ""), ("training", "forward")):
        extra = {"dtype": dtype, "contestants": LOOPED}
        yield Case("rhn", mode, 35, 20, 830, "loops", depth=10, **extra)
        yield Case("bnlstm", mode, 100, 128, 512, "loops", **extra)
        yield Case("rhn", mode, 35, 20, 1024, "loops", depth=5, **extra)
        yield Case("bnlstm", mode, 784, 64, 100, "loops", **extra)


GRIDS = {
    "grid-headline": lambda: list(headline()),
    "grid-16bit": lambda: list(wide("wide", "bfloat16")),
    "grid-loops": lambda: list(loops()),
    "grid-fp32": lambda: list(wide("wide32", "")),
    "grid-options": lambda: list(options()),
    "grid-small": lambda: list(small()),
    "grid-triton": lambda: list(many_rows()),
    "grid-large": lambda: list(wide("large", "bfloat16", LARGE)),
}


def all_cases() -> list[Case]:
    return [case for make in GRIDS.values() for case in make()]
