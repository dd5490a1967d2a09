"""ONNX: fastrnn's operators as the standard's LSTM, GRU and RNN, for `torch.onnx.export`.

    import fastrnn.onnx
    shapes = ({0: Dim("T"), 1: Dim("N")},)
    fastrnn.onnx.export(model.eval(), (x,), "model.onnx", dynamic_shapes=shapes)

Each layer becomes one node, so the number of steps may be dynamic. Needs the packages `onnx` and
`onnxscript`, as torch's exporter does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastrnn import ops

__all__ = ["export", "translation_table"]

# Where ONNX's gate rows stand among torch's: i o f c in i f g o, z r h in r z n.
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "gru_reset_before": (1, 0, 2)}
_ACTIVATION = {"rnn_tanh": "Tanh", "rnn_relu": "Relu"}


class _NotInOnnx(ValueError):
    """What ONNX's recurrent operators cannot say."""


def export(
    model: torch.nn.Module, args: tuple[Any, ...] = (), f: Any = None, **options: Any
) -> Any:
    """`torch.onnx.export` of a model with fastrnn's layers; one ONNX node for each layer.

    LSTM, GRU (both forms of the reset gate: linear_before_reset is 1 with `reset_after`), RNN and
    the three cells, in both directions and any number of layers; `lengths` becomes
    sequence_lens. The values are those of the model in evaluation.

    Args:
        model: a module on the CPU, in evaluation, or a torch.export.ExportedProgram of one.
        args: example inputs.
        f: a path to write to, or None.
        options: those of torch.onnx.export, dynamic_shapes for instance; entries of
            custom_translation_table are added to ours.

    Returns:
        torch.onnx.ONNXProgram.

    Raises:
        ValueError: the model or a module in it is in training, or uses what ONNX's operators do
            not have: proj_size,
            PackedSequence, reset, return_cells, layer_norm, zoneout or recurrent dropout on the
            update or the cell, RHN, BNLSTM. The message names it and the way out.
        ImportError: onnx or onnxscript is not installed.
    """
    if options.pop("dynamo", True) is not True:
        raise ValueError(
            "dynamo: got False, expected True: the operators are translated for torch's exporter "
            "that stands on torch.export; for the older one call fastrnn.restore(model) first"
        )
    _check_evaluation(model)
    table = {**translation_table(), **(options.pop("custom_translation_table", None) or {})}
    try:
        with torch.no_grad():
            return torch.onnx.export(
                model, args, f, dynamo=True, custom_translation_table=table, **options
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _NotInOnnx):
            cause = cause.__cause__
        if cause is None:
            raise
        raise ValueError(str(cause)) from error


def _check_evaluation(model: Any) -> None:
    # An exported program has none of these.
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if module.training:
            where = (
                f"{name}, a module of type {type(module).__name__},"
                if name
                else type(module).__name__
            )
            raise ValueError(
                f"model: got {where} in training mode, expected evaluation; call model.eval() first"
            )


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The operators' translations, to pass to torch.onnx.export as custom_translation_table.

    `export` does so; use this where the call of torch.onnx.export is not yours to replace, with
    dynamo=True and under torch.no_grad().

    Raises:
        ImportError: onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "fastrnn.onnx needs onnx and onnxscript, as torch.onnx.export does; "
            "pip install onnx onnxscript"
        ) from error
    return {
        ops.layer_forward: _layer_forward,
        ops.rhn_forward: _refusal("RHN"),
        ops.bnlstm_forward: _refusal("BNLSTM"),
    }


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise _NotInOnnx(
            f"{name}: ONNX has no operator for it; deploy it with torch.export and AOTInductor"
        )

    refuse.__name__ = name
    return refuse


