"""Models from pip packages with their recurrent layers swapped: outputs, loss and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastrnn
from benchmarks import models
from tests.tolerances import assert_close_by_rule

pytestmark = [
    # What the packages warn about is theirs.
    pytest.mark.filterwarnings("ignore"),
]
OURS = (fastrnn.LSTM, fastrnn.GRU, fastrnn.LSTMCell, models.FusedPredictorLayer)
SWAPPED = {
    "tacotron2": 3,
    "wavernn": 2,
    "dprnn": 2,
    "rnnt-predictor": 2,
    "open-unmix": 1,
    "recurrent-ppo": 2,
}


@pytest.fixture(params=models.MODELS, ids=lambda model: model.name)
def model(request: pytest.FixtureRequest) -> models.Model:
    found: models.Model = request.param
    reason = models.missing(found)
    if reason:
        pytest.skip(reason)
    return found


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_same_outputs_loss_and_gradients(model: models.Model, mode: str) -> None:
    """In training with the model's dropout, from one seed."""
    wide, plain, ours = models.three_results(model, True, mode == "training")
    assert wide.keys() == plain.keys() == ours.keys()
    assert sum(name.startswith("gradient") for name in wide) > 5
    for name, truth in wide.items():
        assert_close_by_rule(name, ours[name], truth, plain[name])


def test_every_recurrent_layer_is_swapped(model: models.Model) -> None:
    _, plain, ours, _ = models.three(model, True)
    kinds = [type(module) for module in ours.modules()]
    assert sum(kind in OURS for kind in kinds) == SWAPPED[model.name]
    assert not any(kind in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell) for kind in kinds)
    assert list(ours.state_dict()) == list(plain.state_dict())


def test_training_goes_the_same_way(model: models.Model) -> None:
    """Four steps of an optimiser built after the swap, in float64: the losses agree."""
    wide, _, _, call = models.three(model, True)
    curves = []
    for each in (wide, model.swap(copy.deepcopy(wide))):
        each.train()
        optimiser = torch.optim.SGD(each.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            losses.append(models.outputs_and_gradients(each, call)["loss"])
            optimiser.step()
        curves.append(torch.stack(losses))
    assert curves[0].unique().numel() == 4
    torch.testing.assert_close(curves[1], curves[0])


def test_replace_leaves_layers_of_other_classes_alone() -> None:
    """The transducer's own LSTM is neither torch.nn's nor a subclass of it: nothing to swap."""
    rnnt = next(model for model in models.MODELS if model.name == "rnnt-predictor")
    reason = models.missing(rnnt)
    if reason:
        pytest.skip(reason)
    _, plain, _, _ = models.three(rnnt, True)
    before = [type(module) for module in plain.modules()]
    assert [type(module) for module in fastrnn.replace(plain).modules()] == before


def test_verify_only(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = [models.missing(model) for model in models.MODELS]
    if all(reasons):
        pytest.skip(reasons[0])
    assert models.main(["--verify-only", "--small", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    for model, reason in zip(models.MODELS, reasons, strict=True):
        assert printed.out.count(f"| {model.name} |") == (0 if reason else 2)
        assert (f"{model.name}: left out" in printed.err) == bool(reason)


def test_a_wrong_model_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(small: bool) -> tuple[nn.Module, models.Call]:
        x = torch.randn(5, 2, 3)
        return nn.LSTM(3, 4), lambda m: [m(x.to(next(m.parameters()).dtype))[0]]

    def swap(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            model.weight_hh_l0[0, 0] += 1e-3
        return fastrnn.replace(model)

    wrong = models.Model("wrong", "torch", "", build, swap)
    monkeypatch.setattr(models, "MODELS", (wrong,))
    assert models.main(["--verify-only", "--threads", "1"]) == 1
    assert "wrong: RED: output 0 is off by" in capsys.readouterr().err
