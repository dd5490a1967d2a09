"""The modules: constructor, parameters, checks.

What torch.nn does too is compared with torch.nn itself, message by message.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastrnn
from tests.versions import OLD

NAMES = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The torch.nn module and ours, with the same weights."""
    theirs = getattr(nn, name)(*args, **kwargs)
    ours = getattr(fastrnn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def outcome(call: Callable[[], Any]) -> tuple[str, str] | None:
    """The type and text of the error a call raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except Exception as error:
            return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_documented_order_of_arguments(name: str) -> None:
    ours = inspect.signature(getattr(fastrnn, name))
    positional = [p.name for p in ours.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = {
        "LSTM": "input_size hidden_size num_layers bias batch_first dropout bidirectional "
        "proj_size device dtype",
        "GRU": "input_size hidden_size num_layers bias batch_first dropout bidirectional device "
        "dtype",
        "RNN": "input_size hidden_size num_layers nonlinearity bias batch_first dropout "
        "bidirectional device dtype",
        "LSTMCell": "input_size hidden_size bias device dtype",
        "GRUCell": "input_size hidden_size bias device dtype",
        "RNNCell": "input_size hidden_size bias nonlinearity device dtype",
    }
    assert positional == expected[name].split()


BAD_ARGUMENTS: list[dict[str, Any]] = [
    {"dropout": 1.5},
    {"dropout": -0.1},
    {"dropout": True},
    {"bias": 1},
    {"batch_first": 0},
    {"input_size": 3.0},
    {"input_size": 0},
    {"hidden_size": "4"},
    {"hidden_size": 0},
    {"hidden_size": -1},
    {"num_layers": 0},
    {"proj_size": -1},
    {"proj_size": 4},
    {"proj_size": 9},
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", BAD_ARGUMENTS, ids=str)
def test_constructor_errors_are_torchs(name: str, bad: dict[str, Any]) -> None:
    arguments = {"input_size": 3, "hidden_size": 4, **bad}
    theirs = outcome(lambda: getattr(nn, name)(**arguments))
    if OLD and theirs is None:
        pytest.skip("torch 2.6 takes it; ours has the errors of newer ones")
    assert theirs is not None
    assert outcome(lambda: getattr(fastrnn, name)(**arguments)) == theirs


def test_constructor_errors_of_one_class() -> None:
    for library in (nn, fastrnn):
        with pytest.raises(ValueError, match=r"Unknown nonlinearity 'sine'\. Select"):
            library.RNN(3, 4, nonlinearity="sine")
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            library.GRU(3, 4, proj_size=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'peephole'"):
        fastrnn.GRU(3, 4, peephole=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer_norm'"):
        fastrnn.RNN(3, 4, layer_norm=True)
    with pytest.raises(TypeError, match="recompute should be of type bool, got: int"):
        fastrnn.RNN(3, 4, recompute=1)
    with pytest.raises(TypeError, match="reset_after should be of type bool, got: str"):
        fastrnn.GRU(3, 4, reset_after="no")


@pytest.mark.parametrize("name", NAMES)
def test_dropout_of_a_single_layer_warns_as_torch(name: str) -> None:
    texts = []
    for library in (nn, fastrnn):
        with pytest.warns(UserWarning, match="dropout option adds dropout") as caught:
            getattr(library, name)(3, 4, dropout=0.5)
        texts.append(str(caught[0].message))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", NAMES + CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_one_seed_gives_both_the_same_parameters(name: str, bias: bool) -> None:
    options: dict[str, Any] = {"bias": bias}
    if name in NAMES:
        options |= {"num_layers": 2, "bidirectional": True}
    if name == "LSTM":
        options["proj_size"] = 3
    torch.manual_seed(1)
    theirs = getattr(nn, name)(5, 7, **options)
    torch.manual_seed(1)
    ours = getattr(fastrnn, name)(5, 7, **options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_attributes(name: str) -> None:
    theirs, ours = pair(name, 3, 4, 2)
    for attribute in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first",
                      "dropout", "bidirectional", "proj_size", "_all_weights",
                      "_flat_weights_names"):  # fmt: skip
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert isinstance(ours, nn.RNNBase)
    assert not isinstance(ours, (nn.LSTM, nn.GRU, nn.RNN))
    flat = [weight for layer in ours.all_weights for weight in layer]
    assert all(a is b for a, b in zip(flat, ours._flat_weights, strict=True))


def bad_calls(name: str) -> dict[str, Callable[[nn.Module], Any]]:
    def state(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
        h = torch.zeros(shape, dtype=dtype)
        return (h, h) if name == "LSTM" else h

    x, flat = torch.randn(5, 2, 3), torch.randn(5, 3)
    calls: dict[str, Callable[[nn.Module], Any]] = {
        "1d": lambda m: m(torch.randn(3)),
        "4d": lambda m: m(torch.randn(1, 5, 2, 3)),
        "features": lambda m: m(torch.randn(5, 2, 4)),
        "dtype": lambda m: m(x.double()),
        "no steps": lambda m: m(torch.randn(0, 2, 3)),
        "2d hx": lambda m: m(x, state(2, 4)),
        "4d hx": lambda m: m(x, state(1, 1, 2, 4)),
        "3d hx unbatched": lambda m: m(flat, state(1, 1, 4)),
        "hx layers": lambda m: m(x, state(2, 2, 4)),
        "hx batch": lambda m: m(x, state(1, 3, 4)),
        "hx size": lambda m: m(x, state(1, 2, 5)),
        "hx size unbatched": lambda m: m(flat, state(1, 5)),
        "device": lambda m: m(x.to("meta")),
    }
    if name == "LSTM":
        good = torch.zeros(1, 2, 4)
        calls["cx size"] = lambda m: m(x, (good, torch.zeros(1, 2, 5)))
        calls["one tensor"] = lambda m: m(x, torch.zeros(2, 2, 4))
    return calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_call_errors_are_torchs(name: str, batch_first: bool) -> None:
    theirs, ours = pair(name, 3, 4, batch_first=batch_first)
    x = torch.randn(5, 2, 3)
    before = ours(x)[0]
    for label, call in bad_calls(name).items():
        expected = outcome(lambda: call(theirs))  # noqa: B023 - called at once
        found = outcome(lambda: call(ours))  # noqa: B023
        if OLD and label == "dtype":  # newer ones say how to convert
            assert found is not None
            assert expected is not None
            assert found[0] == expected[0]
            continue
        assert found == expected, label
        assert expected is not None or batch_first, label
    assert torch.equal(ours(x)[0], before)


@pytest.mark.parametrize("name", NAMES)
def test_call_errors_of_our_own(name: str) -> None:
    module = getattr(fastrnn, name)(3, 4)
    x = torch.randn(5, 2, 3)
    h = torch.zeros(1, 2, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"not the same dtype.*hidden tensor with torch.float64"):
        module(x, (h, h) if name == "LSTM" else h)
    with pytest.raises(RuntimeError, match="found input tensor at cpu and hidden tensor at meta"):
        module(x, (h.to("meta"),) * 2 if name == "LSTM" else h.to("meta"))
    with pytest.raises(TypeError, match=f"{name}: input should be a Tensor or a PackedSequence"):
        module(x.tolist())
    with pytest.raises(TypeError, match=f"{name}: hx should be a"):
        module(x, [h.float()])
    packed = pack_padded_sequence(x, [5, 3])
    with pytest.raises(ValueError, match=r"lengths.*PackedSequence"):
        module(packed, lengths=[5, 3])
    with pytest.raises(ValueError, match=r"reset.*PackedSequence"):
        module(packed, reset=torch.zeros(5, 2, dtype=torch.bool))
    if name != "LSTM":
        with pytest.raises(ValueError, match=f"{name}: return_cells=True, but {name} has no"):
            module(x, return_cells=True)
    with pytest.raises(TypeError, match="positional argument"):
        module(x, None, [5, 5])


@pytest.mark.parametrize("name", CELLS)
def test_cell_errors_are_torchs(name: str) -> None:
    theirs, ours = pair(name, 3, 4)

    def state(*shape: int) -> Any:
        return (torch.zeros(shape),) * 2 if name == "LSTMCell" else torch.zeros(shape)

    x = torch.randn(2, 3)
    calls: list[Callable[[nn.Module], Any]] = [
        lambda m: m(torch.randn(1, 2, 3)),
        lambda m: m(x, state(1, 2, 4)),
        lambda m: m(torch.randn(2, 5)),
        lambda m: m(x, state(3, 4)),
        lambda m: m(x, state(2, 5)),
        lambda m: m(torch.randn(3), state(5)),
    ]
    if name == "LSTMCell":
        calls.append(lambda m: m(x, (torch.zeros(2, 4), torch.zeros(2, 5))))
        calls.append(lambda m: m(x, (torch.zeros(2, 4), torch.zeros(1, 2, 4))))
    for number, call in enumerate(calls):
        expected = outcome(lambda: call(theirs))  # noqa: B023 - called at once
        assert expected is not None
        assert outcome(lambda: call(ours)) == expected, number  # noqa: B023
    assert isinstance(ours, getattr(nn, name))


def tensors(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("hidden", [4, 0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_cells_agree_with_torch(name: str, hidden: int, bias: bool, grad: bool) -> None:
    theirs, ours = pair(name, 3, hidden, bias)
    with torch.set_grad_enabled(grad):
        for x in (torch.randn(2, 3), torch.randn(3), torch.randn(0, 3), torch.randn(3, 2).t()):
            expected, got = theirs(x), ours(x)
            for _ in range(2):
                for a, b in zip(tensors(expected), tensors(got), strict=True):
                    torch.testing.assert_close(b, a)
                expected, got = theirs(x, expected), ours(x, got)


@pytest.mark.parametrize("name", NAMES)
def test_flat_weights_stay_in_step(name: str) -> None:
    module = getattr(fastrnn, name)(3, 4)
    x = torch.randn(5, 2, 3)
    names = module._flat_weights_names

    def in_step(m: nn.Module) -> bool:
        return all(a is getattr(m, key) for a, key in zip(m._flat_weights, names, strict=True))

    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    assert in_step(module)
    assert in_step(module.double())
    assert in_step(module.float())
    assert in_step(copy.deepcopy(module))
    assert in_step(pickle.loads(pickle.dumps(module)))
    expected = module(x)[0]
    kept = module.weight_ih_l0
    del module.weight_ih_l0
    assert module._flat_weights[0] is None
    with pytest.raises(AttributeError, match="weight_ih_l0 was deleted"):
        module(x)
    module.weight_ih_l0 = kept
    assert in_step(module)
    assert torch.equal(module(x)[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_pickles_of_old_versions(name: str) -> None:
    module = getattr(fastrnn, name)(3, 4, 2)
    state = module.__getstate__()
    assert "_packed" not in state
    for key in ("proj_size", "recompute", "_all_weights", "_flat_weights_names"):
        state.pop(key, None)
    state["all_weights"] = [[]]  # before torch 0.4: lists of parameters, not of names
    state["all_weights"] = [[getattr(module, key)] for key in ("weight_ih_l0", "weight_ih_l1")]
    old = type(module).__new__(type(module))
    old.__setstate__(state)
    assert old.proj_size == 0
    assert old.recompute is False
    x = torch.randn(5, 2, 3)
    assert torch.equal(old(x)[0], module(x)[0])
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x)[0], module(x)[0])


def weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module, "weight_hh_l0")


def old_weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module, "weight_hh_l0")


def spectral_norm(module: nn.Module) -> None:
    parametrizations.spectral_norm(module, "weight_hh_l0")


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change", [weight_norm, old_weight_norm, spectral_norm, parametrized, pruned]
)
def test_reparametrised_weights(name: str, change: Callable[[nn.Module], None]) -> None:
    theirs, ours = pair(name, 3, 4)
    for module in (theirs, ours):
        torch.manual_seed(0)
        change(module)
    x = torch.randn(5, 2, 3)
    for step in range(2):
        # In training, spectral_norm iterates once per look at the weight, and torch.nn looks often.
        training = step == 0 and change is not spectral_norm
        grads = []
        for module in (theirs.train(training), ours.train(training)):
            output = module(x)[0]
            output.square().sum().backward()
            grads.append([output, *(p.grad for p in module.parameters())])
            torch.optim.SGD(module.parameters(), 0.1).step()
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a)
        with torch.no_grad():
            torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_leaves_the_module_alone(name: str) -> None:
    module = getattr(fastrnn, name)(3, 4)
    x = torch.randn(5, 2, 3)
    expected = module(x)[0]
    other = {key: torch.zeros_like(value) for key, value in module.named_parameters()}
    output = torch.func.functional_call(module, other, (x,))[0]
    assert torch.equal(output, torch.zeros_like(output))
    double = {key: value.double() for key, value in module.named_parameters()}
    assert torch.func.functional_call(module, double, (x.double(),))[0].dtype == torch.float64
    assert torch.equal(module(x)[0], expected)
    assert all(isinstance(weight, nn.Parameter) for weight in module._flat_weights)


@pytest.mark.parametrize("name", NAMES)
def test_meta_device_and_to_empty(name: str) -> None:
    source = getattr(fastrnn, name)(3, 4)
    module = getattr(fastrnn, name)(3, 4, device="meta")
    assert module(torch.zeros(5, 2, 3, device="meta"))[0].shape == (5, 2, 4)
    module = module.to_empty(device="cpu")
    module.load_state_dict(source.state_dict())
    x = torch.randn(5, 2, 3)
    assert torch.equal(module(x)[0], source(x)[0])
    skipped = nn.utils.skip_init(getattr(fastrnn, name), 3, 4)
    assert skipped.weight_ih_l0.shape == source.weight_ih_l0.shape


@pytest.mark.parametrize("name", NAMES)
def test_replica_for_data_parallel(name: str) -> None:
    module = getattr(fastrnn, name)(3, 4)
    module._cache()
    replica = module._replicate_for_data_parallel()
    for key, value in module.named_parameters():
        setattr(replica, key, value.detach().clone() * 0)
    assert replica._packed is None
    assert not replica(torch.randn(5, 2, 3))[0].any()
    assert module(torch.randn(5, 2, 3))[0].any()


@pytest.mark.parametrize("name", NAMES)
def test_unbatched_options(name: str) -> None:
    module = getattr(fastrnn, name)(3, 4, bidirectional=True, batch_first=True)
    x, reset = torch.randn(6, 3), torch.tensor([0, 0, 1, 0, 1, 0], dtype=torch.bool)
    single = module(x, lengths=[5], reset=reset)
    batch = module(x.unsqueeze(0), lengths=[5], reset=reset.unsqueeze(0))
    assert single[0].shape == (6, 8)
    assert torch.equal(single[0], batch[0].squeeze(0))


def test_return_cells_keeps_the_layout() -> None:
    module = fastrnn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    x = torch.randn(6, 3, 3)
    output, (_, c_n), cells = module(x, return_cells=True)
    assert output.shape == (6, 3, 4)
    assert cells.shape == (6, 3, 8)
    assert torch.equal(cells[-1, :, :4], c_n[2])
    assert torch.equal(cells[0, :, 4:], c_n[3])
    for module.batch_first in (False, True):
        cells_of_one = module(x[:, 0], return_cells=True)[2]
        assert cells_of_one.shape == (6, 8)
        batch = module(x[None, :, 0] if module.batch_first else x[:, :1], return_cells=True)[2]
        assert torch.equal(cells_of_one, batch.squeeze(0 if module.batch_first else 1))
    module.batch_first = False
    packed = pack_padded_sequence(x, [2, 6, 4], enforce_sorted=False)
    _, (_, c_n), cells = module(packed, return_cells=True)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(cells)
    assert lengths.tolist() == [2, 6, 4]
    assert torch.equal(padded[lengths - 1, torch.arange(3), :4], c_n[2])


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_cells_have_the_dtype_of_the_output(grad: bool, options: dict[str, Any]) -> None:
    module = fastrnn.LSTM(3, 4, dtype=torch.bfloat16, **options)
    with torch.set_grad_enabled(grad):
        output, _, cells = module(torch.randn(5, 2, 3).bfloat16(), return_cells=True)
    assert output.dtype == cells.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_too_many_rows_for_unsorted_packed_input(name: str) -> None:
    """Its rows are put in order before they are counted."""
    module = getattr(fastrnn, name)(3, 4)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 4)], enforce_sorted=False)
    h = torch.randn(1, 3, 4)
    with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(1, 2, 4\), got \[1, 3, 4\]"):
        module(packed, (h, h) if name == "LSTM" else h)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_recompute_keeps_no_gates(name: str, layers: int) -> None:
    def kept(recompute: bool) -> int:
        module = getattr(fastrnn, name)(5, 7, layers, recompute=recompute)
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            found[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for _ in range(3):  # the general way, then a prepared call
                found.clear()
                output = module(torch.randn(9, 3, 5))[0]
        assert output.requires_grad  # what it saved is alive
        return sum(found.values())

    gates = 9 * 3 * 3 * 7 * 4  # steps, sequences, gates, units, bytes
    assert kept(False) - kept(True) >= layers * gates
