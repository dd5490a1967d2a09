"""torch.export of every module and option, one graph in torch.compile, and AOTInductor."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from tests.test_compile import assert_equal_to_eager, flat
from tests.versions import OLD, exporting

pytestmark = [
    pytest.mark.compile,
    # torch's own compile stack warns about its own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning"),  # torch 2.6
]


class Case(NamedTuple):
    """A module's class and options, which arguments its call takes beside the input, and how it is
    called."""

    make: type[nn.Module]
    options: dict[str, Any]
    takes: tuple[str, ...] = ()


BOTH = {"num_layers": 2, "bidirectional": True}
CASES = {
    "lstm": Case(fastrnn.LSTM, BOTH),
    "lstm, every argument": Case(fastrnn.LSTM, BOTH, ("hx", "lengths", "reset", "return_cells")),
    "lstm, proj_size": Case(fastrnn.LSTM, {"proj_size": 2, "batch_first": True}),
    "lstm, layer_norm": Case(fastrnn.LSTM, {"layer_norm": True}, ("lengths",)),
    "lstm, zoneout, update": Case(
        fastrnn.LSTM, {"zoneout": (0.1, 0.2), "recurrent_dropout": 0.3, "weight_dropout": 0.4}
    ),
    "lstm, cell, per sequence": Case(
        fastrnn.LSTM,
        {
            "recurrent_dropout": 0.3,
            "recurrent_dropout_mode": "cell",
            "recurrent_dropout_per": "sequence",
            "recompute": True,
        },
    ),
    "gru": Case(fastrnn.GRU, {**BOTH, "dropout": 0.5, "bias": False}, ("hx",)),
    "gru, reset before": Case(
        fastrnn.GRU, {"reset_after": False, "batch_first": True}, ("lengths", "reset")
    ),
    "gru, layer_norm, zoneout": Case(fastrnn.GRU, {"layer_norm": True, "zoneout": 0.2}),
    "rnn": Case(fastrnn.RNN, BOTH, ("hx", "lengths", "reset")),
    "rnn, relu, state": Case(fastrnn.RNN, {"nonlinearity": "relu", "recurrent_dropout": 0.5}),
    "rhn": Case(fastrnn.RHN, {**BOTH, "depth": 2}, ("hx", "lengths", "reset")),
    "rhn, carry gate, masks": Case(
        fastrnn.RHN,
        {"couple_carry": False, "variational_input": 0.2, "variational_state": 0.3, "depth": 2},
    ),
    "bnlstm": Case(
        fastrnn.BNLSTM,
        {"bidirectional": True, "max_length": 4},
        ("hx", "lengths", "reset", "return_cells"),
    ),
    "bnlstm, whole sequence": Case(
        fastrnn.BNLSTM,
        {"max_length": 4, "input_stats": "sequence", "learn_init_state": True, "momentum": None},
    ),
    "lstm, without a batch": Case(fastrnn.LSTM, {"num_layers": 2, "dropout": 0.5}, ("unbatched",)),
    "lstm, packed": Case(fastrnn.LSTM, {"bidirectional": True}, ("batch_sizes", "hx")),
    "gru, packed": Case(fastrnn.GRU, {"zoneout": 0.2}, ("batch_sizes",)),
    "rhn, packed": Case(fastrnn.RHN, {"depth": 2, "recompute": True}, ("batch_sizes", "hx")),
    "bnlstm, packed": Case(
        fastrnn.BNLSTM, {"max_length": 4, "learn_init_state": True}, ("batch_sizes",)
    ),
    "lstm, steps": Case(fastrnn.LSTM, {"proj_size": 2, "zoneout": (0.1, 0.2)}, ("step",)),
    "gru, steps": Case(fastrnn.GRU, {"layer_norm": True}, ("step",)),
    "rhn, steps": Case(fastrnn.RHN, {"depth": 2}, ("step",)),
    "bnlstm, steps": Case(fastrnn.BNLSTM, {"max_length": 4}, ("step",)),
    "lstm, autocast": Case(fastrnn.LSTM, {"proj_size": 2}, ("autocast",)),
    "bnlstm, autocast": Case(fastrnn.BNLSTM, {"max_length": 4}, ("autocast",)),
    "lstm cell": Case(fastrnn.LSTMCell, {}, ("hx",)),
    "gru cell": Case(fastrnn.GRUCell, {"bias": False}),
    "rnn cell": Case(fastrnn.RNNCell, {"nonlinearity": "relu"}),
}


class Caller(nn.Module):
    """Tensors in, tensors out: gives the call's arguments their names."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layer = case.make(3, 4, **case.options)
        self.takes = case.takes
        self.pair = isinstance(self.layer, (fastrnn.LSTM, fastrnn.LSTMCell, fastrnn.BNLSTM))

    def forward(self, input: Tensor, *others: Tensor) -> list[Tensor]:
        layer: Any = self.layer
        if "batch_sizes" in self.takes:
            hx = others[1] if "hx" in self.takes else None
            hx = (hx, 0.5 * hx) if hx is not None and self.pair else hx
            packed, state = layer(PackedSequence(input, others[0]), hx)
            return [packed.data, *flat(state)]
        if "step" in self.takes:
            y, state = layer.step(input)
            return [y, layer.step(2 * input, state)[0]]
        if "autocast" in self.takes:
            with torch.autocast("cpu", torch.bfloat16):
                return flat(layer(input))
        named: dict[str, Any] = dict(zip((t for t in self.takes if t != "return_cells"), others))
        if "return_cells" in self.takes:
            named["return_cells"] = True
        if "hx" in named and self.pair:
            named["hx"] = (named["hx"], named["hx"] * 0.5)
        return flat(self.layer(input, **named))


