"""Modules with regularisers: the random numbers they draw, layouts, threads, arguments, errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.handover import HANDOVER, Handover
from fastrnn.regularisers import check
from tests.tolerances import assert_close_by_rule, assert_same_bits

KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "lstm-update": (fastrnn.LSTM, {"recurrent_dropout": 0.4}),
    "lstm-cell": (fastrnn.LSTM, {"recurrent_dropout": 0.4, "recurrent_dropout_mode": "cell"}),
    "lstm-state": (fastrnn.LSTM, {"recurrent_dropout": 0.4, "recurrent_dropout_mode": "state"}),
    "lstm-zoneout": (fastrnn.LSTM, {"zoneout": (0.2, 0.5)}),
    "lstm-weight": (fastrnn.LSTM, {"weight_dropout": 0.3}),
    "lstm-proj": (fastrnn.LSTM, {"recurrent_dropout": 0.4, "zoneout": 0.3, "proj_size": 3}),
    "gru-update": (fastrnn.GRU, {"recurrent_dropout": 0.4, "zoneout": 0.3}),
    "gru-state": (fastrnn.GRU, {"recurrent_dropout": 0.4, "recurrent_dropout_mode": "state"}),
    "gru_before-state": (
        fastrnn.GRU,
        {"recurrent_dropout": 0.4, "recurrent_dropout_mode": "state", "reset_after": False},
    ),
    "rnn-state": (fastrnn.RNN, {"recurrent_dropout": 0.4, "zoneout": 0.3}),
    "rnn-weight": (fastrnn.RNN, {"weight_dropout": 0.3, "nonlinearity": "relu"}),
}
PER_STEP = {"recurrent_dropout_per": "step"}
PER_SEQUENCE = {"recurrent_dropout_per": "sequence"}
by_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, inputs: int = 5, hidden: int = 20, **options: Any) -> Any:
    cls, own = KINDS[kind]
    return cls(inputs, hidden, **own, **options)


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def seeded(call: Callable[..., Any], *args: Any, seed: int = 1, **options: Any) -> list[Tensor]:
    torch.manual_seed(seed)
    return flat(call(*args, **options))


def with_gradients(module: nn.Module, x: Tensor, seed: int = 1, **options: Any) -> list[Tensor]:
    x = x.detach().requires_grad_()
    outputs = seeded(module, x, seed=seed, **options)
    loss = sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]


def assert_all_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(f"value {i}", a.detach(), b.detach())


@pytest.mark.parametrize("layers", [1, 2])
@by_kind
def test_seed_decides(kind: str, layers: int) -> None:
    """One seed gives one result, gradients included; two calls and two seeds differ."""
    module, x = build(kind, num_layers=layers, bidirectional=True), torch.randn(6, 3, 5)
    first = with_gradients(module, x)
    assert_all_same(with_gradients(module, x), first)
    assert not torch.equal(with_gradients(module, x, seed=2)[0], first[0])
    torch.manual_seed(1)
    assert not torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("shape", [(7, 3, 5, 20), (4, 40, 16, 100), (3, 1, 8, 300)], ids=str)
@by_kind
def test_bits_do_not_depend_on_threads(
    kind: str, shape: tuple[int, ...], set_threads: Callable[[int], None]
) -> None:
    steps, rows, inputs, hidden = shape
    for per in (PER_STEP, PER_SEQUENCE):
        module = build(kind, inputs, hidden, bidirectional=rows == 3, **per)
        x = torch.randn(steps, rows, inputs)
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(with_gradients(module, x))
        assert_all_same(results[1], results[0])
        assert_all_same(results[2], results[0])


@by_kind
def test_masks_do_not_depend_on_the_layout(kind: str) -> None:
    """batch_first, and the same sequences packed or padded, meet the same masks."""
    lengths = torch.tensor([6, 4, 1])
    module = build(kind, num_layers=2, bidirectional=True)
    turned = build(kind, num_layers=2, bidirectional=True, batch_first=True)
    turned.load_state_dict(module.state_dict())
    x = torch.randn(6, 3, 5)
    y, *states = seeded(module, x)
    other, *other_states = seeded(turned, x.transpose(0, 1))
    assert_all_same([other.transpose(0, 1), *other_states], [y, *states])

    y, *states = seeded(module, x, lengths=lengths)
    torch.manual_seed(1)
    packed, state = module(pack_padded_sequence(x, lengths))
    assert_all_same([pad_packed_sequence(packed)[0], *flat(state)], [y, *states])


@by_kind
def test_recompute(kind: str) -> None:
    for training in (True, False):
        module = build(kind, num_layers=2).train(training)
        frugal = build(kind, num_layers=2, recompute=True).train(training)
        frugal.load_state_dict(module.state_dict())
        x = torch.randn(6, 3, 5)
        reset = torch.rand(6, 3) < 0.3
        options = {"reset": reset, "lengths": [6, 2, 4]}
        assert_all_same(with_gradients(frugal, x, **options), with_gradients(module, x, **options))


@by_kind
def test_backends_agree(kind: str) -> None:
    """The native kernels and plain PyTorch draw the same masks, in training and evaluation."""
    module, x = build(kind, num_layers=2, bidirectional=True), torch.randn(6, 3, 5)
    for training in (True, False):
        module.train(training)
        got = with_gradients(module, x)
        with fastrnn.use_backend("reference"):
            same = with_gradients(module, x)
            wide = with_gradients(copy.deepcopy(module).double(), x.double())
        for i, value in enumerate(got):
            assert_close_by_rule(f"value {i}", value, wide[i].detach(), same[i])


@by_kind
def test_one_draw_and_only_when_needed(kind: str) -> None:
    """A call takes one seed from torch's generator; eval, and a call that fails, take nothing."""
    module, x = build(kind, num_layers=2), torch.randn(6, 3, 5)
    torch.manual_seed(7)
    torch.randint(0, (1 << 63) - 1, (1,))
    after_one = torch.get_rng_state()
    torch.manual_seed(7)
    module(x)
    assert torch.equal(torch.get_rng_state(), after_one)
    with torch.no_grad():
        module(x)
    assert not torch.equal(torch.get_rng_state(), after_one)

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        module(torch.randn(6, 3, 4, generator=torch.Generator()))
    with pytest.raises(ValueError, match="lengths"):
        module(x, lengths=[7, 1, 1])
    module.eval()
    module(x)
    with torch.no_grad():
        module(x)
        module(x)
    assert torch.equal(torch.get_rng_state(), before)


