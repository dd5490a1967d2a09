"""replace, restore and patch on models that hold recurrent layers at any depth."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from dropin_cases import assert_same_bits, compare, gradients, leaf, loss_of, tensors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn

OURS = (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN, fastrnn.LSTMCell, fastrnn.GRUCell, fastrnn.RNNCell)
TORCHS = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(4))


class Nested(nn.Module):
    """Every class at some depth, one module twice, one weight tied between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(6, 6, 2, dropout=0.5, bidirectional=True)})
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(12, 6), nn.GRU(6, 6)), nn.RNN(6, 6, 1, "relu")]
        )
        self.alias = self.blocks[1]
        self.projected = nn.LSTM(6, 6, proj_size=3)
        self.cells = nn.ModuleList([nn.LSTMCell(6, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 6)])
        self.cells[1].weight_hh = self.blocks[0][1].weight_hh_l0

    def forward(self, x: Tensor) -> list[Tensor]:
        x, _ = self.encoder["lstm"](x)
        x, _ = self.blocks[0](x)
        x, last = self.alias(x)
        y, _ = self.projected(x)
        h, c = self.cells[0](x[0])
        return [y, last, c, self.cells[2](x[1], self.cells[1](h))]


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = leaf(x, next(model.parameters()).dtype)
    model.zero_grad()
    outputs = tensors(model(x))
    loss_of(outputs).backward()
    named = {f"out[{i}]": t.detach() for i, t in enumerate(outputs)}
    return {**named, **gradients(model, x)}


def recurrent(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, OURS + TORCHS)]


def test_replace_swaps_everything_and_shares_parameters() -> None:
    model = Nested().eval()
    plain = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    assert fastrnn.replace(model) is model
    assert len(recurrent(model)) == 7
    assert all(type(m) in OURS for m in recurrent(model))
    assert model.alias is model.blocks[1]
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.cells[1].weight_hh is model.blocks[0][1].weight_hh_l0
    assert not any(m.training for m in model.modules())
    assert repr(model) == repr(plain)
    compare(model, plain, run, X)


def test_restore_is_the_way_back() -> None:
    model = Nested().eval()
    plain = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    assert fastrnn.restore(fastrnn.replace(model)) is model
    assert [type(m) for m in recurrent(model)] == [type(m) for m in recurrent(plain)]
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert_same_bits(run(model, X), run(plain, X))


def test_replace_twice_changes_nothing_more() -> None:
    model = fastrnn.replace(Nested().eval())
    before = recurrent(model)
    fastrnn.replace(model)
    assert all(a is b for a, b in zip(recurrent(model), before, strict=True))
    fastrnn.restore(model)
    fastrnn.restore(model)
    assert all(type(m) in TORCHS for m in recurrent(model))


@pytest.mark.parametrize("build", [lambda: nn.LSTM(6, 6, 2), lambda: nn.GRUCell(6, 6)])
def test_a_layer_on_its_own_is_returned(build: Any) -> None:
    old = build()
    new = fastrnn.replace(old)
    assert type(new).__name__ == type(old).__name__
    assert type(new) in OURS
    assert all(a is b for a, b in zip(new.parameters(), old.parameters(), strict=True))
    assert type(fastrnn.restore(new)) is type(old)


def test_optimiser_goes_on_after_replace() -> None:
    """Parameters are shared, so the optimiser that was built before trains the new modules."""
    model = Nested().eval().double()
    plain = copy.deepcopy(model)
    curves = []
    for m, swap in ((model, True), (plain, False)):
        optimiser = torch.optim.Adam(m.parameters(), lr=0.01)
        losses = []
        for step in range(4):
            if swap and step == 2:
                fastrnn.replace(m)
            optimiser.zero_grad()
            loss = sum(out.square().sum() for out in m(X.double()))
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(*curves)


def test_hooks_and_modes_travel_along() -> None:
    old = nn.LSTM(6, 6)
    calls: list[str] = []
    handle = old.register_forward_hook(lambda m, args, out: calls.append(type(m).__module__))
    old.register_full_backward_hook(lambda m, into, out: calls.append("backward"))
    old.weight_hh_l0.register_hook(lambda g: calls.append("weight"))
    old.bias_ih_l0.requires_grad_(False)
    new = fastrnn.replace(old.eval())
    assert not new.training
    new(leaf(X, torch.float32))[0].sum().backward()
    assert calls[0].startswith("fastrnn")
    assert set(calls[1:]) == {"backward", "weight"}
    assert new.bias_ih_l0.grad is None
    handle.remove()
    calls.clear()
    new(X)
    assert calls == []


