"""One description of a batch of sequences, shared by functional, dispatch and the modules.

A batch comes in one of three layouts: (T, N, I), (N, T, I) with ``batch_first``, or the rows of a
PackedSequence (sum, I) with their ``batch_sizes``. ``lengths`` and ``reset`` refine the first two.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.compiler import is_compiling

__all__ = [
    "Batch",
    "check_batch_sizes",
    "check_lengths",
    "check_reset",
    "check_strided",
    "check_tensor",
    "describe",
    "first_of",
    "flip_layout",
    "sized_by",
]

_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))


class Batch(NamedTuple):
    """What the backends need to know of a batch beside its values.

    Attributes:
        steps: T, the longest sequence.
        size: N, the number of sequences.
        batch_first: the layout is (N, T, I).
        batch_sizes: (T,) int64 on the CPU where the data are packed rows, else None.
        lengths: (N,) int64 on the data's device, or None: all sequences have T steps.
        reset: bool in the layout of the data, (T, N) or (N, T), or None.
    """

    steps: int
    size: int
    batch_first: bool
    batch_sizes: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None


def describe(
    data: Tensor,
    *,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Iterable[int] | Tensor | None = None,
    reset: Tensor | None = None,
) -> Batch:
    """Check the layout of ``data`` and everything that refines it.

    Args:
        data: (T, N, I), (N, T, I) if ``batch_first``, or (sum, I) with ``batch_sizes``.
        batch_first: which of the two padded layouts; ignored for packed data.
        batch_sizes: as in a PackedSequence, (T,) int64 on the CPU, never increasing.
        lengths: N integers 1..T, a list or a tensor on the data's device.
        reset: bool in the data's layout, (T, N) or (N, T).

    Raises:
        RuntimeError: the sequence length is 0, or the number of dimensions is wrong (as torch.nn),
            or the data are nested or not strided.
        RuntimeError: ``lengths`` or ``reset`` are nested or not strided.
        TypeError: ``data`` or ``batch_sizes`` are no tensors.
        TypeError, ValueError: ``batch_sizes``, ``lengths`` or ``reset`` do not fit the data.
    """
    check_tensor("input", data)
    if data.is_nested:
        raise RuntimeError(
            "input: got a nested tensor, expected a padded one; with batch_first=True pass "
            "torch.nested.to_padded_tensor(input, 0.0) and lengths="
        )
    check_strided("input", data)
    if batch_sizes is not None:
        check_tensor("batch_sizes", batch_sizes)
        if lengths is not None:
            raise ValueError(
                "lengths: got it together with a PackedSequence (batch_sizes), which carries its "
                "own lengths; pass lengths with a padded tensor, or the PackedSequence alone"
            )
        if reset is not None:
            raise ValueError(
                "reset: got it together with a PackedSequence (batch_sizes), expected a padded "
                "tensor; use pad_packed_sequence and pass lengths= and reset="
            )
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        size = check_batch_sizes(batch_sizes, data.size(0))
        return Batch(batch_sizes.size(0), size, False, batch_sizes, None, None)
    if data.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {data.dim()}")
    first, second, _ = data.shape
    steps, size = (second, first) if batch_first else (first, second)
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        lengths = check_lengths(lengths, steps, size, data.device)
    if reset is not None:
        check_reset(reset, (first, second), batch_first, data.device)
    return Batch(steps, size, batch_first, None, lengths, reset)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def check_strided(name: str, value: Tensor) -> None:
    """Raises RuntimeError for a tensor that has not one size in each dimension, or is no array."""
    if value.is_nested:
        raise RuntimeError(
            f"{name}: got a nested tensor, expected a padded one; "
            f"pass torch.nested.to_padded_tensor({name}, 0)"
        )
    if value.layout is not torch.strided:
        raise RuntimeError(
            f"{name}: got a tensor of layout {value.layout}, expected torch.strided; "
            f"pass {name}.to_dense()"
        )


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> int:
    """Check the batch sizes of packed data with so many rows; returns N, the first of them."""
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        raise ValueError(
            f"batch_sizes: got {batch_sizes.dtype} of shape {tuple(batch_sizes.shape)} on "
            f"{batch_sizes.device}, expected int64 of shape (T,) on the CPU, as "
            "pack_padded_sequence makes it"
        )
    if batch_sizes.size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    size = first_of(batch_sizes)
    if is_compiling() or _fake(batch_sizes):
        return size
    last = int(batch_sizes[-1])
    total = int(batch_sizes.sum())
    if total != rows:
        raise ValueError(
            f"batch_sizes: they add up to {total}, but the packed data have {rows} rows; pass "
            "data and batch_sizes of one PackedSequence"
        )
    if size != last and bool((batch_sizes.diff() > 0).any()):
        raise ValueError(
            "batch_sizes: they increase from one step to the next, expected sequences sorted by "
            "decreasing length; pack_padded_sequence(..., enforce_sorted=False) sorts them"
        )
    if last < 1:
        raise ValueError(f"batch_sizes: the last is {last}, expected at least 1 at every step")
    return size


def first_of(batch_sizes: Tensor) -> int:
    """N; for torch.jit.trace a tensor, as it makes of sizes: a number would be fixed there."""
    first: Any = batch_sizes[0]
    # Not int(), which torch.export fixes.
    return first if torch._C._get_tracing_state() is not None else first.item()


def sized_by(batch: Batch, state: Tensor | None) -> Batch:
    """The batch with as many sequences as a given state, which has to be a tensor, where a traced
    call of packed data does not know the first of their batch sizes; the operators compare the two
    when they run."""
    if state is None:
        return batch
    check_tensor("hx", state)
    if batch.batch_sizes is None or not is_compiling() or state.dim() != 3:
        return batch
    return batch._replace(size=state.size(1))


def check_lengths(
    lengths: Iterable[int] | Tensor, steps: int, size: int, device: torch.device
) -> Tensor:
    """Turn ``lengths`` into an int64 tensor (N,) on ``device``.

    Raises:
        TypeError: not integers (a bool and a float are not).
        ValueError: wrong shape or device, or a value outside 1..T.
        RuntimeError: a tensor that is nested or not strided.
    """

    def expected() -> str:  # a text with sizes in it would fix them in a traced graph
        return f"expected N={size} integers between 1 and T={steps}"

    if isinstance(lengths, Tensor):
        if lengths.dtype not in _INTEGERS:
            raise TypeError(
                f"lengths: got a tensor of {lengths.dtype}, {expected()}; "
                "convert with lengths.long()"
            )
        check_strided("lengths", lengths)
        if lengths.device != device:
            raise ValueError(
                f"lengths: got a tensor on {lengths.device}, but input is on {device}; "
                "pass lengths.to(input.device), or a list"
            )
        checked = lengths.to(torch.int64)
    else:
        checked = _from_list(lengths, expected).to(device)
    if checked.dim() != 1 or checked.size(0) != size:
        raise ValueError(
            f"lengths: got shape {tuple(checked.shape)}, {expected()}, one per sequence"
        )
    # The values are data: while tracing they are unknown, and kernels clamp what they read.
    # Last, the size: torch 2.6 fixes a traced one where it is asked for its truth.
    if not (is_compiling() or checked.is_meta) and size and not _hidden(checked):
        low, high = torch.stack(checked.aminmax()).tolist()  # on a GPU one wait, not two
        if low < 1 or high > steps:
            raise ValueError(
                f"lengths: got values from {low} to {high}, {expected()}; drop empty "
                "sequences from the batch, or pad input to the longest"
            )
    return checked


def _fake(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor and is_fake(tensor)


def _hidden(tensor: Tensor) -> bool:
    """Whether its values cannot be looked at: those of a fake tensor, in a transform of torch.func,
    and while a CUDA graph is being recorded."""
    if torch._C._are_functorch_transforms_active() or _fake(tensor):
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _from_list(lengths: Iterable[int], expected: Callable[[], str]) -> Tensor:
    if isinstance(lengths, (str, bytes)) or not hasattr(lengths, "__iter__"):
        raise TypeError(
            f"lengths: got {type(lengths).__name__}, {expected()}, in a list or a tensor"
        )
    values = list(lengths)
    for n, value in enumerate(values):
        # An int may be a symbol in a traced graph, which does not answer to hasattr.
        if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")):
            raise TypeError(
                f"lengths: got {value!r} ({type(value).__name__}) at index {n}, {expected()}"
            )
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def check_reset(
    reset: Tensor, shape: tuple[int, int], batch_first: bool, device: torch.device
) -> None:
    """Check that ``reset`` is bool of ``shape``, the first two sizes of input, on ``device``.

    Raises:
        TypeError: not a bool tensor.
        ValueError: wrong shape or device.
        RuntimeError: nested or not strided.
    """

    def expected() -> str:  # as in check_lengths
        layout = "(N, T)" if batch_first else "(T, N)"
        return f"expected a bool tensor {layout} = {tuple(shape)}"

    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: got {type(reset).__name__}, {expected()}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset: got {reset.dtype}, {expected()}; convert with reset.bool()")
    check_strided("reset", reset)
    if tuple(reset.shape) != tuple(shape):
        hint = "; batch_first=True puts N first" if batch_first else ""
        raise ValueError(f"reset: got shape {tuple(reset.shape)}, {expected()}{hint}")
    if reset.device != device:
        raise ValueError(
            f"reset: got a tensor on {reset.device}, but input is on {device}; "
            "pass reset.to(input.device)"
        )


def flip_layout(batch: Batch) -> Batch:
    """The description of the same padded batch with its first two dimensions exchanged."""
    reset = None if batch.reset is None else batch.reset.transpose(0, 1).contiguous()
    return batch._replace(batch_first=not batch.batch_first, reset=reset)
