"""Turn the recurrent layers of a model that already exists into fastrnn's, and back."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fastrnn.nn import BNLSTM, GRU, LSTM, RHN, RNN, GRUCell, LSTMCell, RNNCell
from fastrnn.nn.base import RecurrentBase

Class = type[nn.Module]

_OURS: dict[Class, Class] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}
_TORCHS: dict[Class, Class] = {ours: torchs for torchs, ours in _OURS.items()}
# What the new module must not inherit: our own options, lists that belong to the old module's
# class, and a forward compiled for the old module.
_ADDED = ("recurrent_dropout", "zoneout", "weight_dropout", "layer_norm")
_LEFT_BEHIND = (
    "recompute", "reset_after", "_packed", "_flat_weights", "_compiled_call_impl",
    "recurrent_dropout_mode", "recurrent_dropout_per", "_rates", "_zoneout_pair",
    "layer_norm",
)  # fmt: skip


def replace(model: nn.Module) -> nn.Module:
    """Swap every torch.nn LSTM, GRU, RNN and cell inside `model` for fastrnn's, in place.

    The new modules share the Parameter objects of the old, so optimisers and tied weights go on
    as before; training mode, hooks, parametrisations, weight norm and pruning are kept. Exact
    torch.nn types only: a subclass may override anything, so it is left alone and reported by a
    warning. Do it before torch.compile and before wrapping in DDP or FSDP. A module that a parent
    holds outside its registered children (in a plain list, say) is not found.

    Args:
        model: any module; a module that appears twice is replaced by one new module.

    Returns:
        `model` itself, or the new module if `model` is such a layer.

    Warns:
        UserWarning: names the subclasses that were left alone.
    """

    def refusal(module: nn.Module) -> str | None:
        torchs = isinstance(module, tuple(_OURS)) and not isinstance(module, tuple(_TORCHS))
        if torchs and parametrize.type_before_parametrizations(module) not in _OURS:
            return "a subclass of a torch.nn layer, which may override anything"
        return None

    return _swap(model, _OURS, "replace", refusal)


def restore(model: nn.Module) -> nn.Module:
    """The way back from `replace`: fastrnn's modules become torch.nn's, in place.

    Works on any model, whether or not it came from `replace`. `recompute` is dropped, it changes
    no result. What torch.nn cannot compute (a GRU with reset_after=False, recurrent dropout,
    zoneout, weight dropout, layer norm, RHN, BNLSTM) and subclasses of fastrnn's modules are left
    alone and reported.

    Args:
        model: any module; a module that appears twice is replaced by one new module.

    Returns:
        `model` itself, or the new module if `model` is such a layer.

    Warns:
        UserWarning: names the modules that were left alone, with the reason.
    """

    def refusal(module: nn.Module) -> str | None:
        if isinstance(module, (RHN, BNLSTM)):
            return "a cell that torch.nn does not have"
        if isinstance(module, GRU) and not module.reset_after:
            return "reset_after=False, which torch.nn.GRU does not have"
        for name in _ADDED:
            if isinstance(module, RecurrentBase) and getattr(module, name):
                torchs = f"torch.nn.{type(module).__name__}"
                return f"{name}={getattr(module, name)!r}, which {torchs} does not have"
        ours = isinstance(module, tuple(_TORCHS))
        if ours and parametrize.type_before_parametrizations(module) not in _TORCHS:
            return "a subclass of a fastrnn module, which may override anything"
        return None

    return _swap(model, _TORCHS, "restore", refusal)


def _swap(
    model: nn.Module,
    table: dict[Class, Class],
    action: str,
    refusal: Callable[[nn.Module], str | None],
) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fastrnn.{action}: model: got {type(model).__name__}, expected a torch.nn.Module; "
            "of several call it for each"
        )
    swapped: dict[nn.Module, nn.Module] = {}
    refused = []
    for name, module in model.named_modules():
        target = table.get(parametrize.type_before_parametrizations(module))
        reason = refusal(module)
        if target is not None and "forward" in module.__dict__:
            reason = "its forward was replaced on the instance"
        if reason is not None:
            refused.append(f"{name or 'the model itself'} ({type(module).__name__}): {reason}")
            continue
        if target is not None:
            swapped[module] = _recast(module, target)
    # A layer may hold another: of the old one's children the new one has a list of its own.
    for parent in [*model.modules(), *swapped.values()]:
        for name, child in parent._modules.items():
            if child in swapped:
                parent._modules[name] = swapped[child]
    if refused:
        warnings.warn(f"fastrnn.{action} left alone: " + "; ".join(refused), stacklevel=3)
    return swapped.get(model, model)


def _recast(module: nn.Module, target: Class) -> nn.Module:
    """A module of class `target` with the insides of `module`.

    Both classes stand on the same torch base with the same attributes, so nothing is constructed.
    """
    new: Any = target.__new__(target)
    attributes = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        attributes[name] = attributes[name].copy()
    for name in _LEFT_BEHIND:
        attributes.pop(name, None)
    # The dictionaries of hooks are shared, not copied: handles the user holds go on working.
    new.__dict__.update(attributes)
    if parametrize.is_parametrized(module):
        parametrize._inject_new_class(new)
        for name in new.parametrizations:
            parametrize._inject_property(new, name)
    if isinstance(new, nn.RNNBase):
        new._flat_weights_names = list(new._flat_weights_names)
        new._all_weights = [list(names) for names in new._all_weights]
        new._init_flat_weights()
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False) and hook.module() is module:
            hook.module = weakref.ref(new)
    result: nn.Module = new
    return result


_patch_lock = threading.Lock()
_patch_depth = 0


@contextmanager
def patch() -> Iterator[None]:
    """While it lasts, the names torch.nn.LSTM, GRU, RNN and their cells are fastrnn's classes.

    For code that builds its own layers and cannot be edited. Under it `isinstance(m, nn.LSTM)` is
    True for fastrnn's modules and False for torch's. It acts on names looked up while it lasts, in
    every thread: a class bound earlier by `from torch.nn import LSTM` is not affected. May be
    nested; the names are put back when the outermost one ends, also after an exception. Build the
    model under it and call torch.compile outside: dynamo stops at whatever nn.LSTM refers to.
    """
    _enter_patch()
    try:
        yield
    finally:
        _leave_patch()


def _rename(classes: dict[Class, Class]) -> None:
    for torchs, new in classes.items():
        for namespace in _NAMESPACES:
            setattr(namespace, torchs.__name__, new)


_NAMESPACES: tuple[Any, ...] = (nn, nn.modules, nn.modules.rnn)


def _enter_patch() -> None:
    global _patch_depth
    with _patch_lock:
        if _patch_depth == 0:
            _rename(_OURS)
        _patch_depth += 1


def _leave_patch() -> None:
    global _patch_depth
    with _patch_lock:
        _patch_depth -= 1
        if _patch_depth == 0:
            _rename({torchs: torchs for torchs in _OURS})