@pytest.mark.parametrize("what", ["weight_norm", "parametrized", "pruned", "spectral"])
def test_changed_weights_travel_along(what: str) -> None:
    """Swapped after its weight was normed, parametrised or pruned, and back again."""
    plain = nn.GRU(6, 6)
    if what == "weight_norm":
        nn.utils.weight_norm(plain, "weight_hh_l0")
    elif what == "parametrized":
        parametrizations.weight_norm(plain, "weight_hh_l0")
    elif what == "pruned":
        prune.l1_unstructured(plain, "weight_hh_l0", amount=0.5)
    else:
        nn.utils.spectral_norm(plain, "weight_hh_l0").eval()
    expected = run(nn.Sequential(plain), X)
    model = fastrnn.replace(nn.Sequential(plain))
    assert isinstance(model[0], fastrnn.GRU)
    assert parametrize.is_parametrized(model[0]) == (what == "parametrized")
    found = run(model, X)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
    fastrnn.restore(model)
    assert isinstance(model[0], nn.GRU)
    assert_same_bits(run(model, X), expected)


def test_subclasses_are_left_alone_and_reported() -> None:
    class Mine(nn.LSTM):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.custom = Mine(6, 6)
            self.plain = nn.LSTM(6, 6)

    model = Model()
    with pytest.warns(UserWarning, match=r"custom \(Mine\)"):
        fastrnn.replace(model)
    assert type(model.custom) is Mine
    assert type(model.plain) is fastrnn.LSTM


def test_restore_reports_what_torch_cannot_do() -> None:
    model = nn.Sequential(fastrnn.GRU(6, 6, reset_after=False), fastrnn.LSTM(6, 6, recompute=True))
    with pytest.warns(UserWarning, match="reset_after"):
        fastrnn.restore(model)
    assert type(model[0]) is fastrnn.GRU
    assert type(model[1]) is nn.LSTM


def test_restore_reports_cells_that_torch_lacks() -> None:
    model = nn.ModuleDict({"rhn": fastrnn.RHN(6, 6), "bn": fastrnn.BNLSTM(6, 6, max_length=5)})
    with pytest.warns(UserWarning, match="left alone") as found:
        fastrnn.restore(model)
    (warning,) = found
    for text in ("rhn (RHN): a cell that torch", "bn (BNLSTM): a cell that torch"):
        assert text in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.replace(model)


def test_layers_inside_layers_are_swapped() -> None:
    outer, tied = nn.LSTM(6, 6), nn.RNN(6, 6)
    outer.helper = nn.Sequential(nn.GRU(6, 6), tied)
    outer.cell = nn.GRUCell(6, 6)
    outer.cell.inner = tied
    for model in (outer, nn.Sequential(outer)):
        swapped = fastrnn.replace(copy.deepcopy(model))
        assert all(type(m) in OURS for m in recurrent(swapped))
        assert len(recurrent(swapped)) == 4
        back = fastrnn.restore(swapped)
        assert all(type(m) in TORCHS for m in recurrent(back))
        assert len(recurrent(back)) == 4


def test_nothing_to_do_is_no_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastrnn.replace(model) is model
        assert fastrnn.restore(model) is model


def test_patch_covers_code_that_builds_its_own_layers() -> None:
    torch.manual_seed(3)
    plain = Nested().eval()
    torch.manual_seed(3)
    with fastrnn.patch():
        model = Nested().eval()
        assert isinstance(model.projected, nn.LSTM)
        assert nn.LSTM is torch.nn.modules.rnn.LSTM is fastrnn.LSTM
    assert all(type(m) in OURS for m in recurrent(model))
    assert not isinstance(model.projected, nn.LSTM)
    assert_same_bits(model.state_dict(), plain.state_dict())
    compare(model, plain, run, X)


def test_patch_ends_after_an_exception_and_nests() -> None:
    originals = [getattr(nn, c.__name__) for c in TORCHS]
    with pytest.raises(KeyError), fastrnn.patch(), fastrnn.patch():
        raise KeyError
    assert [getattr(nn, c.__name__) for c in TORCHS] == originals
    with fastrnn.patch():
        with fastrnn.patch():
            pass
        assert nn.GRU is fastrnn.GRU
    assert [getattr(nn, c.__name__) for c in TORCHS] == originals


def test_constructors_work_under_patch() -> None:
    """Classes refer to their bases, not to whatever the patched name means at the moment."""
    with fastrnn.patch():
        for cls in (nn.LSTM, nn.GRU, nn.RNN):
            cls(6, 6, 2, bidirectional=True)(X)
            fastrnn.restore(cls(6, 6))
        for cls in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
            cls(6, 6)(X[0])
