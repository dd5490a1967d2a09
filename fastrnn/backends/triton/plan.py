"""How a layer is cut into programs: all numbers of the Triton backend, in one place.

Nothing here was measured on a GPU; docs/triton-kernels.md has the reasoning.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "LEAST_SHARED",
    "MOST_SHARED",
    "SHARED",
    "Plan",
    "choose",
    "least_rows",
    "padded",
    "refusal",
]

# Shared memory of a block on GPUs of compute capability 8.0, the smallest that the limits in the
# documentation speak of. Others are asked for theirs.
SHARED = 163 * 1024
# What is taken for granted of a GPU that torch tells nothing about.
LEAST_SHARED = 64 * 1024
# By compute capability, for a torch that does not tell.
MOST_SHARED = {
    (8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 7): 163 * 1024, (8, 9): 99 * 1024,
    (9, 0): 227 * 1024, (10, 0): 227 * 1024, (12, 0): 99 * 1024,
}  # fmt: skip
# Weights up to this size are read once and kept on chip for the whole loop: half of an SM's 256 KB
# of registers. Larger ones are read again in each step, one gate at a time.
KEPT = 128 * 1024
# Beside a matrix, shared memory holds the tile of states that it is multiplied with.
BESIDE = 16 * 1024
# Units x batch rows of one program: a few tiles of this size have to be in registers, with no more
# than EACH elements in a thread.
TILE = 4096
EACH = 16
# As TILE, for a batch-normalised LSTM: its whole batch has to be in one program.
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
    cell: str,
    gates: int,
    hidden: int,
    out: int,
    itemsize: int,
    size: int,
    directions: int,
    shared: int = SHARED,
) -> Plan:
    """A layer of ``gates`` recurrent matrices (hidden, out) for a batch of ``size``."""
    units, outputs = padded(hidden), padded(out)
    matrices = gates + (out != hidden)
    # Three TF32 products, in the place of one in float32, need two planes of each weight.
    planes = 2 if itemsize == 4 else 1
    # A micro-step of a Recurrent Highway Network has matrices of its own, told by a run-time index.
    small = planes * matrices * units * outputs * itemsize <= min(KEPT, shared - BESIDE)
    stream = cell == "rhn" or not small
    # A warp has 16 units of every gate.
    warps = max(4, min(16, units // 16))
    if cell == "bnlstm":
        rows = padded(size)
        return Plan(units, outputs, rows, max(4, min(16, units * rows // 128)), stream)
    rows = BATCH_ROWS[0]
    most = min(TILE, EACH * 32 * warps) // units
    for more in BATCH_ROWS[1:]:
        if -(-size // rows) * directions > PROGRAMS and more <= most:
            rows = more
    return Plan(units, outputs, rows, warps, stream)


def least_rows(rows: int, directions: int) -> int:
    """The smallest batch that ``choose`` gives programs of so many rows."""
    return 1 if rows == BATCH_ROWS[0] else rows // 2 * (PROGRAMS // directions) + 1


def refusal(cell: str, hidden: int, itemsize: int, size: int, shared: int = SHARED) -> str:
    """Why a layer does not fit; empty if it does."""
    units, room = padded(hidden), min(KEPT, shared - BESIDE)
    if units * units * itemsize > room:
        most = 16
        while 4 * most * most * itemsize <= room:
            most *= 2
        return (
            f"the recurrent matrix of one gate with hidden size {hidden} does not fit on chip; "
            f"the largest hidden size is {most} in this dtype on this device"
        )
    if cell == "bnlstm" and units * padded(size) > BATCH_NORM_TILE:
        return (
            f"batch statistics need the whole batch in one program, and {size} rows of {hidden} "
            f"units do not fit: their product, each as a power of two, may be {BATCH_NORM_TILE}"
        )
    return ""