@by_kind
def test_mode_of_the_module_decides(kind: str) -> None:
    """Training or evaluation is module.training, with and without gradients alike."""
    module, x = build(kind), torch.randn(6, 3, 5)
    for training in (True, False):
        module.train(training)
        recorded = seeded(module, x)
        with torch.no_grad():
            for _ in range(3):  # the second call of a shape may go another way
                assert_all_same(seeded(module, x), recorded)


@by_kind
def test_step(kind: str) -> None:
    """Step by step gives the sequence in eval; in training it is a sequence of length 1."""
    module, x = build(kind, num_layers=2), torch.randn(6, 3, 5)
    x_t = x[0]
    with torch.no_grad():
        assert_all_same(
            [seeded(module.step, x_t)[0]], [seeded(module, x_t.unsqueeze(0))[0].squeeze(0)]
        )
        module.eval()
        expected, state, outputs = module(x), None, []
        for x_t in x:
            y, state = module.step(x_t, state)
            outputs.append(y)
        assert_all_same([torch.stack(outputs), *flat(state)], flat(expected))


def rate_within_bound(dropped: float, p: float, count: int) -> bool:
    """Six standard deviations of a binomial share: one seed in 5e8 would miss it."""
    return abs(dropped - p) <= 6 * math.sqrt(p * (1 - p) / count)


