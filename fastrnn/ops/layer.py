"""The operators behind every layer: schemas, fakes and registration with ``torch.library``.

One call runs one layer over the whole sequence, both directions. All operators are functional:
fresh outputs, no input is written and no output aliases an input. Shapes, with D directions:

    x        (T, N, I), (N, T, I) if batch_first, or packed rows (sum, I) with batch_sizes
    h0, c0   (D, N, Hout), (D, N, H); c0 is None but for an LSTM
    weights  per direction in torch's order: w_ih, w_hh[, b_ih, b_hh][, w_hr]
    y        x's leading sizes + (D*Hout)       cells  x's leading sizes + (D*H)
    gates    the tape of the backward, (D, rows, K*H): opaque
    seed     (1,) int64 on the CPU: of the masks, where noise (fastrnn.noise) asks for any

Sizes and dtypes are the caller's to check, as ``fastrnn.functional`` does: kernels take them at
their word. An output that does not apply is an empty (0,) tensor. Autograd lives in
``fastrnn.autograd``, outside the operators, which have no derivatives of their own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.compiler import is_compiling

from fastrnn.backends import cpu
from fastrnn.kinds import KINDS
from fastrnn.noise import Noise, tape_slots
from fastrnn.sequence import check_batch_sizes

__all__ = ["layer_backward", "layer_forward", "layer_forward_train", "pack_weights"]

_SCHEMAS = {
    "layer_forward": (
        "(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? packed, Tensor? batch_sizes, "
        "Tensor? lengths, Tensor? reset, str cell, bool batch_first, bool return_cells, str plan, "
        "Tensor? seed=None, str noise='') "
        "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells)"
    ),
    "layer_forward_train": (
        "(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
        "Tensor? lengths, Tensor? reset, str cell, bool batch_first, bool recompute, str plan, "
        "Tensor? seed=None, str noise='') "
        "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells, Tensor gates)"
    ),
    "layer_backward": (
        "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor y, Tensor h0, "
        "Tensor? c0, Tensor cells, Tensor gates, Tensor[] weights, Tensor? batch_sizes, "
        "Tensor? lengths, Tensor? reset, str cell, bool batch_first, bool need_dx, "
        "bool need_dstate, bool need_dw, str plan, Tensor? seed=None, str noise='') "
        "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
    ),
    "pack_weights": "(Tensor[] weights, str cell, str plan) -> Tensor",
}

_HALF = (torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("fastrnn", "FRAGMENT")
_OPERATORS: dict[tuple[str, str], Callable[..., Any]] = {}  # by dispatch key and name


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of cell states and tape: float32 for the 16-bit types, else the same."""
    return torch.float32 if dtype in _HALF else dtype