def _check(cell: str, weights: int, directions: int, **used: Any) -> None:
    """Raise for what an ONNX node cannot compute; `used` has what must be None, False or ""."""
    name = cell.partition("_layer_norm")
    if name[1]:
        raise _NotInOnnx(f"layer_norm=True: ONNX's {name[0].upper()} has no layer norm")
    if weights % directions or weights // directions not in (2, 4):
        raise _NotInOnnx(
            "proj_size: ONNX's LSTM has no projection; train without it, or multiply weight_hr "
            "into a layer of your own"
        )
    ways_out = {
        "batch_sizes": ("a PackedSequence", "pass a padded tensor and lengths"),
        "reset": ("reset", "run the parts between resets one after the other"),
        "return_cells": ("return_cells=True", "ONNX's LSTM gives the last cell state only"),
        "seed": ("a layer in training", "call model.eval() first"),
        "noise": (
            "zoneout, or recurrent dropout on the update or the cell, whose expectation acts in "
            "evaluation", "deploy with torch.export and AOTInductor",
        ),
    }  # fmt: skip
    for argument, value in used.items():
        if not (value is None or value is False or (isinstance(value, str) and not value)):
            what, way_out = ways_out[argument]
            raise _NotInOnnx(f"{what}: ONNX's recurrent operators do not have it; {way_out}")


def _layer_forward(
    x: Any,
    h0: Any,
    c0: Any,
    weights: Sequence[Any],
    packed: Any = None,
    batch_sizes: Any = None,
    lengths: Any = None,
    reset: Any = None,
    cell: str = "lstm",
    batch_first: bool = False,
    return_cells: bool = False,
    plan: str = "",
    seed: Any = None,
    noise: str = "",
) -> tuple[Any, Any, Any, Any]:
    """fastrnn::layer_forward as one LSTM, GRU or RNN node; see `fastrnn.ops.layer` for shapes."""
    import onnxscript

    op: Any = onnxscript.opset18
    directions, _, hidden = h0.shape
    _check(
        cell, len(weights), directions, batch_sizes=batch_sizes, reset=reset,
        return_cells=return_cells, seed=seed, noise=noise,
    )  # fmt: skip
    per = len(weights) // directions

    def stacked(*places: int) -> Any:
        """(D, ..): these weights of each direction, gates in ONNX's order, one after the other."""
        both = []
        for d in range(directions):
            parts = [_reorder(op, weights[d * per + at], cell) for at in places]
            both.append(op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0])
        both = [op.Unsqueeze(part, [0]) for part in both]
        return op.Concat(*both, axis=0) if directions > 1 else both[0]

    inputs = [
        op.Transpose(x, perm=[1, 0, 2]) if batch_first else x,
        stacked(0),
        stacked(1),
        stacked(2, 3) if per == 4 else None,
        None if lengths is None else op.Cast(lengths, to=6),  # int32
        h0,
    ]
    attributes: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions > 1 else "forward",
    }
    c_n: Any = None
    if cell == "lstm":
        y, h_n, c_n = op.LSTM(*inputs, c0, **attributes)
    elif cell in _ACTIVATION:
        y, h_n = op.RNN(*inputs, activations=[_ACTIVATION[cell]] * directions, **attributes)
    else:
        y, h_n = op.GRU(*inputs, linear_before_reset=int(cell == "gru"), **attributes)
    # (T, D, N, H) to (T, N, D * H), or batch first.
    if directions == 1:
        y = op.Squeeze(y, [1])
        y = op.Transpose(y, perm=[1, 0, 2]) if batch_first else y
    else:
        y = op.Transpose(y, perm=[2, 0, 1, 3] if batch_first else [0, 2, 1, 3])
        y = op.Reshape(y, [0, 0, directions * hidden])
    # Outputs that do not apply are empty, each a value of its own: the exporter names them.
    return y, h_n, _empty(op) if c_n is None else c_n, _empty(op)


def _reorder(op: Any, weight: Any, cell: str) -> Any:
    """The rows of a weight or bias in ONNX's order of gates."""
    order = _ORDER.get(cell, (0,))
    if len(order) == 1:
        return weight
    rows = weight.shape[0]
    columns = [-1] if len(weight.shape) > 1 else []
    gates = op.Reshape(weight, [len(order), rows // len(order), *columns])
    return op.Reshape(op.Gather(gates, list(order), axis=0), [rows, *columns])


def _empty(op: Any) -> Any:
    from onnx import TensorProto, helper

    return op.Constant(value=helper.make_tensor("empty", TensorProto.FLOAT, [0], []))
