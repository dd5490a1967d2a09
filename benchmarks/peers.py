"""The contestants: the same weights and the same input behind each library's own call.

`build(case, name)` gives a Contestant whose `call` is what is timed and whose `outputs` are what
is verified.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import Case

TORCH_MODULES: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
TORCH_CELLS: dict[str, type[nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.RNNCell,
}
ONNX_GATE_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
Outputs = dict[str, Tensor]


@dataclass
class Contestant:
    """call is timed, outputs are a fresh call's tensors to verify, context is entered per turn."""

    name: str
    call: Callable[[], Any]
    outputs: Callable[[], Outputs]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    backend: str = ""


class Problem:
    """A case's weights, input and output gradients, the same for all (seeded by the case's id)."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(zlib.crc32(case.id.encode()))
        module = make_module(case, TORCH_MODULES[case.cell]).to(device)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.uniform_(-(case.H**-0.5), case.H**-0.5, generator=generator)
        self.weights = module.state_dict()
        width = case.output_size * case.directions

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.x = normal(case.T, case.N, case.input_size)
        self.dy = normal(case.T, case.N, width)
        self.dh = normal(case.directions, case.N, case.output_size)
        order = torch.randperm(case.N, generator=generator, device=device)
        self.lengths = torch.tensor(case.lengths)[order.cpu()]

    def load(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        module.load_state_dict(self.weights)
        return module.to(self.x.device, dtype).train(self.case.mode == "training")


def make_module(case: Case, kind: type[nn.Module], **extra: Any) -> nn.Module:
    proj = {"proj_size": case.proj} if case.proj else {}
    return kind(case.input_size, case.H, bidirectional=case.bidirectional, **proj, **extra)


@contextlib.contextmanager
def compiled_switch(training: bool) -> Iterator[None]:
    """torch.nn's layers whole in a graph, and as torch's own operations: inductor of torch 2.13
    fails on oneDNN's LSTM in inference."""
    with (
        torch._dynamo.config.patch(allow_rnn=True),
        torch.backends.mkldnn.flags(enabled=False),
        nullcontext() if training else torch.no_grad(),
    ):
        yield


@contextlib.contextmanager
def bf16_switch() -> Iterator[None]:
    """torch's own opt-in to bfloat16 weights of float32 recurrent layers, and no gradients."""
    switch = torch.backends.mkldnn.rnn
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        with torch.no_grad():
            yield
    finally:
        switch.fp32_precision = before


def build(
    case: Case, name: str, problem: Problem | None = None, dtype: torch.dtype = torch.float32
) -> Contestant:
    """The contestant `name` ("fastrnn", "torch", "onnx", ...); ValueError on an unknown one."""
    problem = problem or Problem(case)
    if name == "onnx":
        return _onnx(problem)
    if case.mode == "step":
        return _step(problem, name, dtype)
    if name == "torch":
        return _layer(problem, name, TORCH_MODULES[case.cell], dtype, case.option == "compiled")
    if name == "torch-bf16":
        return _layer(problem, name, TORCH_MODULES[case.cell], torch.bfloat16)
    if name.split("-")[0].split("@")[0] == "fastrnn":
        import fastrnn

        kind = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}[case.cell]
        extra = {"recompute": True} if name == "fastrnn-recompute" else {}
        inference = bf16_switch if name == "fastrnn-bf16" else torch.no_grad
        return _layer(problem, name, kind, dtype, case.option == "compiled", inference, **extra)
    raise ValueError(
        f"contestant {name!r} is unknown; "
        "expected fastrnn[-bf16|-recompute|@isa], torch[-bf16|-cell] or onnx"
    )


def _layer(
    problem: Problem,
    name: str,
    kind: type[nn.Module],
    dtype: torch.dtype,
    compiled: bool = False,
    inference: Callable[[], AbstractContextManager[Any]] = torch.no_grad,
    **extra: Any,
) -> Contestant:
    case = problem.case
    module = problem.load(make_module(case, kind, **extra), dtype)
    training = case.mode == "training"
    x = problem.x.detach().to(dtype).requires_grad_(training)
    callee: Any = torch.compile(module, fullgraph=True) if compiled else module
    run, leaf = _forward(problem, callee, x, ours=name.startswith("fastrnn"))
    if training:
        contestant = _training(problem, name, module, x, leaf, run)
        if compiled:
            contestant.context = lambda: compiled_switch(training)
        return contestant

    def outputs() -> Outputs:
        y, state = run()
        return _named(y, state)

    contestant = Contestant(name, run, outputs, inference)
    if compiled:
        contestant.context = lambda: compiled_switch(training)
    contestant.backend = _explain(name, module, x, inference)
    return contestant


def _forward(
    problem: Problem, module: Callable[..., Any], x: Tensor, *, ours: bool
) -> tuple[Callable[[], Any], Tensor]:
    """The call a user would write, and the leaf its input gradient lands in.

    With lengths torch.nn has to pack and unpack: that is its price. A packed batch is packed
    beforehand for both.
    """
    lengths = problem.lengths
    if problem.case.ragged == "packed":
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        leaf = packed.data.detach().requires_grad_(x.requires_grad)
        batch = PackedSequence(
            leaf, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )
        return (lambda: module(batch)), leaf
    if problem.case.ragged == "lengths" and ours:
        return (lambda: module(x, lengths=lengths)), x
    if problem.case.ragged == "lengths":

        def packed_call() -> Any:
            y, state = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
            return pad_packed_sequence(y, total_length=problem.case.T)[0], state

        return packed_call, x
    return (lambda: module(x)), x


