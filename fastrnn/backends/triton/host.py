"""Between the operators' tensors and the kernels': rows, precision, noise, launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastrnn.backends.triton.plan import LEAST_SHARED, SHARED
from fastrnn.noise import Noise
from fastrnn.reference import philox

__all__ = [
    "INTERPRETED",
    "Rows",
    "dense",
    "describe",
    "launch",
    "noise_arguments",
    "precision",
    "shared_memory",
    "stacked",
]

# Triton reads TRITON_INTERPRET where it is imported; what it made of its kernels cannot change.
INTERPRETED = not isinstance(triton.language.zeros, triton.runtime.JITFunction)

# One stage: the loop over time has nothing that could be loaded steps ahead into shared memory.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


class Rows(NamedTuple):
    """Steps of sequences as rows of matrices: row (t, n) is t * stride_t + n * stride_n, or
    offsets[t] + n of packed data."""

    steps: int
    size: int
    rows: int
    stride_t: int
    stride_n: int
    lengths: Tensor | None
    reset: Tensor | None
    offsets: Tensor | None

    def arguments(self) -> dict[str, Any]:
        return {
            "lengths": self.lengths,
            "reset": self.reset,
            "offsets": self.offsets,
            "T": self.steps,
            "N": self.size,
            "R": self.rows,
            "stride_t": self.stride_t,
            "stride_n": self.stride_n,
            "zero": 0,
        }

    def flat(self, x: Tensor) -> Tensor:
        """The rows of x as a matrix."""
        return x.reshape(self.rows, x.size(-1))

    def sequence_of_row(self, device: torch.device) -> Tensor:
        """(rows,) which sequence each row belongs to."""
        if self.offsets is None:
            rows = torch.arange(self.rows, device=device)
            return rows % self.size if self.stride_n == 1 else rows // self.steps
        rows = torch.arange(self.rows, device=device)
        step = torch.searchsorted(self.offsets, rows, right=True) - 1
        return rows - self.offsets[step]

    def without_padding(self, x: Tensor) -> Tensor:
        """The rows of x, zero past the end of a sequence, where there may be NaN."""
        x = self.flat(x)
        if self.lengths is None or self.offsets is not None:
            return x
        return x.masked_fill(self.padding(x.device).reshape(-1, 1), 0.0)

    def padding(self, device: torch.device) -> Tensor:
        """(T, N), or (N, T) if batch_first: True past the end of a sequence."""
        assert self.lengths is not None
        t = torch.arange(self.steps, device=device)
        dead = t[:, None] >= self.lengths[None, :]
        return dead if self.stride_n == 1 else dead.t()


def describe(
    x: Tensor,
    size: int,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
) -> Rows:
    """The rows of x in the layouts of ``fastrnn.ops.layer``."""
    if batch_sizes is not None:
        starts = torch.cumsum(batch_sizes, 0) - batch_sizes
        ends = (batch_sizes.unsqueeze(1) > torch.arange(size)).sum(0)
        ends, starts = ends.to(x.device), starts.to(x.device)
        return Rows(batch_sizes.size(0), size, x.size(0), 0, 1, ends, None, starts)
    steps = x.size(1 if batch_first else 0)
    stride_t, stride_n = (1, steps) if batch_first else (size, 1)
    lengths = None if lengths is None else lengths.to(x.device).contiguous()
    # Rows of reset are the rows of x.
    clear = None if reset is None else reset.to(x.device).contiguous().view(torch.uint8)
    return Rows(steps, size, steps * size, stride_t, stride_n, lengths, clear, None)


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a program on the device of x may have."""
    if not x.is_cuda:
        return SHARED
    properties = torch.cuda.get_device_properties(x.device)
    return getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED)


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made, by the switch that cuDNN's recurrent layers follow."""
    if dtype != torch.float32:
        return "ieee"
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        # torch refuses to name one precision where convolutions and RNNs were set apart.
        allowed = False
    # Three TF32 products have the digits of one in float32, and their weights fit in registers.
    return "tf32" if allowed else "ieee" if INTERPRETED or torch.version.hip else "tf32x3"


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
        "seed": seed.to(device) if drawn and seed is not None else None,
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


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, warps: int, **arguments: Any) -> None:
    """Run a kernel on the device of ``like``, on torch's current stream."""
    arguments["WIDEN"] = INTERPRETED
    if like.is_cuda:
        with torch.cuda.device(like.device):
            kernel[grid](**arguments, **OPTIONS, num_warps=warps)
    else:
        kernel[grid](**arguments, **OPTIONS, num_warps=warps)
