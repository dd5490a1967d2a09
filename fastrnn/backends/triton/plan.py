"""How a layer is cut into programs: all numbers of the Triton backend, in one place.

Nothing here was measured on a GPU; docs/triton-kernels.md has the reasoning.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BATCH_NORM_TILE", "MATRIX_BYTES", "Plan", "choose", "padded", "refusal"]

# Weights up to this size are read once and kept on chip for the whole loop: half of an SM's 256 KB
# of registers. Larger ones are read again in each step, one gate at a time.
KEPT_BYTES = 128 * 1024
# The largest matrix of one gate: a tile of this size has to be in registers at once.
MATRIX_BYTES = 128 * 1024
# Units x batch rows of one program, which also has a few tiles of gates in registers.
TILE = 8192
# A batch-normalised LSTM has its whole batch in one program.
BATCH_NORM_TILE = 8192
# More programs than this are made larger instead: about two for each SM of a large GPU.
PROGRAMS = 256
BATCH_ROWS = (16, 32, 64)


class Plan(NamedTuple):
    """Padded sizes, batch rows of a program, and whether weights are read again in each step."""

    units: int
    outputs: int
    rows: int
    warps: int
    stream: bool

    def __str__(self) -> str:
        kept = "read again in each step" if self.stream else "kept on chip"
        shape = f"programs of {self.rows} rows, {self.warps} warps"
        return f"{shape}, weights {kept}, all steps in one launch"


def padded(size: int) -> int:
    """The power of two that a size takes in a tile; a matrix product has 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def choose(
    cell: str, gates: int, hidden: int, out: int, itemsize: int, size: int, directions: int
) -> Plan:
    """A layer of ``gates`` recurrent matrices (hidden, out) for a batch of ``size``."""
    units, outputs = padded(hidden), padded(out)
    matrices = gates + (out != hidden)
    # A micro-step of a Recurrent Highway Network has matrices of its own, told by a run-time index.
    stream = cell == "rhn" or matrices * units * outputs * itemsize > KEPT_BYTES
    if cell == "bnlstm":
        return Plan(units, outputs, padded(size), warps(units), stream)
    rows = BATCH_ROWS[0]
    for more in BATCH_ROWS[1:]:
        if -(-size // rows) * directions > PROGRAMS and units * more <= TILE:
            rows = more
    return Plan(units, outputs, rows, warps(units), stream)


def warps(units: int) -> int:
    """Each warp of a matrix product has 16 units of every gate, and some more work to hide."""
    return max(2, min(8, units // 16))


def refusal(cell: str, hidden: int, itemsize: int, size: int) -> str:
    """Why a layer does not fit; empty if it does."""
    units = padded(hidden)
    if units * units * itemsize > MATRIX_BYTES:
        most = 1 << ((MATRIX_BYTES // itemsize).bit_length() - 1) // 2
        return (
            f"a gate's recurrent matrix of hidden size {hidden} does not fit on chip, the largest "
            f"is {most} in this dtype"
        )
    if cell == "bnlstm" and units * padded(size) > BATCH_NORM_TILE:
        return (
            f"batch statistics need the whole batch in one program, and {size} rows of {hidden} "
            f"units do not fit: rows times units, as powers of two, may be {BATCH_NORM_TILE}"
        )
    return ""
