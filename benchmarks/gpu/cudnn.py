"""Which algorithm torch asks cuDNN for, by torch's own rules, for a case.

A request only: what cuDNN does inside STANDARD is closed. The names go beside the numbers, so that
a reader sees what a speedup was over. The rules are the library's (`fastrnn.gpu.times`), whose
dispatch goes by them.
"""

from __future__ import annotations

from benchmarks.cases import Case
from fastrnn.gpu import times


def algorithm(case: Case, backward: bool, sms: int = 132) -> str:
    """PERSIST_STATIC_SMALL_H, PERSIST_STATIC or STANDARD; "" for cells that cuDNN lacks.

    One layer on compute capability 8.0 or newer.
    """
    return times.algorithm(
        case.cell, case.dtype or "float32", case.N, case.input_size, case.H, backward=backward,
        directions=case.directions, proj=case.proj, packed=bool(case.ragged), sms=sms,
    )  # fmt: skip


def describe(case: Case, sms: int = 132) -> str:
    """Of the passes that a case has; "" for cells that cuDNN lacks."""
    forward = algorithm(case, False, sms)
    if not forward or case.mode != "training":
        return forward
    backward = algorithm(case, True, sms)
    return forward if forward == backward else f"{forward}, backward {backward}"
