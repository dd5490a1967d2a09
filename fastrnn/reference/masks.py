"""Recurrent dropout and zoneout inside a reference cell, from explicit mask tensors.

Recurrent dropout multiplies by a factor m: for "update" and "cell" the mask (0 or 1) in training
and 1 - p in evaluation, for "state" the inverted mask (0 or 1 / (1 - p)), in training only:

    "update"  LSTM: c_t = f * c_{t-1} + m * (i * g)    GRU: h_t = (1 - z) * (m * n) + z * h_{t-1}
              Semeniuta, Severyn and Barth 2016 (arXiv:1603.05118)
    "cell"    LSTM: c_t = m * (f * c_{t-1} + i * g)    Moon et al. 2015 (rnnDrop)
    "state"   the h_{t-1} that meets W_hh is m * h_{t-1}; GRU's z * h_{t-1} keeps the whole state
              Gal and Ghahramani 2016 (arXiv:1512.05287), one mask for all gates

Zoneout (Krueger et al. 2017, arXiv:1606.01305) keeps the old value: new and old state mix to
w * new + (1 - w) * old, w being the mask (1: new) in training and 1 - p in evaluation. h_t is made
from the new cell before zoneout puts the old one back.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["NO_MASKS", "Masks"]

Factor = Tensor | float | None


class Masks(NamedTuple):
    """The factors of one direction; None where there is nothing to do.

    Attributes:
        update, cell, state: of recurrent dropout, (T, N, K), or (1, N, K) for all steps, or a
            number; K is H, for ``state`` the size of h.
        zoneout_h, zoneout_c: weight w of the new state, (T, N, K) or a number.
    """

    update: Factor = None
    cell: Factor = None
    state: Factor = None
    zoneout_h: Factor = None
    zoneout_c: Factor = None


NO_MASKS = Masks()


def at(factor: Factor, t: int) -> Tensor | float:
    """The factor of step t."""
    if not isinstance(factor, Tensor):
        return 1.0 if factor is None else factor
    return factor[t if factor.shape[0] > 1 else 0]


def scaled(factor: Factor, t: int, value: Tensor) -> Tensor:
    """``value`` times the factor of step t."""
    return value if factor is None else value * at(factor, t)


def mixed(weight: Factor, t: int, new: Tensor, old: Tensor) -> Tensor:
    """The state after zoneout."""
    if weight is None:
        return new
    w = at(weight, t)
    return w * new + (1 - w) * old
