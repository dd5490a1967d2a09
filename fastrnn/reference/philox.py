"""Philox4x32-10 in torch's integers: the random words of csrc/cells/philox.h on any device.

Word u of row (t, n) in a stream depends on (seed, stream, t, n, u) alone: it is word u // 16 % 4 of
Philox of the counter (u // 64 * 16 + u % 16, n, t, stream) under the two halves of the seed.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep", "philox4x32", "threshold", "words"]

_M = (0xD2511F53, 0xCD9E8D57)
_W = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _halves(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    # The product wraps at 64 bits, which leaves all of them right.
    product = x * m
    return (product >> 32) & _LOW, product & _LOW


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds; words are int64 tensors of values 0 .. 2^32 - 1 that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _halves(c0, _M[0])
        high1, low1 = _halves(c2, _M[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W[0]) & _LOW, (k1 + _W[1]) & _LOW
    return c0, c1, c2, c3


def words(
    seed: Tensor, stream: int, steps: int, rows: int, units: int, device: torch.device
) -> Tensor:
    """(steps, rows, units) int64 of values 0 .. 2^32 - 1; seed is one int64 element."""
    seed = seed.reshape(()).to(device)
    draws = -(-units // 64)

    def line(size: int, dim: int) -> Tensor:
        shape = [1, 1, 1]
        shape[dim] = size
        return torch.arange(size, device=device).view(shape)

    counter = (line(16 * draws, 2), line(rows, 1), line(steps, 0), torch.full_like(seed, stream))
    four = philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))
    lanes = [word.expand(steps, rows, 16 * draws).unflatten(2, (draws, 16)) for word in four]
    return torch.stack(lanes, 3).flatten(2)[..., :units]


def threshold(p: float) -> int:
    """A value is kept where its word is at least this: 0 keeps all, 2^32 none."""
    return 0 if p <= 0 else 1 << 32 if p >= 1 else int(p * 4294967296.0 + 0.5)


def keep(
    seed: Tensor, stream: int, p: float, steps: int, rows: int, units: int, device: torch.device
) -> Tensor:
    """(steps, rows, units) bool, False with probability p."""
    return words(seed, stream, steps, rows, units, device) >= threshold(p)
