"""How fast a case could be on a GPU: three floors, the largest counts.

    products  all matrix products of the case over the measured matmul rate of its dtype
    traffic   what has to pass through device memory over the measured copy rate (read plus written)
    chain     T steps (times the micro-steps of an RHN, twice in training) of one exchange each:
              the measured hop between CTAs. One CTA alone would not pay it, nor reach the others.

Traffic, bytes per row (time step and sequence), e the dtype's size, G gates, D directions:

    forward   e (I + D (2 G H + H))               x read, input terms written and read, y written
    training  that + D (e G H + 4 H)               tape and cells written,
              + D (e (2 G H + H) + 4 H)            tape, dy, cells read, gate gradients written,
              + e (2 D G H + 2 I + D H)            read by the weight and input products; x, y, dx
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import GATES, Case


def bytes_per_element(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4


def traffic(case: Case) -> float:
    """Bytes through device memory."""
    e, width = bytes_per_element(case.dtype), GATES[case.cell] * case.H * case.depth
    both, H, inputs = case.directions, case.H, case.input_size
    row = e * (inputs + both * (2 * GATES[case.cell] * H + H))
    if case.mode == "training":
        row += both * (e * width + 4 * H)
        row += both * (e * (2 * width + H) + 4 * H)
        row += e * (2 * both * width + 2 * inputs + both * H)
    return float(case.T * case.N * row)


@dataclass
class Ceilings:
    """Measured by stage `probes`: FLOP/s by dtype, bytes per second of a copy, seconds of a hop."""

    matmul: dict[str, float] = field(default_factory=dict)
    copy: float = 0.0
    hop: float = 0.0

    @classmethod
    def from_probes(cls, probes: dict[str, Any]) -> Ceilings:
        """Of probes.json; what was not measured is no floor."""
        ceilings = probes.get("ceilings", {})
        return cls(
            dict(ceilings.get("matmul_flops", {})),
            float(ceilings.get("copy_bytes", 0.0)),
            float(ceilings.get("hop_seconds", 0.0)),
        )

    def floors(self, case: Case) -> dict[str, float]:
        """Seconds by floor."""
        rate = self.matmul.get(case.dtype or "float32", 0.0)
        passes = 2 if case.mode == "training" else 1
        return {
            "products": case.flops / rate if rate else 0.0,
            "traffic": traffic(case) / self.copy if self.copy else 0.0,
            "chain": case.T * case.depth * passes * self.hop,
        }

    def bound_seconds(self, case: Case) -> float | None:
        """The largest floor; None if nothing was measured."""
        return max(self.floors(case).values()) or None
