"""The CUDA backend as a user meets it, on the emulator: modules, explain, reasons, failures."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn.backends import cuda_native
from tests.saved_strides import LAYERS, check_other_strides
from tests.tolerances import assert_close_by_rule, assert_same_bits

MODULES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"batch_first": True, "bias": False}),
    ("LSTM", {"recompute": True}),
    ("LSTM", {"proj_size": 3, "num_layers": 2}),
    ("LSTM", {"layer_norm": True, "bidirectional": True}),
    ("GRU", {"layer_norm": True, "batch_first": True}),
    ("GRU", {"num_layers": 2}),
    ("GRU", {"reset_after": False, "bidirectional": True}),
    ("RNN", {"nonlinearity": "relu"}),
]
IDS = ["-".join([name, *options]) for name, options in MODULES]


def solve(rnn: torch.nn.Module, x: Any, backend: str, **options: Any) -> list[torch.Tensor]:
    """Output, states and gradients of a call on one backend."""
    rnn.zero_grad()
    with fastrnn.use_backend(backend):
        y, state, *cells = rnn(x, **options)
        y = y.data if isinstance(y, PackedSequence) else y
        states = state if isinstance(state, tuple) else (state,)
        sum(t.float().square().sum() for t in (y, *states, *cells)).backward()
    grads = [w.grad.clone() for w in rnn.parameters()]
    return [t.detach() for t in (y, *states, *cells, *grads)]


def compare(rnn: torch.nn.Module, x: Any, **options: Any) -> None:
    """The backend beside the reference in its dtype, bfloat16, by the rule."""
    got, same = solve(rnn, x, "cuda", **options), solve(rnn, x, "reference", **options)
    truth = x._replace(data=x.data.double()) if isinstance(x, PackedSequence) else x.double()
    exact = solve(rnn.double(), truth, "reference", **options)
    for index, (a, b, c) in enumerate(zip(got, same, exact, strict=True)):
        assert_close_by_rule(f"result {index}", a, c.double(), b, torch.bfloat16)


@pytest.mark.parametrize(("name", "options"), MODULES, ids=IDS)
def test_modules(name: str, options: dict[str, Any]) -> None:
    rnn = getattr(fastrnn, name)(3, 8, **options, dtype=torch.bfloat16)
    x = torch.randn(3, 3, 3, dtype=torch.bfloat16)
    more: dict[str, Any] = {"lengths": [1, 3, 2]}
    if name == "LSTM":
        more["return_cells"] = True
    compare(rnn, x, **more)


@pytest.mark.parametrize("layer", LAYERS)
def test_saved_tensors_with_other_strides(layer: str) -> None:
    check_other_strides(solve, layer, "cuda")


def test_packed_sequence() -> None:
    rnn = fastrnn.GRU(3, 5, bidirectional=True, dtype=torch.bfloat16)
    steps = [torch.randn(t, 3, dtype=torch.bfloat16) for t in (2, 3, 1)]
    compare(rnn, pack_sequence(steps, enforce_sorted=False))


def test_explain() -> None:
    x = torch.randn(3, 2, 3, dtype=torch.bfloat16)
    rnn = fastrnn.LSTM(3, 5, dtype=torch.bfloat16)
    with fastrnn.use_backend("cuda"):
        trained = fastrnn.explain(rnn, x).plan
        with torch.no_grad():
            plan = fastrnn.explain(rnn, x).plan
        wide = fastrnn.explain(fastrnn.LSTM(3, 64, dtype=torch.bfloat16), x).plan
    with fastrnn.use_backend("cuda"), torch.no_grad():
        assert fastrnn.explain(rnn, x[:, :0]).plan == fastrnn.explain(rnn, x[:, :1]).plan
    assert plan.startswith("bf16; forward: cluster, 16 units x 8 rows a CTA, 1 groups x 1 CTAs")
    assert "instead of: sentinel, 16 units" in plan
    assert "| local, 48 units x 8 rows" in plan
    assert "backward" not in plan
    assert "; backward: cluster, 16 units" in trained
    assert "more units than one CTA has" in wide
    assert fastrnn.explain(rnn, x).backend == "cpu"


def test_what_it_does_not_serve() -> None:
    rnn = fastrnn.GRU(3, 5, dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    why = "it has no torch.float64 kernels"
    with fastrnn.use_backend("cuda"), pytest.raises(RuntimeError, match=why):
        rnn(x)
    with fastrnn.use_backend("cuda", strict=False) as asked:
        rnn(x)
    assert asked.fallbacks[0][:2] == ("cuda", "cpu")


def test_a_wait_given_up_is_reported_once() -> None:
    rnn = fastrnn.RNN(3, 5, dtype=torch.bfloat16)
    x = torch.randn(3, 2, 3, dtype=torch.bfloat16)
    with torch.no_grad(), fastrnn.use_backend("cuda"):
        before = rnn(x)[0]
        cuda_native._errors[0][0] = 1  # as a kernel does
        with pytest.raises(RuntimeError, match="waited more than four seconds"):
            rnn(x)
        assert_same_bits("the next call", rnn(x)[0], before)
        cuda_native._errors[0][0] = 1
        with pytest.raises(RuntimeError, match="waited more than four seconds"):
            cuda_native.raise_if_failed(0)
        cuda_native.raise_if_failed(0)


def test_a_wait_given_up_after_a_first_call_in_inference_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The word is no inference tensor, which other calls could not put back."""
    monkeypatch.setattr(cuda_native, "_errors", {})
    rnn = fastrnn.RNN(3, 5, dtype=torch.bfloat16)
    x = torch.randn(3, 2, 3, dtype=torch.bfloat16)
    with fastrnn.use_backend("cuda"):
        with torch.inference_mode():
            before = rnn(x)[0]
            cuda_native._errors[0][0] = 1
        with torch.no_grad(), pytest.raises(RuntimeError, match="waited more than four seconds"):
            rnn(x)
        with torch.no_grad():
            assert_same_bits("the next call", rnn(x)[0], before)


