"""Weights in the layout of the kernels, kept between inference calls."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.backends import cpu
from fastrnn.ops import pack_weights as _pack


class Entry(NamedTuple):
    """Packed weights, and what they were made of."""

    cell: str
    plan: str
    refs: tuple[weakref.ref[Tensor], ...]
    # The library's: address, sizes, version and a few words of each weight when it was packed.
    origin: Any
    packed: Tensor


def bypassed() -> bool:
    """True where a kept tensor must not be read or made: a tracer or a transform is looking on, or
    a checkpoint that repeats a call operator by operator."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()  # FakeTensorMode, make_fx, export
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _samples(weights: Sequence[Tensor]) -> bytes:
    """Addresses of a few words of each weight, spread so that every gate of an LSTM holds one."""
    addresses = array("Q")
    for weight in weights:
        words = weight.numel() * weight.element_size() // 8
        if words and weight.is_cpu:
            start = weight.data_ptr()
            addresses.extend(range(start, start + 8 * words, 8 * max(1, words // 5)))
    return addresses.tobytes()


class PackedCache:
    """Packed weights of each layer of one module, valid while the parameters stay what they were.

    An entry is used only if every weight is the same object with the same storage and the same
    version counter as when it was packed, so an optimiser step, `load_state_dict` or a replaced
    parameter is noticed. A write through `.data` moves no counter: a few words of each weight are
    compared, which shows a write to the whole tensor (a moving average, say); after a write to a
    few elements call `flatten_parameters()`. A step of a fused optimiser moves no counter either,
    so a call with gradients drops the entries of trained weights. Of weights that are not
    contiguous nothing is kept.

    Copying or pickling a cache gives an empty one. Entries are immutable and replaced whole, so
    concurrent callers at worst pack the same weights twice.
    """

    __slots__ = ("_entries", "seen", "seen_training", "sequence", "stepper", "training")

    def __init__(self) -> None:
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCache:
        return PackedCache()

    def __reduce__(self) -> tuple[type[PackedCache], tuple[()]]:
        return PackedCache, ()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self._entries: dict[int, Entry] = {}
        # What fastrnn.nn.stepper made of the packed weights, for a step and for a whole sequence:
        # these know by themselves whether the weights are what they were.
        self.stepper: Any = None
        self.sequence: Any = None
        self.seen: Any = None  # the shape of the last sequence
        # The same for calls with gradients, which read the plain weights.
        self.training: Any = None
        self.seen_training: Any = None

    def forget_trained(self) -> None:
        """Drop what was packed of weights that a recorded call trains: torch's fused optimisers
        move no version counter, and may change few elements."""
        for entry in self._entries.values():
            for ref in entry.refs:
                weight = ref()
                if weight is not None and weight.requires_grad:
                    self._entries = {}
                    self.stepper = self.sequence = None
                    return

    def packed(self, layer: int, weights: Sequence[Tensor], cell: str, plan: str) -> Tensor | None:
        """Packed weights of `layer` for a call without gradients, or None: use the plain ones."""
        entry = self.entry(layer, weights, cell, plan)
        return None if entry is None else entry.packed

    def entry(self, layer: int, weights: Sequence[Tensor], cell: str, plan: str) -> Entry | None:
        """As `packed`, with what its tensor was made of.

        weights: the layer's parameters in torch's order, forward direction then reverse.
        """
        if bypassed():
            return None
        found = self._entries.get(layer)
        # In the library, since it is most of what a small call does: each weight the same object at
        # the same address, of the same version and contiguous (`weight.data = weight.data.t()` is
        # not), and then the sampled words, whose addresses belong to the weights still.
        if (
            found is not None
            and (found.cell, found.plan) == (cell, plan)
            and cpu.unchanged(weights, found.origin)
        ):
            return found
        # Exact type: a parametrised or pruned weight is a new tensor in each call, a fake or
        # functional one is not ours to keep; packing those would never pay.
        for weight in weights:
            if type(weight) is not torch.nn.Parameter or weight.is_inference():
                return None
            # Nothing to keep of a meta weight; one with other strides, or whose sign torch has yet
            # to change, is not looked into.
            if weight.is_meta or not weight.is_contiguous() or weight.is_neg():
                return None
            if weight.numel() * weight.element_size() < 8:  # too small to be looked into
                return None
        # Another process may write to shared memory without moving our version counter.
        if any(weight.is_shared() for weight in weights):
            return None
        # Taken before packing, so that a write that comes in between makes the entry stale.
        refs = tuple(weakref.ref(weight) for weight in weights)
        versions = tuple(weight._version for weight in weights)
        origin = cpu.describe_origin(refs, versions, _samples(weights))
        made = Entry(cell, plan, refs, origin, _pack(list(weights), cell, plan))
        self._entries[layer] = made
        return made


def current_cache(module: Any) -> PackedCache | None:
    """The cache that a module keeps as ``_packed``, made at the first call, for the call that is
    about to run; None where there must be none, or no library to read it."""
    if bypassed() or not cpu.LOADED:
        return None
    cache: PackedCache | None = module._packed
    if cache is None:
        cache = module._packed = PackedCache()
    elif torch.is_grad_enabled():
        cache.forget_trained()
    return cache