def arguments(case: Case, steps: int, size: int) -> tuple[tuple[Tensor, ...], Any]:
    """The call's tensors, and which of their sizes are dynamic: T and N."""
    t, n = Dim("steps", min=2, max=1000), Dim("size", min=2, max=1000)
    lengths = torch.tensor([steps, 1, *[min(3, steps)] * (size - 2)])
    if "Cell" in case.make.__name__:
        tensors = [torch.randn(size, 3)] + [torch.randn(size, 4) for _ in case.takes]
        return tuple(tensors), ({0: n}, ({0: n},)) if case.takes else ({0: n},)
    if "batch_sizes" in case.takes:
        packed = pack_sequence([torch.randn(n, 3) for n in lengths.sort(descending=True).values])
        rows = Dim("rows", min=2, max=10000)
        given = (packed.data, packed.batch_sizes)
        if "hx" not in case.takes:
            return given, ({0: rows}, ({0: t},))
        hx = torch.randn(2 if case.options.get("bidirectional") else 1, size, 4)
        return (*given, hx), ({0: rows}, ({0: t}, {1: n}))
    if "step" in case.takes:
        return (torch.randn(size, 3),), ({0: n},)
    if "unbatched" in case.takes:
        return (torch.randn(steps, 3),), ({0: t},)
    first = case.options.get("batch_first", False)
    plane = (size, steps) if first else (steps, size)
    where = {0: n, 1: t} if first else {0: t, 1: n}
    rows = case.options.get("num_layers", 1) * (2 if case.options.get("bidirectional") else 1)
    possible = {
        "hx": (torch.randn(rows, size, 4), {1: n}),
        "lengths": (lengths, {0: n}),
        "reset": (torch.rand(plane) < 0.3, where),
    }
    others = [possible[name] for name in case.takes if name in possible]
    tensors = torch.randn(*plane, 3), *(tensor for tensor, _ in others)
    return tensors, (where, tuple(shape for _, shape in others)) if others else (where,)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
@pytest.mark.parametrize("name", CASES)
def test_export_with_dynamic_sizes(name: str, strict: bool) -> None:
    """Steps and sequences of other numbers than those exported with, in evaluation."""
    if OLD and "packed" in name and (strict or name.startswith("bnlstm")):
        pytest.skip("torch 2.6 traces no PackedSequence, and no learned state of unknown size")
    case = CASES[name]
    model = Caller(case).eval()
    args, shapes = arguments(case, 5, 3)
    with exporting(strict):
        program = torch.export.export(model, args, dynamic_shapes=shapes, strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, GraphModule)]
    targets = [str(n.target) for g in graphs for n in g.nodes if n.op == "call_function"]
    layers = case.options.get("num_layers", 1) * (2 if "step" in case.takes else 1)
    assert sum("fastrnn" in target for target in targets) == layers, targets
    run = program.module()
    with torch.no_grad():
        for steps, size in ((5, 3), (9, 4)):
            args, _ = arguments(case, steps, size)
            assert_equal_to_eager(flat(run(*args)), flat(model(*args)))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