def test_a_driver_that_holds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's count of resident CTAs stands above the plan's."""

    class Native:
        resident = 6

        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

        def resident_ctas(self, *_: object) -> int:
            return self.resident

    native, stands_in = cuda_native._cuda, Native()
    problem = (cuda_native.Need("lstm", torch.bfloat16, 40, 40, 1), False, 0, "sentinel")
    monkeypatch.setattr(cuda_native, "_cuda", stands_in)
    monkeypatch.setattr(cuda_native, "_chosen", {})
    monkeypatch.setattr(cuda_native, "_none", {})
    plan = cuda_native.choose(*problem)
    assert plan.groups * plan.ctas <= 6
    assert plan.launches > 1
    cuda_native._chosen.clear()
    stands_in.resident = 2
    for _ in range(2):  # the second time nobody is asked
        with pytest.raises(RuntimeError, match="3 CTAs wait for each other, the device holds 2"):
            cuda_native.choose(*problem)
        stands_in.resident = 0
    cuda_native._none.clear()
    with pytest.raises(RuntimeError, match="the driver holds no CTA of it"):
        cuda_native.choose(*problem)


def test_the_library_checks_its_fields() -> None:
    native = cuda_native._cuda
    plan = cuda_native.choose(cuda_native.Need("lstm", torch.bfloat16, 2, 8, 1), False, 0)
    with pytest.raises(ValueError, match="too few fields"):
        native.forward(0, 0, plan.kernel, (1, 2, 8), ())
    with pytest.raises(ValueError, match="too many fields"):
        native.plans(native.device(0), (0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="not compiled in"):
        native.packed_bytes((*plan.kernel[:-1], 99), 1)


def test_gradient_of_a_gradient() -> None:
    rnn = fastrnn.LSTM(3, 4, dtype=torch.float64)
    x = torch.randn(2, 2, 3)
    found = []
    for backend in ("cuda", "reference"):
        half = rnn.to(torch.float32)
        given = x.clone().requires_grad_()
        with fastrnn.use_backend(backend):
            (dx,) = torch.autograd.grad(half(given)[0].square().sum(), given, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), half.parameters()))
    for index, (got, expected) in enumerate(zip(*found, strict=True)):
        assert_close_by_rule(
            f"gradient {index}", got, expected.double(), expected, number_format="tf32"
        )


def test_autocast() -> None:
    rnn = fastrnn.LSTM(3, 5)
    x = torch.randn(3, 2, 3)
    with fastrnn.use_backend("cuda"), torch.autocast("cpu", torch.bfloat16):
        y, (h_n, c_n) = rnn(x)
    assert y.dtype == h_n.dtype == c_n.dtype == torch.bfloat16


@pytest.mark.compile
# torch's own, raised while it traces
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GRU", {}),
        ("RNN", {"recurrent_dropout": 0.4, "zoneout": 0.3}),
        ("RHN", {"depth": 2, "variational_state": 0.3}),
        ("BNLSTM", {"max_length": 2}),
    ],
    ids=["GRU", "regularised", "RHN", "BNLSTM"],
)
def test_compiled_whole(name: str, options: dict[str, Any], packed: bool) -> None:
    """One graph, in which the layer is an operator, forward and backward."""
    rnn = getattr(fastrnn, name)(3, 5, **options, dtype=torch.bfloat16)
    x: Any = torch.randn(3, 2, 3, dtype=torch.bfloat16)
    if packed:
        x = pack_sequence([x[:, 0], x[:2, 1]])
    again = deepcopy(rnn)  # a call moves running statistics
    torch.manual_seed(5)
    expected = solve(rnn, x, "cuda")
    torch.manual_seed(5)
    got = solve(torch.compile(again, fullgraph=True, backend="aot_eager"), x, "cuda")
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(f"result {index}", a, b)


def test_fakes_say_what_the_operators_return() -> None:
    for cell, count in (("LSTM", 2), ("GRU", 1), ("RNN", 1)):
        mode = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[cell]
        weights = [
            p.detach() for p in getattr(fastrnn, cell)(3, 5, dtype=torch.bfloat16).parameters()
        ]
        x, h = torch.randn(2, 4, 3).bfloat16(), torch.randn(1, 4, 5).bfloat16()
        c = h.clone() if count == 2 else None
        rest = (None, None, None, mode, False, False, "cuda")
        torch.library.opcheck(
            torch.ops.fastrnn.layer_forward_train.default, (x, h, c, weights, *rest),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
        sizes = torch.tensor([4, 3])
        packed = (x.flatten(0, 1)[:7].clone(), h, c, weights, sizes, *rest[1:])
        torch.library.opcheck(
            torch.ops.fastrnn.layer_forward_train.default, packed,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
