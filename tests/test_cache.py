"""The packed weights that inference keeps between calls: when they are made, used and dropped."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastrnn
from fastrnn.nn import cache as cache_module
from fastrnn.nn.cache import PackedCache

NAMES = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The torch.nn module and ours."""
    return getattr(nn, name)(*args, **kwargs), getattr(fastrnn, name)(*args, **kwargs)


def tensors(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Counter:
    """Stands in for the operator that packs weights, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, weights: list[Tensor], cell: str, plan: str) -> Tensor:
        self.calls += 1
        return torch.cat([weight.detach().flatten() for weight in weights])


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter()
    monkeypatch.setattr(cache_module, "_pack", counter)
    return counter


def find(cache: PackedCache, weights: list[Tensor], plan: str = "") -> Tensor:
    packed = cache.packed(0, weights, "lstm", plan)
    assert packed is not None
    return packed


@torch.no_grad()  # a call with gradients drops the entries
def test_cache_packs_once_and_notices_every_change(packs: Counter) -> None:
    module = fastrnn.LSTM(3, 4)
    cache = module._cache()
    assert cache is module._cache()
    first = find(cache, module._flat_weights)
    assert find(cache, module._flat_weights) is first
    assert packs.calls == 1
    changes: dict[str, Callable[[], Any]] = {
        "in place": lambda: module.weight_hh_l0.detach().mul_(2),
        "optimiser": lambda: optimiser.step(),
        "replaced": lambda: setattr(module, "bias_hh_l0", nn.Parameter(torch.zeros(16))),
        "storage": lambda: setattr(module.weight_ih_l0, "data", torch.zeros(16, 3)),
        "load": lambda: module.load_state_dict(fastrnn.LSTM(3, 4).state_dict()),
        "through .data": lambda: module.weight_hh_l0.data.mul_(0.5),
        "bias through .data": lambda: module.bias_ih_l0.data[4:8].fill_(1.0),
        "apply": lambda: module.double().float(),
        "flatten": lambda: module.flatten_parameters(),
    }
    for weight in module.parameters():
        weight.grad = torch.ones_like(weight)
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    for number, (label, change) in enumerate(changes.items(), 2):
        change()
        weights = module._flat_weights
        packed = find(module._cache(), weights)
        assert packs.calls == number, label
        assert torch.equal(packed, torch.cat([w.detach().flatten() for w in weights])), label
        find(module._cache(), weights)
        assert packs.calls == number, label
    find(module._cache(), module._flat_weights, "bf16")
    assert packs.calls == len(changes) + 2


def test_cache_is_never_carried_along(packs: Counter) -> None:
    module = fastrnn.GRU(3, 4)
    find(module._cache(), module._flat_weights)
    assert len(module._packed) == 1
    assert not any("packed" in key for key in module.state_dict())
    assert copy.deepcopy(module)._packed is None
    assert pickle.loads(pickle.dumps(module))._packed is None
    assert len(copy.deepcopy(module._packed)) == 0
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    assert len(copy.deepcopy(module)._packed) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of tracing
def test_cache_declines_what_it_must_not_keep(packs: Counter) -> None:
    module = fastrnn.RNN(3, 4)
    cache, weights = PackedCache(), module._flat_weights
    assert cache.packed(0, [w * 1 for w in weights], "rnn_tanh", "") is None
    with torch.inference_mode():
        made_there = fastrnn.RNN(3, 4)
        assert cache.packed(0, made_there._flat_weights, "rnn_tanh", "") is None
        assert cache.packed(0, weights, "rnn_tanh", "") is not None
    shared = fastrnn.RNN(3, 4)
    shared.weight_hh_l0.share_memory_()  # one of them is enough
    assert PackedCache().packed(0, shared._flat_weights, "rnn_tanh", "") is None

    def under_transform(x: Tensor) -> Tensor:
        assert cache.packed(0, weights, "rnn_tanh", "") is None
        return x

    torch.vmap(under_transform)(torch.zeros(2))
    torch.jit.trace(lambda x: under_transform(x) * 1, (torch.zeros(2),), check_trace=False)
    with torch._subclasses.FakeTensorMode():
        assert cache.packed(0, weights, "rnn_tanh", "") is None


def test_cache_forgets_a_parameter_that_is_gone(packs: Counter) -> None:
    module = fastrnn.RNN(3, 4)
    find(module._cache(), module._flat_weights)
    before = packs.calls
    for key, value in list(module.named_parameters()):
        setattr(module, key, nn.Parameter(value.detach().clone()))
    find(module._cache(), module._flat_weights)
    assert packs.calls == before + 1


def test_cache_with_concurrent_callers(packs: Counter) -> None:
    module = fastrnn.LSTM(8, 16)
    weights = module._flat_weights
    expected = torch.cat([w.detach().flatten() for w in weights])
    wrong: list[int] = []

    def work() -> None:
        for _ in range(200):
            if not torch.equal(find(module._cache(), weights), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_inference_notices_changes(name: str) -> None:
    theirs, ours = pair(name, 3, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)

    def check() -> None:
        theirs.load_state_dict(ours.state_dict())
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(ours(x)[0], theirs(x)[0])

    check()
    optimiser = torch.optim.SGD(ours.parameters(), 0.5)
    ours(x)[0].sum().backward()
    optimiser.step()
    check()
    ours.weight_hh_l1 = nn.Parameter(torch.randn_like(ours.weight_hh_l1))
    check()
    for weight in ours.parameters():
        weight.data.mul_(0.9)
    check()


@pytest.mark.parametrize("name", CELLS)
def test_cells_notice_changed_weights(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    x = torch.randn(2, 3)

    def check() -> None:
        theirs.load_state_dict(ours.state_dict())
        with torch.no_grad():
            for _ in range(2):
                for a, b in zip(tensors(theirs(x)), tensors(ours(x)), strict=True):
                    torch.testing.assert_close(b, a)

    check()
    tensors(ours(x))[0].sum().backward()
    torch.optim.SGD(ours.parameters(), 0.5).step()
    check()
    ours.weight_hh = nn.Parameter(torch.randn_like(ours.weight_hh))
    check()
    ours.bias_hh.data.add_(1.0)
    check()
    ours.load_state_dict({key: 0.5 * value for key, value in ours.state_dict().items()})
    check()
    ours.weight_ih.data[0, 1] = 2.0
    ours.flatten_parameters()
    check()
    assert copy.deepcopy(ours)._packed is None
    assert pickle.loads(pickle.dumps(ours))._packed is None
    assert not any("packed" in key for key in ours.state_dict())


@pytest.mark.parametrize("grad", [True, False])
def test_whole_writes_through_data_to_a_transposed_weight_are_seen(grad: bool) -> None:
    module = fastrnn.LSTM(8, 8)
    module.weight_ih_l0 = nn.Parameter(torch.randn(8, 32).t())
    x = torch.randn(5, 2, 8)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            before = module(x)[0]
        module.weight_ih_l0.data.mul_(3.0)
        after = module(x)[0]
        stepped = module.step(x[0])[0]
    with fastrnn.use_backend("reference"):
        expected = module(x)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(stepped, expected[0])


@pytest.mark.parametrize("make", [
    lambda: fastrnn.LSTM(3, 4), lambda: fastrnn.GRUCell(3, 4), lambda: fastrnn.RHN(3, 4, depth=2),
    lambda: fastrnn.BNLSTM(3, 4, max_length=5),
], ids=["lstm", "gru-cell", "rhn", "bnlstm"])  # fmt: skip
def test_packed_weights_do_not_keep_torch_from_swapping(
    make: Callable[[], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch swaps no tensor that a weak reference looks at: so the pack goes first."""
    module = make().eval()
    x = torch.randn(5, 2, 3) if not isinstance(module, fastrnn.GRUCell) else torch.randn(2, 3)

    def call() -> Tensor:
        with torch.no_grad():
            for _ in range(3):
                result = module(x.to(next(module.parameters()).dtype))
        return result[0]

    state = {name: t.clone() for name, t in make().state_dict().items()}
    before = call()
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    module.double()
    assert call().dtype == torch.float64
    module.float()
    for assign in (False, True):
        call()
        module.load_state_dict({name: t.clone() for name, t in state.items()}, assign=assign)
        assert not torch.equal(call(), before)
