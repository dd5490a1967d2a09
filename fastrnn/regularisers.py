"""Recurrent dropout, zoneout and weight dropout: their arguments and their masks.

``Regularisers`` holds the checked arguments of a module. For a call each layer gets a
``fastrnn.noise.Noise`` beside the call's seed. No mask is stored: each is a function of the seed
(csrc/cells/philox.h) and is made where it is needed, in the forward and again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastrnn import ops
from fastrnn.noise import MODES, Noise, seed_on
from fastrnn.reference import Masks

__all__ = [
    "DEFAULT_MODE",
    "Noise",
    "Regularisers",
    "check",
    "draw_masks",
    "draw_seed",
    "drop_weights",
    "probability",
]

_MODES = {"lstm": MODES, "gru": ("update", "state"), "rnn": ("state",)}
DEFAULT_MODE = {"lstm": "update", "gru": "update", "rnn": "state"}
_PERIODS = ("step", "sequence")
# What a random word decides: numbers shared with csrc/cells/philox.h.
_RECURRENT, _ZONEOUT_H, _ZONEOUT_C, _WEIGHT = range(4)


class Regularisers(NamedTuple):
    """The checked arguments of a module or function."""

    mode: str = ""
    sequence: bool = False
    drop: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    weight: float = 0.0

    def noise(self, layer: int, training: bool) -> str:
        """What the kernels of a layer have to do; "" for nothing."""
        # The inverted masks of "state" leave nothing to be done in evaluation.
        drops = self.drop > 0 and (training or self.mode != "state")
        if not (drops or self.zoneout_h or self.zoneout_c):
            return ""
        mode, drop = (self.mode, self.drop) if drops else ("", 0.0)
        sequence = self.sequence and drops
        return Noise(layer, training, mode, sequence, drop, self.zoneout_h, self.zoneout_c).text()

    def active(self, training: bool) -> bool:
        """Whether a call computes anything else than without regularisers."""
        return bool(self.noise(0, training)) or (training and self.weight > 0)

    def names(self) -> str:
        """For ``fastrnn.dispatch``; under torch.compile only that there are some."""
        return "regularisers" if is_compiling() else str(self)

    def __str__(self) -> str:
        words = []
        if self.drop:
            per = "sequence" if self.sequence else "step"
            words.append(f"recurrent dropout {self.drop:g} ({self.mode}, per {per})")
        if self.zoneout_h or self.zoneout_c:
            same = self.zoneout_h == self.zoneout_c or not self.zoneout_c
            pair = f"{self.zoneout_h:g}" if same else f"({self.zoneout_h:g}, {self.zoneout_c:g})"
            words.append(f"zoneout {pair}")
        if self.weight:
            words.append(f"weight dropout {self.weight:g}")
        return ", ".join(words)


def regularisers_of(
    cell: str, recurrent_dropout: Any, mode: str, per: str, zoneout: Any, weight_dropout: Any
) -> Regularisers | None:
    """``check``, without its cost where everything is off: None there, which every dynamo can
    compare."""
    plain = not (recurrent_dropout or zoneout or weight_dropout)
    for p in (recurrent_dropout, zoneout, weight_dropout):  # False and None are no probabilities
        plain = plain and isinstance(p, (int, float)) and not isinstance(p, bool)
    if plain and per == "step" and mode == DEFAULT_MODE[cell]:
        return None
    return check(cell, recurrent_dropout, mode, per, zoneout, weight_dropout)


def check(
    cell: str,
    recurrent_dropout: float = 0.0,
    mode: str | None = None,
    per: str = "step",
    zoneout: Any = 0.0,
    weight_dropout: float = 0.0,
) -> Regularisers:
    """Check the arguments of a module of ``cell`` "lstm", "gru" or "rnn".

    Raises:
        ValueError: a probability outside [0, 1], an unknown mode or period, a mode that the cell
            does not have, or a zoneout pair for a cell with one state.
        TypeError: a probability that is no number.
    """
    name = cell.upper()
    mode = DEFAULT_MODE[cell] if mode is None else mode
    if mode not in _MODES[cell]:
        known = " or ".join(repr(m) for m in _MODES[cell])
        others = [other.upper() for other, modes in _MODES.items() if mode in modes]
        hint = f"; {mode!r} is for {' and '.join(others)}" if others else ""
        raise ValueError(f"recurrent_dropout_mode: got {mode!r}, expected {known} for {name}{hint}")
    if per not in _PERIODS:
        raise ValueError(f"recurrent_dropout_per: got {per!r}, expected 'step' or 'sequence'")
    drop = probability("recurrent_dropout", recurrent_dropout)
    weight = probability("weight_dropout", weight_dropout)
    if isinstance(zoneout, (tuple, list)):
        if cell != "lstm":
            raise ValueError(
                f"zoneout: got {zoneout!r}, expected one probability: {name} has one state, "
                "only an LSTM takes a pair (p_h, p_c)"
            )
        if len(zoneout) != 2:
            raise ValueError(f"zoneout: got {len(zoneout)} values, expected p or (p_h, p_c)")
        h, c = [probability(f"zoneout[{i}]", p) for i, p in enumerate(zoneout)]
    else:
        h = c = probability("zoneout", zoneout)
    return Regularisers(
        mode if drop else "", per == "sequence", drop, h, c if cell == "lstm" else 0.0, weight
    )


def probability(name: str, p: Any) -> float:
    """p as a float; an error names the argument."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(
            f"{name}: got {p!r} ({type(p).__name__}), expected a probability, a number in [0, 1]"
        )
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: got {p!r}, expected a probability in [0, 1]")
    return float(p)