def _training(
    problem: Problem, name: str, module: nn.Module, x: Tensor, leaf: Tensor, run: Callable[[], Any]
) -> Contestant:
    case, dtype = problem.case, x.dtype
    dy, dh = problem.dy.to(dtype), problem.dh.to(dtype)
    if case.ragged == "packed":
        dy = pack_padded_sequence(dy, problem.lengths, enforce_sorted=False).data
    parameters = dict(module.named_parameters())

    def call() -> Any:
        leaf.grad = None
        for parameter in parameters.values():
            parameter.grad = None
        y, state = run()
        h_n = state[0] if isinstance(state, tuple) else state
        torch.autograd.backward((_data(y), h_n), (dy, dh))
        return y, state

    def outputs() -> Outputs:
        y, state = call()
        gradients = {f"d{key}": value.grad for key, value in parameters.items()}
        return {**_named(y, state), **gradients, "dx": leaf.grad}

    contestant = Contestant(name, call, outputs)
    contestant.backend = _explain(name, module, x, nullcontext)
    return contestant


def _step(problem: Problem, name: str, dtype: torch.dtype) -> Contestant:
    case = problem.case
    x = problem.x[0].to(dtype)
    h = problem.dh[0].to(dtype)
    if name in ("torch-cell", "torch"):
        cell = TORCH_CELLS[case.cell](case.input_size, case.H)
        cell.load_state_dict(
            {key.removesuffix("_l0"): value for key, value in problem.weights.items()}
        )
        cell = cell.to(dtype).eval()
        state: Any = (h, h) if case.cell == "lstm" else h
        run: Callable[[], Any] = lambda: cell(x, state)  # noqa: E731
    else:
        import fastrnn

        kind = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}[case.cell]
        module: Any = problem.load(make_module(case, kind), dtype)
        layered = (h[None], h[None]) if case.cell == "lstm" else h[None]
        run = lambda: module.step(x, layered)  # noqa: E731

    def outputs() -> Outputs:
        if name in ("torch-cell", "torch"):
            state = run()
            y = state[0] if isinstance(state, tuple) else state
        else:
            y, state = run()
        parts = state if isinstance(state, tuple) else (state,)
        return {
            key: value.reshape(case.N, case.H)
            for key, value in zip(("y", "h_n", "c_n"), (y, *parts), strict=False)
        }

    return Contestant(name, run, outputs, torch.no_grad)


def _onnx(problem: Problem) -> Contestant:
    """ONNX Runtime's operator on the same weights, on as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its workers would spin into the next contestant's turn; a spot check found ONNX Runtime
    # no slower for it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        onnx_model(problem), options, providers=["CPUExecutionProvider"]
    )
    feed = {"X": problem.x.numpy()}

    def outputs() -> Outputs:
        y, *states = (torch.from_numpy(np.asarray(value)) for value in session.run(None, feed))
        return {
            "y": y.permute(0, 2, 1, 3).flatten(2),
            **dict(zip(("h_n", "c_n"), states, strict=False)),
        }

    return Contestant("onnx", lambda: session.run(None, feed), outputs)


def onnx_missing() -> str:
    """What ONNX Runtime lacks to take part, and the way to it; empty if nothing."""
    absent = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if not absent:
        return ""
    return f"ONNX Runtime, {' and '.join(absent)} not installed; pip install 'fastrnn[bench]'"


def onnx_model(problem: Problem) -> bytes:
    """A one-node ONNX model. ONNX orders gates i o f g and z r n, torch i f g o and r z n."""
    from onnx import TensorProto, helper, numpy_helper

    case = problem.case
    order = ONNX_GATE_ORDER[case.cell]

    def gates(key: str) -> np.ndarray:
        parts = problem.weights[key].chunk(len(order), 0)
        return torch.cat([parts[index] for index in order]).numpy()

    suffixes = ("_l0", "_l0_reverse")[: case.directions]
    arrays = {
        "W": np.stack([gates(f"weight_ih{end}") for end in suffixes]),
        "R": np.stack([gates(f"weight_hh{end}") for end in suffixes]),
        "B": np.stack(
            [np.concatenate([gates(f"bias_ih{end}"), gates(f"bias_hh{end}")]) for end in suffixes]
        ),
    }
    names = ["Y", "Y_h", "Y_c"][: 3 if case.cell == "lstm" else 2]
    attributes: dict[str, Any] = {"linear_before_reset": 1} if case.cell == "gru" else {}
    direction = "bidirectional" if case.bidirectional else "forward"
    node = helper.make_node(
        case.cell.upper(),
        ["X", *arrays],
        names,
        hidden_size=case.H,
        direction=direction,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "recurrent",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["T", "N", case.input_size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [numpy_helper.from_array(value, key) for key, value in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


def _data(y: Tensor | PackedSequence) -> Tensor:
    return y.data if isinstance(y, PackedSequence) else y


def _named(y: Tensor | PackedSequence, state: Any) -> Outputs:
    states = state if isinstance(state, tuple) else (state,)
    return {"y": _data(y), **dict(zip(("h_n", "c_n"), states, strict=False))}


def _explain(
    name: str, module: nn.Module, x: Tensor, context: Callable[[], AbstractContextManager[Any]]
) -> str:
    """The backend fastrnn says it uses ("torch" means handed over); empty for the peers."""
    if not name.startswith("fastrnn"):
        return ""
    import fastrnn

    with context():
        return str(fastrnn.explain(module, x).backend)
