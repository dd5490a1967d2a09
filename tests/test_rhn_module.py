"""fastrnn.RHN: parameters, arguments, shapes, masks, errors, compile, export, copies."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.functional import rhn
from tests.tolerances import assert_close_by_rule, assert_same_bits
from tests.versions import exporting


def make(*sizes: int, **options: Any) -> fastrnn.RHN:
    return fastrnn.RHN(*(sizes or (4, 6)), **{"depth": 2, "init_range": 0.4} | options)


def test_parameters() -> None:
    module = fastrnn.RHN(3, 5, 2, bidirectional=True, depth=4)
    expected = {}
    for layer, suffix in itertools.product((0, 1), ("", "_reverse")):
        expected[f"weight_ih_l{layer}{suffix}"] = (10, 10 if layer else 3)
        expected[f"weight_hh_l{layer}{suffix}"] = (4, 10, 5)
        expected[f"bias_l{layer}{suffix}"] = (4, 10)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == expected
    assert list(expected) == [n for n, _ in module.named_parameters()]
    module = fastrnn.RHN(3, 5, bias=False, couple_carry=False, depth=1)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    assert shapes == {"weight_ih_l0": (15, 3), "weight_hh_l0": (1, 15, 5)}


@pytest.mark.parametrize("couple_carry", [True, False])
def test_initial_values(couple_carry: bool) -> None:
    module = fastrnn.RHN(
        30, 40, depth=3, couple_carry=couple_carry, transform_bias=-3.0, init_range=0.07
    )
    bias = module.bias_l0.unflatten(1, (-1, 40))
    assert (bias[:, 1] == -3.0).all()
    if not couple_carry:
        assert (bias[:, 2] == 3.0).all()
        # 1 - t and c agree on the biases alone.
        assert torch.allclose(1 - bias[:, 1].sigmoid(), bias[:, 2].sigmoid())
    for values in (module.weight_ih_l0, module.weight_hh_l0, bias[:, 0]):
        assert values.abs().max() <= 0.07
        assert values.abs().max() > 0.06
        assert values.min() < -0.06
    torch.manual_seed(1)
    module.reset_parameters()
    first = module.weight_hh_l0.clone()
    torch.manual_seed(1)
    module.reset_parameters()
    assert_same_bits("weight_hh_l0", module.weight_hh_l0, first)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_shapes(num_layers: int, batch_first: bool, bidirectional: bool) -> None:
    module = make(num_layers=num_layers, batch_first=batch_first, bidirectional=bidirectional)
    d = 1 + bidirectional
    x = torch.randn((3, 5, 4) if batch_first else (5, 3, 4))
    output, h_n = module(x)
    assert output.shape == (*x.shape[:2], 6 * d)
    assert h_n.shape == (num_layers * d, 3, 6)
    again, _ = module(x, torch.zeros_like(h_n))
    assert_same_bits("output", again, output)
    row = 1
    single = x[row] if batch_first else x[:, row]
    alone, state = module(single, h_n[:, row])
    assert alone.shape == (5, 6 * d)
    assert state.shape == (num_layers * d, 6)
    batched, _ = module(x, h_n)
    assert_same_bits("one row", alone, batched[row] if batch_first else batched[:, row])


def test_a_stack_is_layer_after_layer() -> None:
    module = make(num_layers=2, bidirectional=True, couple_carry=False)
    x, hx = torch.randn(5, 3, 4), torch.randn(4, 3, 6)
    output, h_n = module(x, hx)
    y = x
    weights = list(module.parameters())
    for k in range(2):
        own = weights[k * 6 : k * 6 + 6]
        y, h = rhn(y, hx[2 * k : 2 * k + 2], own, couple_carry=False, bidirectional=True)
        assert_same_bits("h_n", h_n[2 * k : 2 * k + 2], h)
    assert_same_bits("output", output, y)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequence_and_lengths_agree(bidirectional: bool) -> None:
    module = make(num_layers=2, bidirectional=bidirectional)
    x, hx = torch.randn(5, 4, 4), torch.randn(2 * (1 + bidirectional), 4, 6)
    lengths = [3, 5, 1, 4]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, h_n = module(packed, hx)
    padded, _ = pad_packed_sequence(output)
    expected, state = module(x, hx, lengths=lengths)
    assert_same_bits("output", padded, expected)
    assert_same_bits("h_n", h_n, state)
    alone, last = module(x[:3, :1], hx[:, :1])
    assert_same_bits("sequence 0", expected[:3, :1], alone)
    assert_same_bits("state 0", state[:, :1], last)


def test_reset_starts_a_sequence_anew() -> None:
    module = make()
    x = torch.randn(6, 2, 4)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3] = True
    output, h_n = module(x, torch.randn(1, 2, 6), reset=reset)
    anew, last = module(x[3:])
    assert_same_bits("output", output[3:], anew)
    assert_same_bits("h_n", h_n, last)


@pytest.mark.parametrize("bias", [True, False])
def test_step(bias: bool) -> None:
    module = make(num_layers=2, bias=bias, variational_state=0.5).eval()
    x = torch.randn(5, 3, 4)
    expected, last = module(x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            state = None
            for t in range(5):
                y, state = module.step(x[t], state)
                assert_same_bits(f"step {t}", y, expected[t])
            assert_same_bits("state", state, last)
    y, state = module.step(x[0, 0])
    assert y.shape == (6,)
    assert state.shape == (2, 6)
    with pytest.raises(ValueError, match="bidirectional=True"):
        make(bidirectional=True).step(x[0])


def test_packed_weights_are_kept_and_follow_the_parameters() -> None:
    module = make().eval()
    x = torch.randn(5, 3, 4)
    with torch.no_grad():
        first = module(x)[0]
        assert len(module._packed) == 1
        assert_same_bits("kept", module(x)[0], first)
        module.weight_hh_l0.mul_(2)
        got = module(x)[0]
    assert not torch.equal(got, first)
    assert_same_bits("changed", got, copy.deepcopy(module)(x)[0].detach())


def test_copies() -> None:
    module = make(num_layers=2, couple_carry=False, bidirectional=True, dropout=0.25).eval()
    x = torch.randn(5, 3, 4)
    expected = module(x)[0]
    loaded = make(num_layers=2, couple_carry=False, bidirectional=True, dropout=0.25).eval()
    loaded.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert_same_bits("output", other(x)[0], expected)
        assert repr(other) == repr(module)
        assert other._all_weights == module._all_weights


def test_repr_shows_what_is_not_default() -> None:
    assert repr(fastrnn.RHN(3, 5)) == "RHN(3, 5, depth=5)"
    options = {"num_layers": 2, "couple_carry": False, "variational_state": 0.5, "recompute": True}
    shown = "num_layers=2, couple_carry=False, variational_state=0.5, recompute=True"
    assert repr(fastrnn.RHN(3, 5, **options)) == f"RHN(3, 5, depth=5, {shown})"


def captured_masks(monkeypatch: pytest.MonkeyPatch, module: nn.Module, x: Tensor) -> list[Any]:
    """The masks of one call, per layer: (x_mask, s_mask)."""
    from fastrnn.backends import reference

    taken: list[Any] = []
    run = reference.rhn

    def record(x: Tensor, h: Tensor, w: Any, x_mask: Any, s_mask: Any, *rest: Any) -> Any:
        taken.append((x_mask, s_mask))
        return run(x, h, w, x_mask, s_mask, *rest)

    with monkeypatch.context() as patch, fastrnn.use_backend("reference"):
        patch.setattr(reference, "rhn", record)
        module(x)
    return taken


@pytest.mark.parametrize("tied", [True, False])
def test_masks(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """Rate, scale, and independence of gates, directions, layers, sequences and calls."""
    rates = {"variational_input": 0.25, "variational_state": 0.75}
    options = {"num_layers": 2, "bidirectional": True, "couple_carry": False, "depth": 2}
    module = fastrnn.RHN(60, 60, tie_gate_masks=tied, **options, **rates)
    x = torch.randn(2, 80, 60)
    calls = captured_masks(monkeypatch, module, x) + captured_masks(monkeypatch, module, x)
    masks = [m for pair in calls for m in pair]
    groups = 1 if tied else 3
    for (x_mask, s_mask), wide in zip(calls, (60, 120) * 2, strict=True):
        assert x_mask.shape == (2, groups, 80, wide)
        assert s_mask.shape == (2, groups, 80, 60)
        for mask, p in ((x_mask, 0.25), (s_mask, 0.75)):
            kept = mask != 0
            scale = torch.full_like(mask[kept], 1 / (1 - p))
            assert_close_by_rule("scale", mask[kept], scale.double(), scale)
            # Five standard deviations of a mean of so many.
            spread = 5 * (p * (1 - p) / mask.numel()) ** 0.5
            assert abs(float(kept.double().mean()) - (1 - p)) < spread
    for mask in masks:
        rows = mask.flatten(0, 2)
        assert len(rows.unique(dim=0)) == len(rows), "two sequences, gates or directions agree"
    assert not torch.equal(calls[0][1], calls[2][1]), "two calls agree"
    assert not torch.equal(calls[0][1], calls[1][1]), "two layers agree"


@pytest.mark.parametrize("couple_carry", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_masks_are_shared_over_time_and_depth(tied: bool, couple_carry: bool) -> None:
    """A feature that a mask removes has no effect at any step or depth: its weights no gradient."""
    module = make(4, 6, depth=3, tie_gate_masks=tied, couple_carry=couple_carry)
    module.variational_input = module.variational_state = 0.5
    gates = 2 if couple_carry else 3
    removed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        output, _ = module(torch.randn(7, 1, 4), torch.randn(1, 1, 6))
        dw_ih, dw_hh = torch.autograd.grad(
            output.square().sum(), [module.weight_ih_l0, module.weight_hh_l0]
        )
        zero_x = (dw_ih.unflatten(0, (gates, 6)) == 0).all(1)  # (G, I)
        zero_s = (dw_hh.unflatten(1, (gates, 6)) == 0).all(2)  # (L, G, H)
        assert (zero_s == zero_s[:1]).all(), "masks differ between depths"
        if tied:
            assert (zero_x == zero_x[:1]).all()
            assert (zero_s == zero_s[:, :1]).all()
        removed += int(zero_x.sum() + zero_s.sum())
    # Half of 20 x G x (I + L H) features, in groups that fall together.
    assert 0.3 < removed / (20 * gates * (4 + 3 * 6)) < 0.7


def test_masks_of_eval_and_of_probability_0_and_1() -> None:
    module = make(variational_input=0.5, variational_state=0.5)
    plain = make()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, 3, 4)
    assert not torch.equal(module(x)[0], module(x)[0])
    assert_same_bits("eval", module.eval()(x)[0], plain(x)[0])
    before = torch.get_rng_state()
    module(x)
    plain(x)
    assert torch.equal(torch.get_rng_state(), before), "a call without masks drew numbers"
    blind = make(variational_input=1.0)
    blind.load_state_dict(module.state_dict())
    assert_same_bits("p = 1", blind(x)[0], plain(torch.zeros_like(x))[0])


def test_one_seed_gives_one_result_on_every_backend_and_layout() -> None:
    options = {"num_layers": 2, "dropout": 0.5, "variational_input": 0.2, "variational_state": 0.3}
    module = make(bidirectional=True, tie_gate_masks=False, **options).double()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    results = []
    for backend in ("cpu", "reference"):
        with fastrnn.use_backend(backend):
            for grad, first in itertools.product((True, False), (False, True)):
                module.batch_first = first
                torch.manual_seed(3)
                with torch.set_grad_enabled(grad):
                    y, h = module(x.transpose(0, 1) if first else x)
                results.append((y.transpose(0, 1) if first else y, h))
    for y, h in results[1:]:
        assert_close_by_rule("output", y, results[0][0].detach(), results[0][0].detach())
        assert_close_by_rule("h_n", h, results[0][1].detach(), results[0][1].detach())


def test_explain_and_backends() -> None:
    module, x = make(), torch.randn(5, 3, 4)
    assert fastrnn.explain(module, x).backend == "cpu"
    assert "all steps in one call" in fastrnn.explain(module, x).plan
    assert "computed in float32" in fastrnn.explain(module.bfloat16(), x.bfloat16()).plan
    module.float()
    for name in ("torch", "cuda", "triton"):
        with fastrnn.use_backend(name), pytest.raises(RuntimeError, match=f"the {name} backend"):
            module(x)
    with fastrnn.use_backend("torch", strict=False) as override:
        module(x)
    assert override.fallbacks[0][:2] == ("torch", "cpu")
    assert "Recurrent Highway Network" in override.fallbacks[0][2]
    with fastrnn.use_backend("reference"):
        assert fastrnn.explain(module, x).backend == "reference"


def test_bf16_weights_are_not_promised() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        module, x = make().eval(), torch.randn(5, 3, 4)
        with torch.no_grad():
            assert "no bf16 weights" in fastrnn.explain(module, x).plan
            got = module(x)[0]
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same_bits("output", got, module(x)[0].detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    module, x = make(), torch.randn(5, 3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        output, h_n = module(x, torch.randn(1, 3, 6))
    assert output.dtype == h_n.dtype == dtype
    output.float().sum().backward()
    assert x.grad.dtype == module.weight_hh_l0.grad.dtype == torch.float32


def test_vmap_over_stacked_modules() -> None:
    modules = [make() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(5, 2, 4)

    def call(p: Any, b: Any) -> Tensor:
        return torch.func.functional_call(modules[0], (p, b), (x,))[0]

    for got, module in zip(torch.vmap(call)(parameters, buffers), modules, strict=True):
        same = module(x)[0].detach()
        assert_close_by_rule("output", got, same.double(), same)


def test_weight_norm_and_partial_gradients() -> None:
    module = make()
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0", dim=1)
    module.weight_ih_l0.requires_grad_(False)
    module(torch.randn(5, 3, 4))[0].sum().backward()
    assert module.weight_ih_l0.grad is None
    assert module.parametrizations.weight_hh_l0.original1.grad.abs().sum() > 0


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"depth": 0}, ValueError, "depth: got 0, expected at least 1"),
    ({"depth": 2.0}, TypeError, "depth: got 2.0"),
    ({"depth": True}, TypeError, "depth: got True"),
    ({"hidden_size": 0}, ValueError, "hidden_size: got 0"),
    ({"hidden_size": "6"}, TypeError, "hidden_size: got '6'"),
    ({"num_layers": 0}, ValueError, "num_layers: got 0"),
    ({"dropout": 1.5}, ValueError, r"dropout: got 1.5, expected a probability in \[0, 1\]"),
    ({"variational_input": -0.1}, ValueError, "variational_input: got -0.1"),
    ({"variational_state": 2}, ValueError, "variational_state: got 2"),
    ({"variational_state": float("nan")}, ValueError, "variational_state: got nan"),
    ({"variational_state": "0.5"}, TypeError, "variational_state: got '0.5'"),
    ({"init_range": -1.0}, ValueError, "init_range: got -1.0"),
    ({"init_range": float("inf")}, ValueError, "init_range: got inf, expected a finite"),
    ({"transform_bias": float("nan")}, ValueError, "transform_bias: got nan"),
    ({"transform_bias": None}, TypeError, "transform_bias: got None"),
    ({"couple_carry": 1}, TypeError, "couple_carry should be of type bool"),
    ({"tie_gate_masks": "no"}, TypeError, "tie_gate_masks should be of type bool"),
    ({"recompute": 0}, TypeError, "recompute should be of type bool"),
    ({"proj_size": 3}, TypeError, "proj_size"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD_ARGUMENTS)
def test_constructor_errors(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fastrnn.RHN(**{"input_size": 4, "hidden_size": 6} | options)


def test_dropout_without_a_second_layer_warns() -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        fastrnn.RHN(4, 6, dropout=0.5)


def bad_calls() -> Iterator[tuple[str, Callable[[fastrnn.RHN, Tensor], Any], Any, str]]:
    h = torch.zeros(1, 3, 6)
    yield "rank", lambda m, x: m(x[None]), ValueError, "2D or 3D"
    yield "type", lambda m, x: m([1]), TypeError, "Tensor or a PackedSequence"
    yield "features", lambda m, x: m(x[..., :3]), RuntimeError, "Expected 4, got 3"
    yield "no steps", lambda m, x: m(x[:0]), RuntimeError, "larger than 0"
    yield "pair", lambda m, x: m(x, (h, h)), TypeError, "hx should be a Tensor"
    yield "state", lambda m, x: m(x, h[:, :2]), RuntimeError, "Expected hidden size"
    yield "state type", lambda m, x: m(x, h.double()), RuntimeError, "same dtype"
    yield "input type", lambda m, x: m(x.double()), ValueError, "does not match weight dtype"
    yield "cells", lambda m, x: m(x, return_cells=True), ValueError, "RHN has no cell state"
    yield "lengths", lambda m, x: m(x, lengths=[1, 2, 6]), ValueError, "lengths: got values"
    yield "reset", lambda m, x: m(x, reset=torch.zeros(5, 3)), TypeError, "reset: got"
    packed = pack_padded_sequence(torch.randn(5, 3, 4), [5, 4, 3])
    yield "both", lambda m, x: m(packed, lengths=[5, 4, 3]), ValueError, "PackedSequence"


@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout", "weight_dropout"])
def test_regularisers_of_other_cells(name: str) -> None:
    module = fastrnn.RHN(3, 4)
    with pytest.raises(AttributeError, match=f"{name}: got 0.3, but an RHN has no {name}; its"):
        setattr(module, name, 0.3)
    assert getattr(module, name) == 0
    assert fastrnn.explain(module, torch.zeros(2, 1, 3)).backend == "cpu"


@pytest.mark.parametrize(("name", "call", "kind", "message"), list(bad_calls()))
def test_call_errors_leave_everything_as_it_was(
    name: str, call: Callable[..., Any], kind: type[Exception], message: str
) -> None:
    module = make(variational_input=0.5, variational_state=0.5)
    x = torch.randn(5, 3, 4)
    before = torch.get_rng_state()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(kind, match=message):
        call(module, x)
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in module.state_dict().items():
        assert_same_bits(key, value, state[key])


def test_missing_weights() -> None:
    x = torch.randn(5, 3, 4)
    coupled = list(make().parameters())
    with pytest.raises(RuntimeError, match=r"expected \(18, 4\).*rows of h, t and c"):
        rhn(x, None, coupled, couple_carry=False)
    with pytest.raises(RuntimeError, match=r"expected \(12, 4\).*rows of h and t"):
        rhn(x, None, list(make(couple_carry=False).parameters()))
    with pytest.raises(ValueError, match="got 3 tensors, expected 2"):
        rhn(x, None, coupled, bias=False)
    with pytest.raises(ValueError, match="of 2 and 2 dimensions, expected 2 and 3"):
        rhn(x, None, [coupled[0], coupled[1][0], coupled[2]])
    with pytest.raises(ValueError, match="got depth 0"):
        rhn(x, None, [coupled[0], coupled[1][:0], coupled[2][:0]])
    with pytest.raises(ValueError, match="variational_state: got 3"):
        rhn(x, None, coupled, variational_state=3)
    module = make()
    del module.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        module(x)


pytestmark = [
    # torch's own compile stack warns about its own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def values_and_gradients(call: Callable[..., Any], x: Tensor, module: nn.Module) -> list[Tensor]:
    torch.manual_seed(11)
    outputs = call(x)
    loss = sum(o.square().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]


def assert_equal_to_eager(got: list[Tensor], eager: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, eager, strict=True)):
        assert_close_by_rule(f"value {i}", a, b.detach().double(), b)


@pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning")  # torch 2.6
@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("couple_carry", [True, False])
def test_compiled_training_for_every_length(couple_carry: bool, backend: str) -> None:
    module = make(num_layers=2, bidirectional=True, couple_carry=couple_carry)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for i, steps in enumerate((5, 9)):
        x = torch.randn(steps, 2, 4, requires_grad=True)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = values_and_gradients(compiled, x, module)
        assert_equal_to_eager(got, values_and_gradients(module, x, module))


@pytest.mark.compile
@pytest.mark.parametrize("tied", [True, False])
def test_compiled_masks_and_options(tied: bool) -> None:
    module = make(
        num_layers=2, batch_first=True, recompute=True, variational_input=0.5,
        variational_state=0.5, tie_gate_masks=tied,
    )  # fmt: skip
    lengths, reset = torch.tensor([5, 2]), torch.rand(2, 5) < 0.3

    def call(x: Tensor) -> Any:
        return module(x, lengths=lengths, reset=reset)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 4, requires_grad=True)
    got = values_and_gradients(compiled, x, module)
    assert_equal_to_eager(got, values_and_gradients(call, x, module))


@pytest.mark.compile
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_export(strict: bool) -> None:
    module = make(num_layers=2, bidirectional=True).eval()
    x = torch.randn(5, 2, 4)
    shapes = {"input": {0: torch.export.Dim("steps", min=2, max=1000)}}
    with exporting(strict):
        program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert sum("fastrnn.rhn" in t for t in targets) == 2, targets
    for x in (torch.randn(5, 2, 4), torch.randn(11, 2, 4)):
        with torch.no_grad():
            assert_equal_to_eager(list(program.module()(x)), list(module(x)))