def draw_seed() -> Tensor:
    """A seed from torch's default CPU generator: one draw, which torch.compile sees."""
    return torch.randint(0, (1 << 63) - 1, (1,), dtype=torch.int64, device="cpu")


def _stream(layer: int, direction: int, kind: int) -> int:
    return layer << 8 | direction << 4 | kind


def drop_weights(
    weights: Sequence[Tensor], seed: Tensor, p: float, num_layers: int, directions: int
) -> list[Tensor]:
    """A copy of flat weights in which the elements of each weight_hh are zeroed with probability p.

    Those that stay are divided by 1 - p. Differentiable: gradients meet the same mask.
    """
    per = len(weights) // (num_layers * directions)
    found: list[Tensor] = []
    for k in range(num_layers):
        for d in range(directions):
            # A new list: an index is a symbol where torch 2.6 traces num_layers.
            start = (k * directions + d) * per
            w_ih, w, *others = weights[start : start + per]
            keep = _keep(seed, _stream(k, d, _WEIGHT), p, 1, w.size(0), w.size(1), w.device)
            found += [w_ih, w * _inverted(keep[0], p, w.dtype), *others]
    return found


def draw_masks(
    noise: Noise,
    seed: Tensor | None,
    direction: int,
    shape: tuple[int, int],
    hidden: int,
    out: int,
    like: Tensor,
) -> Masks:
    """The factors of a reference cell: masks (T, N, K) in training, expectations in evaluation.

    Args:
        shape: T and N.
        hidden, out: H, and the size of h.
        like: a tensor of the dtype and on the device of the cell's.
    """
    steps, rows = shape

    def factor(kind: int, p: float, units: int, steps: int) -> Tensor | float:
        if not noise.training:
            return 1 - p
        assert seed is not None
        stream = _stream(noise.layer, direction, kind)
        return _keep(seed, stream, p, steps, rows, units, like.device).to(like.dtype)

    factors: dict[str, Any] = {}
    if noise.drops:
        units = out if noise.mode == "state" else hidden
        mask = factor(_RECURRENT, noise.drop, units, 1 if noise.sequence else steps)
        if noise.mode == "state":
            assert isinstance(mask, Tensor)
            mask = _inverted(mask, noise.drop, like.dtype)
        factors[noise.mode] = mask
    if noise.zoneout_h:
        factors["zoneout_h"] = factor(_ZONEOUT_H, noise.zoneout_h, out, steps)
    if noise.zoneout_c:
        factors["zoneout_c"] = factor(_ZONEOUT_C, noise.zoneout_c, hidden, steps)
    return Masks(**factors)


def _inverted(keep: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    return keep.to(dtype) * (1 / (1 - p) if p < 1 else 0.0)


def _keep(
    seed: Tensor, stream: int, p: float, steps: int, rows: int, units: int, device: torch.device
) -> Tensor:
    drawn = ops.random_mask(seed_on(seed, device), stream, p, steps, rows, units)
    return drawn.to(device)