def _fake_outputs(
    x: Tensor, h0: Tensor, c0: Tensor | None, with_cells: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    directions, size, out = h0.shape
    y = x.new_empty((*x.shape[:-1], directions * out))
    h_n = x.new_empty((directions, size, out))
    if c0 is None:
        return y, h_n, x.new_empty((0,)), x.new_empty((0,), dtype=state_dtype(x.dtype))
    c_n = x.new_empty(c0.shape)
    if not with_cells:
        return y, h_n, c_n, x.new_empty((0,), dtype=state_dtype(x.dtype))
    cells_shape = (*x.shape[:-1], directions * c0.shape[2])
    return y, h_n, c_n, x.new_empty(cells_shape, dtype=state_dtype(x.dtype))


def _fake_layer_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    packed: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    return_cells: bool,
    plan: str,
    seed: Tensor | None = None,
    noise: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_outputs(x, h0, c0, return_cells)


def _fake_layer_forward_train(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    recompute: bool,
    plan: str,
    seed: Tensor | None = None,
    noise: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden = h0.shape[2] if c0 is None else c0.shape[2]
    rows = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
    width = 0 if recompute else tape_slots(cell, noise, plan) * hidden
    dtype = state_dtype(x.dtype)
    if width and plan.startswith("cuda"):
        from fastrnn.backends.cuda import tape_width
        from fastrnn.backends.cuda_need import layer_need

        projected = (len(weights) // h0.shape[0] - KINDS[cell].norms) % 2
        need = layer_need(
            cell, x.dtype, 1, hidden, h0.shape[0], out=h0.shape[2] if projected else 0,
            regularised=Noise.parse(noise).acts, exchange=plan.partition(",")[2],
        )  # fmt: skip
        width = tape_width(need, cell, noise, plan)
        # Its kernels know no packed rows, and keep activated gates in the dtype of the output.
        rows = rows if batch_sizes is None else batch_sizes.shape[0] * h0.shape[1]
        dtype = x.dtype
    shape = (h0.shape[0], rows, width) if width else (0,)
    gates = x.new_empty(shape, dtype=dtype)
    return (*_fake_outputs(x, h0, c0, True), gates)


def _fake_layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    cells: Tensor,
    gates: Tensor,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    batch_first: bool,
    need_dx: bool,
    need_dstate: bool,
    need_dw: bool,
    plan: str,
    seed: Tensor | None = None,
    noise: str = "",
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    dh0 = x.new_empty(h0.shape if need_dstate else (0,))
    dc0 = x.new_empty(c0.shape if need_dstate and c0 is not None else (0,))
    return dx, dh0, dc0, [w.new_empty(w.shape) for w in weights] if need_dw else []


def _fake_pack_weights(weights: list[Tensor], cell: str, plan: str) -> Tensor:
    # The format belongs to the backend, and so does the number of elements.
    elements = torch.library.get_ctx().new_dynamic_size()
    return weights[0].new_empty((elements,), dtype=torch.uint8)


def _finder(modules: Mapping[str, str], name: str) -> Callable[[str], Callable[..., Any]]:
    """The function ``name`` of a backend's module, imported at the first call: import stays light.

    The dispatcher takes tensors to a backend by their device, on which several can run: Triton's
    interpreter and the emulated CUDA library have their tensors on the CPU. So ``modules`` has one
    by the first word of the plan, "" for every other plan.
    """

    @functools.lru_cache(64)
    def find(plan: str) -> Callable[..., Any]:
        module = modules.get(plan.partition(",")[0]) or modules[""]
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    return find


def _without_autocast(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The caller's: these tensors have the dtypes that it led to."""
    first = next(a for a in args if a is not None)
    like = first if isinstance(first, Tensor) else first[0]
    with torch.autocast(like.device.type, enabled=False):
        return function(*args)


def _by_plan(modules: Mapping[str, str], name: str, schema: str) -> Callable[..., Any]:
    """The function ``name`` of the backend that the argument ``plan`` asks for."""
    at, find = _places(schema).get("plan"), _finder(modules, name)

    def call(*args: Any) -> Any:
        function = find("" if at is None else args[at])
        if torch._C._is_any_autocast_enabled():
            return _without_autocast(function, args)
        return function(*args)

    call.__name__ = name
    return call


def _places(schema: str) -> dict[str, int]:
    """The arguments of an operator by name."""
    names = [each.split("=")[0].split()[-1] for each in schema[1:].split(")")[0].split(", ")]
    return {name: i for i, name in enumerate(names)}


def _operator(modules: Mapping[str, str], name: str, schema: str) -> Callable[..., Any]:
    """The same as an operator, which traced calls reach: batch sizes are checked, whose values
    nobody has seen then, and there is an empty tensor for each None that is returned.

    One frame of Python, since compiled code pays for each about twice what others do.
    """
    at, find = _places(schema), _finder(modules, name)
    sizes, planned = at.get("batch_sizes"), at.get("plan")

    def call(*args: Any) -> Any:
        if sizes is not None and args[sizes] is not None:
            first = check_batch_sizes(args[sizes], args[at["x"]].size(0))
            if first != args[at["h0"]].size(1):
                raise ValueError(
                    f"batch_sizes: the first is {first}, expected {args[at['h0']].size(1)}, the "
                    "sequences of the states"
                )
        function = find("" if planned is None else args[planned])
        if torch._C._is_any_autocast_enabled():
            results = _without_autocast(function, args)
        else:
            results = function(*args)
        if isinstance(results, Tensor):
            return results
        for result in results:
            if result is None:
                break
        else:
            return results
        like = args[at["x"]]  # a first gradient may be that of the cells, which are wider
        # Cells and tape, the fourth and fifth result of a forward, are wider than 16 bits.
        wide = state_dtype(like.dtype)
        return tuple([
            r
            if r is not None
            else like.new_empty(0)
            if i < 3 or wide is like.dtype
            else like.new_empty(0, dtype=wide)
            for i, r in enumerate(results)
        ])  # fmt: skip

    return call


def register(
    device: str,
    module: str,
    schemas: Mapping[str, str],
    interpreted: str = "",
    cuda: str = "",
) -> dict[str, Callable[..., Any]]:
    """Serve operators on tensors of a dispatch key ("CPU", "CUDA") by a backend module.

    ``interpreted`` is the module for calls with the plan "triton", ``cuda`` for those with the plan
    "cuda".
    Returns the backend's functions, which may return None for an output that does not apply.
    """
    modules = {"": module, "triton": interpreted, "cuda": cuda}
    functions = {name: _by_plan(modules, name, schema) for name, schema in schemas.items()}
    for name, schema in schemas.items():
        operator = _OPERATORS[device, name] = _operator(modules, name, schema)
        torch.library.impl(f"fastrnn::{name}", device, operator)
    return functions


def implement(device: str, name: str, function: Callable[..., Any]) -> None:
    """Serve an operator, on tensors of a dispatch key, by this function as it is."""
    _OPERATORS[device, name] = function
    torch.library.impl(f"fastrnn::{name}", device, function)


def forward_only(name: str) -> None:
    """Give an operator a derivative that raises: exported programs hold forwards alone, and
    without any derivative torch would leave gradients out in silence.

    On the CPU a call that nobody follows goes from here straight to the kernel: the way through
    torch's wrapper and its dispatcher takes longer than a small layer.
    """

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"fastrnn::{name} has no derivative: an exported or traced program is for inference; "
            "export in evaluation mode and call under torch.no_grad(), or train the module itself"
        )

    torch.library.register_autograd(f"fastrnn::{name}", backward)
    operator: Any = getattr(torch.ops.fastrnn, name).default
    general = make_autograd_impl(operator, Info(backward, None))
    direct = _OPERATORS["CPU", name]
    plain: set[int] = set()  # keys of dispatch that say that nobody looks on

    def on_cpu(keyset: Any, *args: Any) -> Any:
        keys = keyset.raw_repr()
        if keys in plain and not torch.is_grad_enabled():
            return direct(*args)
        flat = [t for a in args for t in (a if isinstance(a, list) else (a,))]
        tensors = [t for t in flat if isinstance(t, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return general(keyset, *args)
        if unobserved(*tensors):
            plain.add(keys)
        return general(keyset, *args)

    _LIBRARY.impl(name, on_cpu, "AutogradCPU", with_keyset=True)


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastrnn::{_name}", _schema)

_TRITON = "fastrnn.backends.triton.layer"
_CUDA = "fastrnn.backends.cuda"
_NATIVE = "fastrnn.backends.cpu"
_PACK = {"pack_weights": _SCHEMAS["pack_weights"]}
_FORWARD = {"layer_forward": _SCHEMAS["layer_forward"]}
_TRAINING = {name: _SCHEMAS[name] for name in ("layer_forward_train", "layer_backward")}

CPU = register("CPU", _NATIVE, _PACK)
CPU |= register("CPU", "fastrnn.backends.cpu_prepared", _FORWARD | _TRAINING, _TRITON, _CUDA)
register("CUDA", _TRITON, _FORWARD | _TRAINING, cuda=_CUDA)
torch.library.register_fake("fastrnn::layer_forward", _fake_layer_forward)
forward_only("layer_forward")
torch.library.register_fake("fastrnn::layer_forward_train", _fake_layer_forward_train)
torch.library.register_fake("fastrnn::layer_backward", _fake_layer_backward)
torch.library.register_fake("fastrnn::pack_weights", _fake_pack_weights)

layer_forward = torch.ops.fastrnn.layer_forward.default
layer_forward_train = torch.ops.fastrnn.layer_forward_train.default
layer_backward = torch.ops.fastrnn.layer_backward.default
pack_weights = torch.ops.fastrnn.pack_weights.default


def unobserved(*tensors: Tensor | None) -> bool:
    """Whether an eager call with these may go straight to the backend's functions in ``CPU``.

    A boxed Python operator costs about 8 us, as much as a small layer itself. Nothing is lost where
    no tracer, mode, transform, profiler or tensor subclass would have seen the operator.
    """
    # A negative bit is resolved by torch's dispatcher, which a direct call goes around.
    return not is_compiling() and cpu.unobserved(tensors)
