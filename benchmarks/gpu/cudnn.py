"""Which algorithm torch asks cuDNN for, by torch's own rules (aten/src/ATen/native/cudnn/RNN.cpp).

A request only: what cuDNN does inside STANDARD is closed. The names go beside the numbers, so that
a reader sees what a speedup was over.
"""

from __future__ import annotations

from benchmarks.cases import Case

SMALL_H = {  # dense, all dtypes but float64: largest H forward, backward
    "lstm": (192, 128),
    "gru": (192, 128),
    "rnn": (384, 256),
}


def algorithm(case: Case, backward: bool, sms: int = 132) -> str:
    """PERSIST_STATIC_SMALL_H, PERSIST_STATIC or STANDARD; "" for cells that cuDNN lacks.

    One layer on compute capability 8.0 or newer.
    """
    if case.cell not in SMALL_H:
        return ""
    if case.proj or case.ragged or case.dtype == "float64":
        return "STANDARD"
    if SMALL_H[case.cell][backward] >= case.H:
        return "PERSIST_STATIC_SMALL_H"
    if case.cell == "gru" or case.bidirectional or case.dtype != "float16" or sms < 98:
        return "STANDARD"
    whole = case.H <= 1024 and case.H % 128 == 0 and case.input_size % 128 == 0
    fits = case.N % 8 == 0 and case.N <= 128
    if case.cell == "rnn":
        fits = fits and (case.N < 96 or case.H < 896)
    return "PERSIST_STATIC" if whole and fits else "STANDARD"


def describe(case: Case, sms: int = 132) -> str:
    """Of the passes that a case has; "" for cells that cuDNN lacks."""
    forward = algorithm(case, False, sms)
    if not forward or case.mode != "training":
        return forward
    backward = algorithm(case, True, sms)
    return forward if forward == backward else f"{forward}, backward {backward}"
