"""Whether float32 layers on the CPU take bfloat16 weights: torch's switches, and where it pays."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastrnn.kinds import KINDS

__all__ = ["BF16_CELLS", "bf16_allowed", "bf16_pays"]

# Those whose kernels take float32 activations with bfloat16 weights.
BF16_CELLS = frozenset(name for name, kind in KINDS.items() if not kind.norms)
_rnn_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def _constant_in_graphs(function: Callable[[], bool]) -> Callable[[], bool]:
    """What assume_constant_result sets; calling that would import all of torch._dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def bf16_pays(batch: int) -> bool:
    """Few rows wait for weights, whose bytes are halved; many gain only where vdpbf16ps is fast."""
    return batch <= 4 or _is_fast()


@_constant_in_graphs
def _is_fast() -> bool:
    from fastrnn.backends import cpu

    return cpu.isa() == "avx512bf16"


@_constant_in_graphs
def bf16_allowed() -> bool:
    """Whether torch's switches allow bfloat16 weights for float32 input on the CPU."""
    # torch before 2.9 has no switch of its own for recurrent layers.
    if _rnn_precision is not None and _rnn_precision("mkldnn", "rnn") == "bf16":
        return True
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:
        # torch refuses to name one precision where its backends were set to different ones.
        return False
