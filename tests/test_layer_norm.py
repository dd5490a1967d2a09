"""LSTM and GRU with layer_norm=True: the modules. Kernels and gradients are in shared suites."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from tests.test_compile import assert_equal_to_eager, flat
from tests.tolerances import assert_close_by_rule, assert_same_bits

EPS = 1e-5
T, N, I, H = 6, 4, 5, 7

KINDS: dict[str, Callable[..., nn.Module]] = {
    "lstm": lambda *a, **k: fastrnn.LSTM(*a, layer_norm=True, **k),
    "lstm_proj": lambda *a, **k: fastrnn.LSTM(*a, layer_norm=True, proj_size=3, **k),
    "gru": lambda *a, **k: fastrnn.GRU(*a, layer_norm=True, **k),
}


def build(kind: str, **options: Any) -> nn.Module:
    """A module whose gains and biases are not the initial ones and zeros."""
    module = KINDS[kind](I, H, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("ln_"):
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.3)
    return module


def normalise(u: np.ndarray) -> np.ndarray:
    centred = u - u.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + EPS)


def sigmoid(u: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-u))


def oracle(module: nn.Module, x: Tensor) -> list[np.ndarray]:
    """Output and final states by the formula of the paper, layer after layer, in NumPy."""
    value, lstm = x.numpy(), module.mode == "LSTM"
    finals: list[list[np.ndarray]] = [[], []]
    for layer in range(module.num_layers):
        outputs = []
        for d in range(1 + module.bidirectional):
            suffix = f"_l{layer}" + "_reverse" * d
            w = {
                name.removesuffix(suffix): p.detach().numpy()
                for name, p in module.named_parameters()
                if name.endswith(suffix) and (d or not name.endswith("_reverse"))
            }
            h, c = np.zeros((N, module.proj_size or H)), np.zeros((N, H))
            y = np.zeros((T, *h.shape))
            for t in sorted(range(T), reverse=d == 1):
                a = w["ln_weight_ih"] * normalise(value[t] @ w["weight_ih"].T) + w["bias_ih"]
                b = w["ln_weight_hh"] * normalise(h @ w["weight_hh"].T) + w["bias_hh"]
                if lstm:
                    i, f, g, o = np.split(a + b, 4, axis=1)
                    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                    out = normalise(c) * w["ln_weight_c"] + w["ln_bias_c"]
                    h = sigmoid(o) * np.tanh(out)
                    h = h @ w["weight_hr"].T if module.proj_size else h
                else:
                    r, z = sigmoid((a + b)[:, :H]), sigmoid((a + b)[:, H : 2 * H])
                    n = np.tanh(a[:, 2 * H :] + r * b[:, 2 * H :])
                    h = (1 - z) * n + z * h
                y[t] = h
            outputs.append(y)
            finals[0].append(h)
            finals[1].append(c)
        value = np.concatenate(outputs, axis=2)
    return [value, np.stack(finals[0])] + [np.stack(finals[1])] * lstm


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind: str, options: dict[str, Any], backend: str) -> None:
    module = build(kind, dtype=torch.float64, **options)
    x = torch.randn(T, N, I, dtype=torch.float64)
    with fastrnn.use_backend(backend):
        got = flat(module(x))
    for i, (value, expected) in enumerate(zip(got, oracle(module, x), strict=True)):
        truth = torch.from_numpy(expected)
        assert_close_by_rule(f"result {i}", value, truth, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters(kind: str) -> None:
    """torch's first, from the same draws; then gains of 1 and biases of 0, for each direction."""
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(5)
    module = KINDS[kind](I, H, **options)
    cls = nn.LSTM if kind.startswith("lstm") else nn.GRU
    torch.manual_seed(5)
    plain = cls(I, H, **options, **({"proj_size": 3} if "proj" in kind else {}))
    rows = (4 if cls is nn.LSTM else 3) * H
    sizes = {"ln_weight_ih": rows, "ln_weight_hh": rows}
    sizes |= {"ln_weight_c": H, "ln_bias_c": H} if cls is nn.LSTM else {}
    state = dict(module.state_dict())
    for name, value in plain.state_dict().items():
        assert_same_bits(name, state.pop(name), value)
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        for name, size in sizes.items():
            value = state.pop(name + suffix)
            assert value.tolist() == [0.0 if name == "ln_bias_c" else 1.0] * size
    assert not state
    assert [len(group) for group in module.all_weights] == [len(sizes) + 4 + ("proj" in kind)] * 4

    before = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(3.0)
    torch.manual_seed(5)
    module.reset_parameters()
    for name, value in module.state_dict().items():
        assert_same_bits(name, value, before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_make_the_sequence(kind: str) -> None:
    module = build(kind, num_layers=2)
    x = torch.randn(T, N, I)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            for _ in range(3):  # the later calls are prepared ones
                expected, states = module(x)
                state, outputs = None, []
                for x_t in x:
                    y, state = module.step(x_t, state)
                    outputs.append(y)
                assert_same_bits("outputs", torch.stack(outputs), expected)
                for a, b in zip(flat(state), flat(states), strict=True):
                    assert_same_bits("state", a, b)
    module.ln_weight_ih_l0.data.mul_(2)
    with torch.no_grad():
        assert not torch.equal(module(x)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_different_length(kind: str) -> None:
    """Packed, padded and one by one are the same."""
    module = build(kind, bidirectional=True)
    x, lengths = torch.randn(T, N, I), [3, 6, 1, 4]
    padded, states = module(x, lengths=lengths)
    packed, packed_states = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    again, _ = nn.utils.rnn.pad_packed_sequence(packed)
    assert_same_bits("packed", again, padded)
    for a, b in zip(flat(packed_states), flat(states), strict=True):
        assert_same_bits("packed states", a, b)
    for n, length in enumerate(lengths):
        assert_same_bits("alone", module(x[:length, n])[0], padded[:length, n])


@pytest.mark.parametrize("kind", KINDS)
def test_reset_begins_anew(kind: str) -> None:
    module = build(kind)
    x, reset = torch.randn(T, N, I), torch.zeros(T, N, dtype=torch.bool)
    reset[2] = True
    assert_same_bits("after the reset", module(x, reset=reset)[0][2:], module(x[2:])[0])


def test_return_cells() -> None:
    module = build("lstm", bidirectional=True)
    x = torch.randn(T, N, I)
    output, (_, c_n), cells = module(x, return_cells=True)
    assert cells.shape == (T, N, 2 * H)
    assert_same_bits("last cell", cells[-1, :, :H], c_n[0])
    assert_same_bits("output", output, module(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_explain(kind: str, dtype: torch.dtype) -> None:
    module = build(kind, dtype=dtype)
    x = torch.randn(T, N, I, dtype=dtype)
    found = fastrnn.explain(module, x)
    assert found.backend == "cpu"
    assert ("computed in float32" in found.plan) == (dtype == torch.bfloat16)
    with (
        fastrnn.use_backend("torch"),
        pytest.raises(RuntimeError, match="has no layer_norm"),
    ):
        module(x)
    torch.set_float32_matmul_precision("medium")
    try:
        if dtype == torch.float32:
            assert "no bf16 weights for this cell" in fastrnn.explain(module, x).plan
            with torch.no_grad():
                got = module(x)[0]
            torch.set_float32_matmul_precision("highest")
            assert_same_bits("float32 stays", got, module(x)[0])
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind: str) -> None:
    module = build(kind, num_layers=2)
    x = torch.randn(T, N, I)
    expected = module(x)[0]
    with torch.no_grad():
        module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    copies.append(torch.load(file, weights_only=False))
    fresh = KINDS[kind](I, H, num_layers=2)
    fresh.load_state_dict(module.state_dict())
    for other in (*copies, fresh):
        assert other.layer_norm
        assert_same_bits("output", other(x)[0], expected)
    assert "layer_norm=True" in repr(module)
    assert "layer_norm" not in repr(fastrnn.GRU(3, 4))


def test_arguments() -> None:
    with pytest.raises(ValueError, match="layer_norm: got True with reset_after=False"):
        fastrnn.GRU(3, 4, layer_norm=True, reset_after=False)
    with pytest.raises(ValueError, match="layer_norm: got True with reset_after=False"):
        fastrnn.functional.gru(
            torch.randn(2, 1, 3), None, [torch.randn(3, 3)] * 6, layer_norm=True, reset_after=False
        )
    with pytest.raises(TypeError, match="layer_norm should be of type bool, got: int"):
        fastrnn.LSTM(3, 4, layer_norm=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer_norm'"):
        fastrnn.RNN(3, 4, layer_norm=True)
    module = fastrnn.LSTM(3, 4, layer_norm=True)
    weights = list(module.parameters())
    with pytest.raises(ValueError, match=r"expected 4 for each .*\(bias=True, proj_size=0\)"):
        fastrnn.functional.lstm(torch.randn(2, 1, 3), None, weights)
    with pytest.raises(ValueError, match=r"expected 8 .* layer_norm=True\)"):
        fastrnn.functional.lstm(torch.randn(2, 1, 3), None, weights[:4], layer_norm=True)
    weights[5] = torch.ones(7)
    with pytest.raises(RuntimeError, match=r"flat_weights\[5\]: got .*, expected \(16,\)"):
        fastrnn.functional.lstm(torch.randn(2, 1, 3), None, weights, layer_norm=True)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_not_restored(kind: str) -> None:
    model = nn.Sequential(build(kind))
    with pytest.warns(UserWarning, match="layer_norm=True, which torch.nn"):
        fastrnn.restore(model)
    assert type(model[0]).__module__.startswith("fastrnn")


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_and_devices(kind: str) -> None:
    module = build(kind)
    double = copy.deepcopy(module).double()
    x = torch.randn(T, N, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x)[0].dtype == (torch.float32 if kind == "gru" else torch.bfloat16)
    with fastrnn.use_backend("reference"):
        same = module(x)[0]
    assert_close_by_rule("float32", module(x)[0], double(x.double())[0], same)
    meta = KINDS[kind](I, H, device="meta")
    assert meta(torch.empty(T, N, I, device="meta"))[0].shape == module(x)[0].shape
    real = meta.to_empty(device="cpu")
    real.reset_parameters()
    assert torch.isfinite(real(x)[0]).all()


def test_reset_parameters_of_a_parametrised_norm() -> None:
    module = fastrnn.LSTM(3, 4, layer_norm=True)
    nn.utils.parametrize.register_parametrization(module, "ln_weight_ih_l0", nn.Identity())
    with torch.no_grad():
        module.parametrizations.ln_weight_ih_l0.original.fill_(3.0)
    module.reset_parameters()
    assert torch.equal(module.ln_weight_ih_l0, torch.ones(16))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_and_vmap(kind: str) -> None:
    modules = [build(kind) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(T, N, I)

    def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(modules[0], (p, b), (x,))[0]

    stacked = torch.vmap(call)(parameters, buffers)
    for module, got in zip(modules, stacked, strict=True):
        exact = copy.deepcopy(module).double()(x.double())[0]
        assert_close_by_rule("vmap", got, exact, module(x)[0])


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str) -> None:
    """One graph for every length, forward and backward; export as one program."""
    module = build(kind, num_layers=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)

    def run(call: Any, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        outputs = flat(call(x))
        loss = sum(o.square().sum() for o in outputs)
        return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]

    for i, steps in enumerate((4, 9)):
        x = torch.randn(steps, 3, I)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = run(compiled, x)
        assert_equal_to_eager(got, run(module, x))
    program = torch.export.export(module.eval(), (x,))
    assert_equal_to_eager(flat(program.module()(x)), flat(module(x)))
