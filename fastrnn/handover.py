"""Where torch's own kernels were measured faster than ours: data for ``fastrnn.dispatch``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastrnn.backends import cpu
from fastrnn.bf16 import BF16_CELLS, bf16_allowed, bf16_pays


class Handover(NamedTuple):
    """A box of shapes, ends included, in which torch's own kernel was measured faster; ``vendor``:
    on whose CPUs only, since torch's products are of MKL, which does less with AMD's AVX-512."""

    dtype: torch.dtype
    training: bool
    steps: tuple[int, int]
    batch: tuple[int, int]
    hidden: tuple[int, int]
    measured: str
    needs_amx: bool = False
    needs_avx512: bool = False
    vendor: str = ""

    def covers(
        self, dtype: torch.dtype, training: bool, steps: int, batch: int, hidden: int
    ) -> bool:
        return (
            dtype == self.dtype
            and training == self.training
            and self.steps[0] <= steps <= self.steps[1]
            and self.batch[0] <= batch <= self.batch[1]
            and self.hidden[0] <= hidden <= self.hidden[1]
            and (_AMX or not self.needs_amx)
            and (_AVX512 or not self.needs_avx512)
            and self.vendor in ("", _VENDOR)
        )


_ANY = (0, 1 << 62)
_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_VENDOR = cpu.vendor()
_RESULTS = "benchmarks/results/intel-xeon-family-6-model-167/full.json"

# Cell -> boxes. Filled from measurements, never by guess.
HANDOVER: dict[str, tuple[Handover, ...]] = {
    "lstm": (
        Handover(
            torch.bfloat16, False, _ANY, (8, _ANY[1]), _ANY,
            "oneDNN's bfloat16 LSTM uses this CPU's AMX (1.4 to 2.4 times), ours does not yet",
            needs_amx=True,
        ),
        Handover(
            torch.float32, False, (8, _ANY[1]), (16, 64), (448, 768),
            f"oneDNN with AVX-512 is 1.05 to 1.13 times faster, {_RESULTS}",
            needs_avx512=True,  # with AVX2 ours is ahead, docs/cpu-kernels.md
            vendor="intel",
        ),
    ),
    "gru": (
        Handover(
            torch.float32, True, (1, 1), _ANY, (448, _ANY[1]),
            "one training step is bound by memory, torch's own is up to 1.4 times faster",
            vendor="intel",
        ),
    ),
    "rnn_tanh": (
        Handover(
            torch.float32, True, (1, 1), _ANY, (129, _ANY[1]),
            "one training step is bound by memory and calls, torch's own is up to 1.5 times faster",
            vendor="intel",
        ),
    ),
}  # fmt: skip
HANDOVER["rnn_relu"] = HANDOVER["rnn_tanh"]


def handed_over(
    cell: str, dtype: torch.dtype, training: bool, steps: int, batch: int, hidden: int, plain: bool
) -> Handover | None:
    # plain: neither packed nor projected, where torch leaves its fast kernels.
    for box in HANDOVER.get(cell, ()) if plain else ():
        if box.covers(dtype, training, steps, batch, hidden):
            return None if _takes_bf16_weights(cell, dtype, training, batch) else box
    return None


def _takes_bf16_weights(cell: str, dtype: torch.dtype, training: bool, batch: int) -> bool:
    """Whether ours would run with bfloat16 weights: the boxes were measured against float32."""
    inference = dtype == torch.float32 and not training and cell in BF16_CELLS
    return inference and bf16_allowed() and bf16_pays(batch)
