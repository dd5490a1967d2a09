"""Between the operators' tensors and the kernels': precision, noise, launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastrnn.backends.rows import tf32_allowed
from fastrnn.noise import Noise, seed_on
from fastrnn.reference import philox

__all__ = [
    "INTERPRETED",
    "launch",
    "noise_arguments",
    "precision",
    "stacked",
]

# Triton reads TRITON_INTERPRET where it is imported; what it made of its kernels cannot change.
INTERPRETED = not isinstance(triton.language.zeros, triton.runtime.JITFunction)

# One stage: the loop over time has nothing that could be loaded steps ahead into shared memory.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made, by the switch that cuDNN's recurrent layers follow."""
    if dtype != torch.float32:
        return "ieee"
    # Three TF32 products have the digits of one in float32, and their weights fit in registers.
    return "tf32" if tf32_allowed() else "ieee" if INTERPRETED or torch.version.hip else "tf32x3"


def noise_arguments(
    text: str, seed: Tensor | None, device: torch.device, cell_state: bool
) -> dict[str, Any]:
    """The kernels' arguments for recurrent dropout and zoneout."""
    noise = Noise.parse(text)
    if noise.training and seed is None:
        raise ValueError(f"seed: got None, expected a tensor for noise {text!r}")
    drawn = noise.training and bool(noise.mode or noise.zoneout_h or noise.zoneout_c)
    value = 1.0 if noise.training else 1.0 - noise.drop
    if noise.mode == "state":
        value = 1.0 / (1.0 - noise.drop) if noise.drop < 1.0 else 0.0
    found = {
        "seed": seed_on(seed, device) if drawn and seed is not None else None,
        "stream": noise.layer << 8,
        "drop_threshold": philox.threshold(noise.drop),
        "drop_value": value,
        "zone_h_threshold": philox.threshold(noise.zoneout_h),
        "zone_h_value": 1.0 if noise.training else 1.0 - noise.zoneout_h,
        "MODE": noise.mode,
        "TRAINING": drawn,
        "SEQUENCE": int(noise.sequence),
        "ZONE_H": noise.zoneout_h > 0,
    }
    if cell_state:
        found["zone_c_threshold"] = philox.threshold(noise.zoneout_c)
        found["zone_c_value"] = 1.0 if noise.training else 1.0 - noise.zoneout_c
        found["ZONE_C"] = noise.zoneout_c > 0
    return found


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor per direction, one after the other."""
    if len(tensors) == 1:
        return tensors[0].contiguous().unsqueeze(0)
    return torch.stack(list(tensors))


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, warps: int, **arguments: Any) -> None:
    """Run a kernel on the device of ``like``, on torch's current stream."""
    arguments["WIDEN"] = INTERPRETED
    if like.is_cuda:
        with torch.cuda.device(like.device):
            kernel[grid](**arguments, **OPTIONS, num_warps=warps)
    else:
        kernel[grid](**arguments, **OPTIONS, num_warps=warps)