@pytest.mark.parametrize(
    "name",
    ["gru", "bnlstm", "bnlstm, whole sequence", "lstm, zoneout, update", "rhn, carry gate, masks"],
)
def test_export_in_training_mode(name: str, strict: bool) -> None:
    """Masks are drawn and running statistics are kept by the program, from one seed as in eager.

    BNLSTM has rows of statistics for as many steps as the program may meet.
    """
    if OLD and name.startswith("bnlstm"):
        pytest.skip("torch 2.6 does not tell export from compile: a minimum of sizes stays")
    case = CASES[name]
    if "max_length" in case.options:
        case = case._replace(options={**case.options, "max_length": 1000})
    model = Caller(case).train()
    args, shapes = arguments(case, 5, 3)
    with exporting(strict):
        program = torch.export.export(model, args, dynamic_shapes=shapes, strict=strict)
    run, eager = program.module(), copy.deepcopy(model)
    args, _ = arguments(case, 9, 4)
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            got = flat(run(*args))
            torch.manual_seed(seed)
            assert_equal_to_eager(got, flat(eager(*args)))
    buffers = dict(run.named_buffers())
    for name, buffer in eager.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize(
    "name, mode",
    [
        # Training BNLSTM takes long to trace: the rest of it is in test_bnlstm_compile.py.
        *((n, "train") for n in CASES if "bn" not in n or "packed" in n),
        *((n, "eval") for n in CASES if "zone" in n or "bn" in n),
    ],
)
def test_one_graph_for_every_size(name: str, mode: str) -> None:
    """Forward and backward without a break; other steps and sequences compile nothing anew."""
    if OLD and "packed" in name:
        pytest.skip("the dynamo of torch 2.6 makes no PackedSequence")
    case = CASES[name]
    model = Caller(case).train(mode == "train")
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    # Sizes that differ from the features: torch takes equal ones for the same.
    for i, (steps, size) in enumerate(((5, 6), (9, 7))):
        args, _ = arguments(case, steps, size)
        found = []
        for module, call in ((model, compiled), (eager, eager)):
            torch.manual_seed(i)
            with torch.compiler.set_stance(
                "fail_on_recompile" if i and call is compiled else "default"
            ):
                outputs = flat(call(*args))
            loss = sum(output.float().square().sum() for output in outputs)
            found.append([*outputs, *torch.autograd.grad(loss, list(module.parameters()))])
        assert_equal_to_eager(*found)
        assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    for (key, buffer), other in zip(model.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(buffer, other), key


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastrnn.LSTM(3, 4, bidirectional=True)
        self.gru = fastrnn.GRU(8, 4, zoneout=0.1)
        self.rhn = fastrnn.RHN(4, 4, depth=2)
        self.bnlstm = fastrnn.BNLSTM(4, 4, max_length=4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.lstm(x, lengths=lengths)[0]
        return self.bnlstm(self.rhn(self.gru(x.relu())[0])[0])[0]


RUN = """
import sys, torch
calls = torch.load(sys.argv[2])
try:
    torch._inductor.aoti_load_package(sys.argv[1])(*calls[0][:2])
except Exception as error:
    print(error)
    assert "fastrnn" in str(error)
else:
    sys.exit("it ran without the operators")
import fastrnn
run = torch._inductor.aoti_load_package(sys.argv[1])
for x, lengths, expected in calls:
    assert torch.equal(run(x, lengths), expected)
"""


@pytest.mark.first
def test_aot_inductor(tmp_path: Path) -> None:
    """A compiled package, in a process that imports fastrnn and never builds the model.

    The operators' implementations are registered by Python, so a process without that import, and
    so a program without Python, cannot run it.
    """
    model = Zoo().eval()
    t, n = Dim("steps", min=2, max=1000), Dim("size", min=2, max=1000)
    package = str(tmp_path / "zoo.pt2")
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    known = hasattr(torch._inductor.config.aot_inductor, "compile_wrapper_opt_level")
    with torch.no_grad():
        args = torch.randn(5, 3, 3), torch.tensor([5, 2, 3])
        shapes = ({0: t, 1: n}, {0: n})
        program = torch.export.export(model, args, dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(
            program, package_path=package, inductor_configs=quick if known else None
        )
        calls = []
        for steps, size in ((5, 3), (11, 4)):
            args = torch.randn(steps, size, 3), torch.tensor([steps, *[2] * (size - 1)])
            calls.append((*args, model(*args)))
    torch.save(calls, tmp_path / "calls.pt")
    command = [sys.executable, "-c", RUN, package, str(tmp_path / "calls.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