def dropped_states(per: str, p: float, **options: Any) -> Tensor:
    """Which units of h a zoneout or state mask dropped, read off an RNN that copies its input."""
    rnn = fastrnn.RNN(64, 64, nonlinearity="relu", bias=False, recurrent_dropout=p,
                      recurrent_dropout_per=per, **options)  # fmt: skip
    with torch.no_grad():
        for name, weight in rnn.named_parameters():
            weight.zero_() if "_ih" in name else weight.copy_(torch.eye(64))
        directions = 1 + rnn.bidirectional
        layers = rnn.num_layers * directions
        rows = 50
        reset = torch.zeros(40, rows, dtype=torch.bool)
        y, _ = rnn(torch.zeros(40, rows, 64), torch.ones(layers, rows, 64), reset=reset)
    return y == 0


def test_mask_statistics() -> None:
    """The share of dropped units; masks shared over time drop a unit for good, others do not."""
    for p in (0.1, 0.5):
        torch.manual_seed(3)
        dropped = dropped_states("sequence", p)
        assert torch.equal(dropped, dropped[:1].expand_as(dropped))
        first = dropped[0].double()
        assert rate_within_bound(float(first.mean()), p, first.numel())
        # No row or unit is like another by construction.
        assert len({tuple(row.tolist()) for row in dropped[0]}) == 50
        assert len({tuple(column.tolist()) for column in dropped[0].T}) == 64
        torch.manual_seed(3)
        alive = ~dropped_states("step", p)
        assert torch.equal(alive.cummin(0).values, alive)
        survivors = 0
        steps = 0
        for t in range(1, 10):
            survivors += int(alive[t].sum())
            steps += int(alive[t - 1].sum())
        assert rate_within_bound(1 - survivors / steps, p, steps)


def test_masks_are_independent() -> None:
    """Layers, directions and kinds of mask agree as often as chance has it."""
    from fastrnn.ops import random_mask

    seed = torch.tensor([99])
    p, shape = 0.5, (10, 10, 100)
    streams = [layer << 8 | d << 4 | kind for layer in (0, 1) for d in (0, 1) for kind in range(4)]
    masks = [random_mask(seed, stream, p, *shape) for stream in streams]
    masks.append(random_mask(seed + 1, 0, p, *shape))
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert rate_within_bound(float((a == b).double().mean()), 0.5, a.numel())
        # Along time, rows and units too.
        for dim in range(3):
            pairs = (a == a.roll(1, dim)).double()
            assert rate_within_bound(float(pairs.mean()), 0.5, a.numel())


