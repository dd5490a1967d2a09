"""Checks of weights and states, with torch.nn's messages."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.kinds import KINDS
from fastrnn.sequence import check_strided, check_tensor

__all__ = [
    "check_count",
    "check_counts",
    "check_layer_norm",
    "check_number",
    "check_pair",
    "check_process_group",
    "check_settings",
    "check_state",
    "check_step",
    "check_tensors",
    "check_weights",
]


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises TypeError or ValueError for what is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected an int")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")


def check_counts(num_layers: Any, proj_size: Any) -> None:
    """Raises what the constructors of torch.nn raise of these, which take a bool where it counts
    as the 1 or 0 that it equals."""
    for name, value in (("num_layers", num_layers), ("proj_size", proj_size)):
        # An int may be a symbol in a traced graph, which does not answer to hasattr.
        integer = isinstance(value, int) or hasattr(value, "__index__")
        if not integer or (name == "proj_size" and value is True):
            raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if num_layers < 1:
        raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
    if proj_size < 0:
        raise ValueError(
            "proj_size should be a positive integer or zero to disable projections, "
            f"got {proj_size}"
        )


def check_process_group(group: Any) -> None:
    """Raises TypeError unless it is None or what collectives of torch.distributed take: a group, or
    what new_group gives to a rank outside of it."""
    if group is None:
        return
    if torch.distributed.is_available():
        outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
        if isinstance(group, torch.distributed.ProcessGroup):
            return
        if type(group) is type(outside) and group == outside:
            return
    raise TypeError(
        f"process_group: got {group!r} ({type(group).__name__}), expected a ProcessGroup of "
        "torch.distributed, such as torch.distributed.new_group() gives, or None"
    )


def check_tensors(name: str, values: Any) -> None:
    """Raises TypeError unless these are tensors in a list, or in what can be indexed like one."""
    if not isinstance(values, (list, tuple)) and (
        isinstance(values, Tensor) or not hasattr(values, "__getitem__")
    ):
        raise TypeError(f"{name}: got {type(values).__name__}, expected a list of tensors")
    for index, value in enumerate(values):
        if not isinstance(value, Tensor):
            check_tensor(f"{name}[{index}]", value)


def check_pair(hx: Any) -> tuple[Tensor, Tensor]:
    """The two states of an LSTM."""
    pair = isinstance(hx, (tuple, list)) and len(hx) == 2
    if not pair or not all(isinstance(t, Tensor) for t in hx):
        raise TypeError(
            f"hx: got {type(hx).__name__}, expected a pair of tensors (h_0, c_0) for an LSTM"
        )
    return hx[0], hx[1]


def check_number(name: str, value: object) -> None:
    """Raises TypeError or ValueError for what is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")


def check_settings(dropout: object, eps: object, momentum: object, h0_noise: object) -> None:
    """Check what a batch-normalised LSTM is set to.

    Raises:
        ValueError: one of them is not a number, or not in its range.
    """
    if not _in_range(dropout, 0, 1):
        raise ValueError(
            f"dropout should be a number in range [0, 1], the probability of an element being "
            f"zeroed, got {dropout!r}"
        )
    if not _in_range(eps, 0) or eps == 0:
        raise ValueError(f"eps should be a number above 0, got {eps!r}")
    if momentum is not None and not _in_range(momentum, 0, 1):
        raise ValueError(
            f"momentum should be a number in range [0, 1], or None for the mean over all "
            f"batches, got {momentum!r}"
        )
    if not _in_range(h0_noise, 0):
        raise ValueError(f"h0_noise should be a standard deviation >= 0, got {h0_noise!r}")


def _in_range(value: object, low: float, high: float = float("inf")) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and low <= value <= high  # type: ignore[operator]


def check_weights(
    cell: str,
    input: Tensor,
    weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    directions: int,
    proj_size: int,
) -> tuple[int, int]:
    """Check number, shape, dtype and device of all weights; returns H and Hout."""
    gates, norms = KINDS[cell].gates, KINDS[cell].norms
    per_direction = 2 + 2 * bool(bias) + (proj_size > 0) + norms
    if len(weights) != num_layers * directions * per_direction:
        raise ValueError(
            f"flat_weights: got {len(weights)} tensors, expected {per_direction} for each of "
            f"{num_layers} layers and {directions} directions (bias={bias}, proj_size={proj_size}"
            f"{', layer_norm=True' if norms else ''})"
        )
    w_ih, w_hh = weights[0], weights[1]
    if w_ih.dim() != 2 or w_hh.dim() != 2:
        raise ValueError(
            f"flat_weights: got w_ih and w_hh of {w_ih.dim()} and {w_hh.dim()} dimensions, "
            "expected matrices"
        )
    features, out = input.size(-1), w_hh.size(1)
    hidden = w_hh.size(0) // gates if proj_size else out
    rows = gates * hidden
    if w_ih.size(1) != features:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {w_ih.size(1)}, got {features}"
        )
    dtype, device = input.dtype, input.device
    rest: list[tuple[int, ...]] = [(rows,), (rows,)] if bias else []
    if proj_size:
        rest.append((proj_size, hidden))
    if norms:
        rest += [(rows,), (rows,), *[(hidden,)] * (norms - 2)]
    index = 0
    for layer in range(num_layers):
        wide = features if layer == 0 else directions * out
        for expected in ((rows, wide), (rows, out), *rest) * directions:
            w = weights[index]
            if w.shape != expected:
                raise RuntimeError(
                    f"flat_weights[{index}]: got shape {tuple(w.shape)}, expected {expected} in "
                    f"layer {layer} with hidden_size {hidden}"
                )
            if w.dtype != dtype:
                raise ValueError(
                    f"RNN input dtype ({dtype}) does not match weight dtype ({w.dtype}). Convert "
                    f"input: input.to({w.dtype}), or convert model: model.to({dtype})"
                )
            if w.device != device:
                raise RuntimeError(
                    "Input and parameter tensors are not at the same device, found input tensor "
                    f"at {device} and parameter tensor at {w.device}"
                )
            index += 1
    return hidden, out


def check_layer_norm(reset_after: bool) -> None:
    if not reset_after:
        raise ValueError(
            "layer_norm: got True with reset_after=False, expected reset_after=True: the recurrent "
            "term is normalised over all gates, which then have to come from one product with h"
        )


def check_state(name: str, state: Tensor, expected: tuple[int, int, int], input: Tensor) -> None:
    if state.layout is not torch.jagged:  # of which torch.nn says that its sizes do not fit
        check_strided(name.replace("hidden", "hx"), state)
    if state.shape != expected:
        raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}")
    if state.device != input.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, found input tensor at "
            f"{input.device} and hidden tensor at {state.device}"
        )
    if state.dtype != input.dtype:
        raise RuntimeError(
            "Input and hidden tensors are not the same dtype, found input tensor with "
            f"{input.dtype} and hidden tensor with {state.dtype}; convert hx with "
            f"hx.to({input.dtype})"
        )


def check_step(input: Tensor, h: Tensor, c: Tensor | None) -> None:
    """Check that one step of a cell has a matrix and states that can be viewed as a sequence's."""
    check_tensor("input", input)
    check_strided("input", input)
    if input.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions (N, I), got {input.dim()}")
    check_tensor("hx", h)
    check_strided("hx" if c is None else "hx[0]", h)
    if c is not None:
        check_strided("hx[1]", c)
