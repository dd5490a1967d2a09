"""replace, restore and patch."""

from __future__ import annotations

import gc
import itertools
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastrnn

NAMES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]


class Model(nn.Module):
    """Every kind once, some of them deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, True, True, dropout=0.3, bidirectional=True, proj_size=2)
        gru, rnn = nn.GRU(3, 4, bias=False), nn.RNN(3, 4, nonlinearity="relu")
        self.rest = nn.Sequential(nn.Linear(4, 3), gru, rnn)
        self.cells = nn.ModuleDict({"lstm": nn.LSTMCell(3, 4), "gru": nn.GRUCell(3, 4)})
        self.cells["rnn"] = nn.RNNCell(3, 4, False, "relu")

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        x = self.rest[0](y)
        results = [self.rest[1](x)[0], self.rest[2](x)[0], self.cells["lstm"](x[0])[0][None],
                   self.cells["gru"](x[0])[None], self.cells["rnn"](x[0])[None]]  # fmt: skip
        return torch.cat(results)


@pytest.fixture(autouse=True)
def _names_are_put_back() -> Any:
    yield
    for name in NAMES:
        assert getattr(nn, name).__module__ == "torch.nn.modules.rnn"


def example() -> tuple[nn.Module, Tensor]:
    return Model().eval(), torch.randn(2, 5, 3)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_every_layer_is_swapped_and_back_again() -> None:
    model, x = example()
    expected = model(x)
    parameters = dict(model.named_parameters())
    text = repr(model)
    order = list(model.state_dict())
    assert fastrnn.replace(model) is model
    assert not any(type(m).__module__ == "torch.nn.modules.rnn" for m in model.modules())
    assert type(model.lstm) is fastrnn.LSTM
    assert type(model.cells["rnn"]) is fastrnn.RNNCell
    torch.testing.assert_close(model(x), expected)
    assert fastrnn.replace(model) is model
    assert fastrnn.restore(model) is model
    assert type(model.lstm) is nn.LSTM
    assert type(model.rest[2]) is nn.RNN
    assert torch.equal(model(x), expected)
    assert repr(model) == text
    assert list(model.state_dict()) == order
    for key, value in model.named_parameters():
        assert value is parameters[key]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_an_optimiser_made_before_goes_on() -> None:
    model, x = example()
    twin = Model().eval()
    twin.load_state_dict(model.state_dict())
    optimisers = [torch.optim.Adam(m.parameters(), 0.01) for m in (model, twin)]
    fastrnn.replace(model)
    for _ in range(3):
        for m, optimiser in zip((model, twin), optimisers, strict=True):
            optimiser.zero_grad()
            m(x).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("name", NAMES)
def test_root_module(name: str) -> None:
    module = getattr(nn, name)(3, 4).eval().requires_grad_(False)
    new = fastrnn.replace(module)
    assert type(new) is getattr(fastrnn, name)
    assert new.training is False
    assert not any(p.requires_grad for p in new.parameters())
    assert all(a is b for a, b in zip(new.parameters(), module.parameters(), strict=True))
    back = fastrnn.restore(new)
    assert type(back) is getattr(nn, name)
    assert repr(back) == repr(module)
    assert back.__dict__.keys() == module.__dict__.keys()


def test_the_old_module_is_left_alone() -> None:
    old = nn.GRU(3, 4)
    weight = old.weight_hh_l0
    new = fastrnn.replace(old)
    new.weight_hh_l0 = nn.Parameter(torch.zeros(12, 4))
    new.register_buffer("mine", torch.zeros(1), persistent=False)
    assert old.weight_hh_l0 is weight
    assert not old._non_persistent_buffers_set


def test_what_belongs_to_one_class_stays_behind() -> None:
    old = nn.GRU(3, 4)
    old.compile(backend="eager")
    assert fastrnn.replace(old)._compiled_call_impl is None
    back = fastrnn.restore(fastrnn.LSTM(3, 4, recompute=True))
    assert back.__dict__.keys() == nn.LSTM(3, 4).__dict__.keys()


def test_a_module_that_appears_twice_stays_one() -> None:
    shared = nn.GRU(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared]), "c": nn.GRU(3, 3)})
    model["c"].weight_hh_l0 = shared.weight_hh_l0
    fastrnn.replace(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is fastrnn.GRU
    assert model["c"].weight_hh_l0 is model["a"].weight_hh_l0


def test_subclasses_are_left_alone_and_reported() -> None:
    class Mine(nn.LSTM):
        pass

    class Ours(fastrnn.GRU):
        pass

    model = nn.Sequential(Mine(3, 4), nn.LSTM(4, 4))
    alone = r"fastrnn.replace left alone: 0 \(Mine\): a subclass"
    with pytest.warns(UserWarning, match=alone) as found:
        fastrnn.replace(model)
    assert found[0].filename == __file__
    assert type(model[0]) is Mine
    assert type(model[1]) is fastrnn.LSTM
    model = nn.Sequential(Ours(3, 4), fastrnn.GRU(3, 4, reset_after=False), fastrnn.GRU(3, 4))
    with pytest.warns(UserWarning, match=r"restore left alone: 0 \(Ours\).*; 1 \(GRU\): reset_aft"):
        fastrnn.restore(model)
    assert [type(m) for m in model] == [Ours, fastrnn.GRU, nn.GRU]
    odd = nn.GRU(3, 4)
    odd.forward = lambda x: x
    with pytest.warns(UserWarning, match=r"the model itself \(GRU\): its forward was replaced"):
        assert fastrnn.replace(odd) is odd


@pytest.mark.parametrize("action", ["replace", "restore"])
def test_what_is_no_module_is_refused(action: str) -> None:
    for bad, kind in (([nn.LSTM(2, 2)], "list"), (None, "NoneType"), (nn.LSTM, "type")):
        message = rf"fastrnn\.{action}: model: got {kind}, expected a torch\.nn\.Module"
        with pytest.raises(TypeError, match=message):
            getattr(fastrnn, action)(bad)


def test_nothing_to_do_is_silent() -> None:
    model = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastrnn.replace(model) is model
        assert fastrnn.restore(model) is model
        fastrnn.replace(nn.Sequential(fastrnn.LSTM(3, 4), fastrnn.LSTMCell(3, 4)))


def test_hooks_move_along_and_handles_still_work() -> None:
    seen: list[str] = []
    module = nn.LSTM(3, 4)
    handles = [
        module.register_forward_pre_hook(lambda m, a: seen.append("pre")),
        module.register_forward_hook(lambda m, a, o: seen.append(type(m).__module__)),
        module.register_forward_hook(lambda m, a, k, o: seen.append("kw"), with_kwargs=True),
        module.register_full_backward_hook(lambda m, i, o: seen.append("backward")),
        module.register_full_backward_pre_hook(lambda m, o: seen.append("backward pre")),
        module.register_state_dict_pre_hook(lambda m, p, k: seen.append("state pre")),
        module.register_load_state_dict_pre_hook(
            lambda m, *a: seen.append(f"load {type(m).__module__}")
        ),
        module.register_load_state_dict_post_hook(lambda m, k: seen.append("loaded")),
    ]
    module.weight_hh_l0.register_hook(lambda g: seen.append("parameter"))
    new = fastrnn.replace(module)
    del module
    gc.collect()
    new(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
    new.load_state_dict(new.state_dict())
    for text in ("pre", "fastrnn.nn.rnn", "kw", "backward", "backward pre", "state pre",
                 "load fastrnn.nn.rnn", "loaded", "parameter"):  # fmt: skip
        assert seen.count(text) == 1, text
    for handle in handles:
        handle.remove()
    seen.clear()
    new(torch.randn(5, 2, 3))
    new.load_state_dict(new.state_dict())
    assert not seen


def test_reparametrised_modules() -> None:
    modules = [nn.GRU(3, 4) for _ in range(3)]
    parametrizations.weight_norm(modules[0], "weight_hh_l0")
    prune.random_unstructured(modules[1], "weight_hh_l0", 0.5)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(modules[2], "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    for module in modules:
        expected = module(x)[0]
        keys = list(module.state_dict())
        new = fastrnn.replace(nn.Sequential(module))[0]
        assert isinstance(new, fastrnn.GRU)
        assert list(new.state_dict()) == keys
        torch.testing.assert_close(new(x)[0], expected)
        with torch.no_grad():
            for value in new.parameters():
                value.mul_(0.5)
        changed = new(x)[0]
        back = fastrnn.restore(nn.Sequential(new))[0]
        assert isinstance(back, nn.GRU)
        torch.testing.assert_close(back(x)[0], changed)
    nn.utils.parametrize.remove_parametrizations(new := fastrnn.replace(modules[0]), "weight_hh_l0")
    assert type(new) is fastrnn.GRU


def test_patch() -> None:
    torchs = nn.LSTM
    with fastrnn.patch():
        assert nn.LSTM is fastrnn.LSTM
        from torch.nn import GRU
        from torch.nn.modules.rnn import RNNCell

        assert GRU is fastrnn.GRU
        assert RNNCell is fastrnn.RNNCell
        for space, name in itertools.product((nn, nn.modules, nn.modules.rnn), NAMES):
            assert getattr(space, name) is getattr(fastrnn, name)
        model = Model()
        assert isinstance(model.lstm, nn.LSTM)
        assert isinstance(fastrnn.RNN(3, 4), nn.RNN)
        with fastrnn.patch():
            assert nn.LSTM is fastrnn.LSTM
        assert nn.LSTM is fastrnn.LSTM
        assert type(fastrnn.restore(model).lstm) is torchs
        assert type(fastrnn.replace(model).lstm) is fastrnn.LSTM
    assert nn.LSTM is torchs
    assert not isinstance(model.lstm, nn.LSTM)
    with pytest.raises(KeyError, match="inside"), fastrnn.patch():
        raise KeyError("inside")
    assert nn.LSTM is torchs


def test_patch_in_overlapping_threads() -> None:
    torchs = nn.GRU
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fastrnn.patch():
            entered.set()
            leave.wait()

    with fastrnn.patch():
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
    assert nn.GRU is fastrnn.GRU
    leave.set()
    thread.join()
    assert nn.GRU is torchs