def test_weight_dropout_masks_the_gradient() -> None:
    module = fastrnn.RNN(3, 30, weight_dropout=0.5)
    module(torch.randn(5, 2, 3))[0].sum().backward()
    gradient = module.weight_hh_l0.grad
    assert rate_within_bound(float((gradient == 0).double().mean()), 0.5, 900)
    assert not (module.weight_ih_l0.grad == 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_kind
def test_16_bit_types(kind: str, dtype: torch.dtype) -> None:
    module, x = build(kind).to(dtype), torch.randn(4, 3, 5).to(dtype)
    for training in (True, False):
        module.train(training)
        got = with_gradients(module, x)
        assert all(t.isfinite().all() for t in got)
        assert_all_same(with_gradients(module, x), got)


@by_kind
def test_explain(kind: str) -> None:
    module, x = build(kind), torch.randn(4, 32, 5)
    said = fastrnn.explain(module, x)
    assert said.backend == "cpu"
    names = {"recurrent_dropout": "recurrent dropout", "zoneout": "zoneout"}
    names["weight_dropout"] = "weight dropout"
    for attribute, words in names.items():
        assert (words in said.plan) == bool(getattr(module, attribute))
    module.eval()
    stays = module.zoneout or module.recurrent_dropout_mode in ("update", "cell")
    acts = bool(module.zoneout or (stays and module.recurrent_dropout))
    assert ("dropout" in str(fastrnn.explain(module, x))) <= acts
    assert ("zoneout" in str(fastrnn.explain(module, x))) == bool(module.zoneout)


def test_never_handed_over_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's LSTM, which is taken for some shapes on some machines, knows no zoneout."""
    box = Handover(torch.float32, False, (8, 10), (32, 32), (512, 512), "1.2x in this test")
    monkeypatch.setitem(HANDOVER, "lstm", (box,))
    x = torch.randn(9, 32, 8)
    with torch.no_grad():
        plain = fastrnn.LSTM(8, 512).eval()
        assert fastrnn.explain(plain, x).backend == "torch"
        zoned = fastrnn.LSTM(8, 512, zoneout=0.3).eval()
        assert fastrnn.explain(zoned, x).backend == "cpu"
        with (
            fastrnn.use_backend("torch"),
            pytest.raises(RuntimeError, match=r"torch.nn has no zoneout 0\.3"),
        ):
            zoned(x)
        # What evaluation turns off does not stand in the way.
        off = fastrnn.LSTM(8, 512, weight_dropout=0.3).eval()
        assert fastrnn.explain(off, x).backend == "torch"


def test_repr() -> None:
    module = fastrnn.LSTM(
        3, 4, recurrent_dropout=0.25, recurrent_dropout_mode="cell", zoneout=[0.1, 0.2],
        recurrent_dropout_per="sequence", weight_dropout=0.5,
    )  # fmt: skip
    assert repr(module) == (
        "LSTM(3, 4, recurrent_dropout=0.25, recurrent_dropout_mode='cell', "
        "recurrent_dropout_per='sequence', zoneout=(0.1, 0.2), weight_dropout=0.5)"
    )
    assert repr(fastrnn.RNN(3, 4)) == "RNN(3, 4)"


@by_kind
def test_copies_and_pickles(kind: str) -> None:
    module, x = build(kind), torch.randn(6, 3, 5)
    expected = seeded(module, x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_all_same(seeded(other, x), expected)


@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_pickles_without_the_attributes(cls: type) -> None:
    """A module of a version without regularisers has none."""
    module, x = cls(5, 7), torch.randn(6, 3, 5)
    expected = flat(module(x))
    for name in [n for n in vars(module) if "recurrent_dropout" in n or n == "_rates"]:
        del module.__dict__[name]
    del module.__dict__["_zoneout_pair"]
    old = pickle.loads(pickle.dumps(module))
    assert_all_same(flat(old(x)), expected)
    assert "zoneout" not in repr(old)
    old.zoneout = 0.5
    assert not torch.equal(old(x)[0], expected[0])


@by_kind
def test_restore_leaves_it_alone(kind: str) -> None:
    module = build(kind)
    name = next(n for n in ("recurrent_dropout", "zoneout", "weight_dropout") if getattr(module, n))
    if kind.startswith("gru_before"):
        name = "reset_after"
    with pytest.warns(UserWarning, match=rf"{name}=.* which torch.nn.{type(module).__name__}"):
        assert fastrnn.restore(module) is module
    plain = type(module)(5, 7)
    back = fastrnn.restore(plain)
    assert not any("recurrent" in n or n == "_rates" for n in vars(back))
    again = fastrnn.replace(back)
    assert again.zoneout == 0
    again(torch.randn(6, 3, 5))


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("LSTM", {"recurrent_dropout": 1.5}, ValueError, r"recurrent_dropout: got 1\.5, expected a"),
    ("GRU", {"recurrent_dropout": -0.1}, ValueError, r"recurrent_dropout: got -0\.1"),
    ("RNN", {"weight_dropout": math.nan}, ValueError, r"weight_dropout: got nan"),
    ("RNN", {"weight_dropout": True}, TypeError, r"weight_dropout: got True \(bool\), expected"),
    ("LSTM", {"recurrent_dropout": False}, TypeError, r"recurrent_dropout: got False \(bool\)"),
    ("RNN", {"weight_dropout": None}, TypeError, r"weight_dropout: got None \(NoneType\)"),
    ("GRU", {"zoneout": False}, TypeError, r"zoneout: got False \(bool\), expected a probab"),
    ("LSTM", {"zoneout": ()}, ValueError, "zoneout: got 0 values, expected p or"),
    ("LSTM", {"zoneout": "0.1"}, TypeError, r"zoneout: got '0\.1' \(str\), expected"),
    ("LSTM", {"zoneout": (0.1, 2)}, ValueError, r"zoneout\[1\]: got 2, expected"),
    ("LSTM", {"zoneout": (0.1,)}, ValueError, r"zoneout: got 1 values, expected p or \(p_h, p_c"),
    ("GRU", {"zoneout": (0.1, 0.1)}, ValueError, r"zoneout: got \(0\.1, 0\.1\), expected one"),
    ("RNN", {"zoneout": (0.1, 0.1)}, ValueError, "only an LSTM takes a pair"),
    ("GRU", {"recurrent_dropout_mode": "cell"}, ValueError, "got 'cell', expected 'update' or 's"),
    ("RNN", {"recurrent_dropout_mode": "update"}, ValueError, "'update' is for LSTM and GRU"),
    ("RNN", {"recurrent_dropout_mode": "cell"}, ValueError, "expected 'state' for RNN"),
    ("LSTM", {"recurrent_dropout_mode": "gal"}, ValueError, "recurrent_dropout_mode: got 'gal'"),
    ("LSTM", {"recurrent_dropout_per": "row"}, ValueError, "got 'row', expected 'step' or 'seq"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), BAD)
def test_errors(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(fastrnn, name)(3, 4, **options)
    module = getattr(fastrnn, name)(3, 4)
    function = getattr(fastrnn.functional, name.lower())
    with pytest.raises(error, match=message):
        function(torch.randn(2, 2, 3), None, module._flat_weights, **options)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_functions_take_the_same_arguments(name: str) -> None:
    options = {"recurrent_dropout": 0.3, "zoneout": 0.2, "weight_dropout": 0.4}
    module = getattr(fastrnn, name.upper())(5, 7, **options)
    x = torch.randn(6, 3, 5)
    function = getattr(fastrnn.functional, name)
    for training in (True, False):
        module.train(training)
        got = seeded(function, x, None, module._flat_weights, training=training, **options)
        assert_all_same(got, seeded(module, x))


def test_description() -> None:
    made = check("lstm", 0.25, "cell", "sequence", (0.1, 0.2), 0.5)
    text = "recurrent dropout 0.25 (cell, per sequence), zoneout (0.1, 0.2), weight dropout 0.5"
    assert str(made) == text
    assert not check("gru").active(True)
    assert not check("gru", 0.3, "state").active(False)
    assert check("gru", 0.3).active(False)


@by_kind
def test_return_cells_and_reset(kind: str) -> None:
    """A reset in the middle starts the rest of the sequence from zeros, masks aside."""
    module = build(kind).eval()
    x = torch.randn(6, 3, 5)
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[4] = True
    whole, rest = module(x, reset=reset)[0], module(x[4:])[0]
    assert_same_bits("after the reset", whole[4:], rest)
    if isinstance(module, fastrnn.LSTM):
        _, state, cells = module(x, return_cells=True)
        assert_same_bits("cells", cells[-1], state[1][0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_default_device_moves_no_seed(backend: str) -> None:
    module = fastrnn.LSTM(3, 4, recurrent_dropout=0.5, zoneout=0.2, weight_dropout=0.2)
    x = torch.randn(5, 2, 3)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    for data in (x, packed):
        with fastrnn.use_backend(backend):
            torch.manual_seed(1)
            expected = module(data)[1][0]
            torch.manual_seed(1)
            with torch.device("meta"):
                got = module(data)[1][0]
        assert torch.equal(got, expected)


def test_zoneout_is_set_as_it_is_constructed() -> None:
    module = fastrnn.LSTM(2, 3, zoneout=0.1)
    with pytest.raises(ValueError, match="zoneout: got 1 values, expected p or"):
        module.zoneout = (0.2,)
    assert module.zoneout == 0.1
    for name in ("GRU", "RNN"):
        single = getattr(fastrnn, name)(2, 3, zoneout=0.1)
        with pytest.raises(
            ValueError, match=r"zoneout: got \(0\.1, 0\.2\), expected one probability"
        ):
            single.zoneout = (0.1, 0.2)
        assert single.zoneout == 0.1
        single(torch.randn(4, 1, 2))
