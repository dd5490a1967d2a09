"""What BNLSTM refuses, in which words, and that a failed call changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastrnn
from fastrnn import functional
from tests.bnlstm_problems import BNCase, BNProblem, solve_ops
from tests.test_bnlstm import H, I, L, N, T, assert_same_buffers, buffers, make

BAD_ARGUMENTS = [
    ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
    ({"max_length": 2.0}, TypeError, "max_length should be of type int, got: float"),
    ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    ({"num_layers": True}, TypeError, "num_layers should be of type int, got: bool"),
    ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({"dropout": 1.5}, ValueError, r"dropout should be a number in range \[0, 1\].* got 1.5"),
    ({"momentum": -0.1}, ValueError, "momentum should be a number in range .* got -0.1"),
    ({"momentum": "0.1"}, ValueError, "momentum should be a number in range .* got '0.1'"),
    ({"eps": 0.0}, ValueError, "eps should be a number above 0, got 0.0"),
    ({"h0_noise": -1}, ValueError, "h0_noise should be a standard deviation >= 0, got -1"),
    ({"input_stats": "batch"}, ValueError, "input_stats should be 'step' or 'sequence'"),
    ({"learn_init_state": None}, TypeError, "learn_init_state should be of type bool"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastrnn.BNLSTM(**{"input_size": I, "hidden_size": H, "max_length": L, **options})


def test_max_length_has_no_default() -> None:
    with pytest.raises(TypeError, match=r"max_length"):
        fastrnn.BNLSTM(I, H)
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        make(dropout=0.5)


X = torch.zeros(T, N, I)
BAD_CALLS = [
    ((torch.zeros(T, N, I + 1),), {}, RuntimeError, r"Expected 3, got 4"),
    ((torch.zeros(0, N, I),), {}, RuntimeError, "sequence length to be larger than 0"),
    ((torch.zeros(T),), {}, ValueError, "BNLSTM: Expected input to be 2D or 3D, got 1D"),
    (([1.0],), {}, TypeError, "BNLSTM: input should be a Tensor or a PackedSequence, got list"),
    ((X.double(),), {}, ValueError, r"input dtype \(torch.float64\) does not match weight dtype"),
    ((X, X), {}, TypeError, r"hx should be a pair of tensors \(h_0, c_0\), got Tensor"),
    ((X, (torch.zeros(1, N, H),) * 3), {}, TypeError, "got 3 of them"),
    ((X, (torch.zeros(1, N, H), torch.zeros(1, 2, H))), {}, RuntimeError, r"Expected hidden\[1\]"),
    ((X, (torch.zeros(N, H),) * 2), {}, RuntimeError, "For batched 3-D input"),
    ((X,), {"lengths": [0, 1, 2, 3]}, ValueError, "lengths: got values from 0 to 3"),
    ((X,), {"lengths": [1, 2]}, ValueError, r"lengths: got shape \(2,\)"),
    ((X,), {"reset": torch.zeros(N, T, dtype=torch.bool)}, ValueError, "reset: got shape"),
    ((pack_padded_sequence(X, [T] * N),), {"lengths": [1] * N}, ValueError, "PackedSequence"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_CALLS)
def test_bad_calls_leave_no_trace(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    module = make(h0_noise=0.1)
    module(torch.randn(T, N, I))
    before, state = buffers(module), torch.random.get_rng_state()
    with pytest.raises(error, match=message):
        module(*args, **options)
    assert_same_buffers(module, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_failure_in_the_second_layer_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(num_layers=2)
    before, calls, layer = buffers(module), [], functional.bnlstm.__globals__["_layer"]

    def fails_later(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return layer(*args)

    monkeypatch.setitem(functional.bnlstm.__globals__, "_layer", fails_later)
    with pytest.raises(MemoryError):
        module(X)
    assert_same_buffers(module, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", 0.0), ("eps", -1.0), ("momentum", 2.0), ("momentum", "x"), ("dropout", 3.0),
     ("h0_noise", -1.0)],
)  # fmt: skip
def test_settings_changed_to_what_they_cannot_be(name: str, value: Any) -> None:
    module = make()
    before = buffers(module)
    draws = torch.get_rng_state()

    def change_and_call() -> None:
        setattr(module, name, value)
        module(X)

    with pytest.raises(ValueError, match=f"{name} should be .* got"):
        change_and_call()
    assert_same_buffers(module, before)
    assert torch.equal(draws, torch.get_rng_state())


@pytest.mark.parametrize("name", ["eps", "momentum", "h0_noise", "dropout"])
def test_settings_are_checked_when_they_are_set(name: str) -> None:
    """At the call a compiled module would not see them."""
    module = make()
    before = getattr(module, name)
    with pytest.raises(ValueError, match=rf"{name} should be a .* got -1\.0"):
        setattr(module, name, -1.0)
    assert getattr(module, name) == before


@pytest.mark.parametrize(
    "group", [3, "WORLD", False, object()], ids=lambda group: type(group).__name__
)
def test_what_is_no_process_group(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    message = rf"process_group: got .* \({type(group).__name__}\), expected a ProcessGroup of torch"
    module = make()
    own, statistics = module._weights(), module._statistics()
    for training in (True, False):
        module.train(training)
        with pytest.raises(TypeError, match=message):
            make(process_group=group)
        with pytest.raises(TypeError, match=message):
            module.process_group = group
        assert module.process_group is None
        module(X)
        with pytest.raises(TypeError, match=message):
            functional.bnlstm(X, None, own, statistics, training=training, process_group=group)
        # A torch that was built without it has the function, but no groups.
        monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
        monkeypatch.delattr(torch.distributed, "ProcessGroup", raising=False)
    make(process_group=None)(X)


def test_a_rank_outside_of_a_group() -> None:
    """What new_group gives there is taken by collectives, which then do nothing."""
    outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
    module = make(process_group=outside)
    module.process_group = outside
    assert module.process_group == outside


def test_what_parameters_and_buffers_are_made_for_stays() -> None:
    module = make()
    with pytest.raises(AttributeError):
        module.max_length = L + 1
    assert module.max_length == L
    module.learn_init_state = True
    with pytest.raises(ValueError, match=r"learn_init_state: got True, but .* no h_0 and c_0"):
        module(X)


def test_a_state_of_too_many_rows_for_unsorted_packed_input() -> None:
    """Its rows are put in order before they are counted."""
    packed = pack_sequence([torch.randn(n, I) for n in (2, 4)], enforce_sorted=False)
    h = torch.randn(1, 3, H)
    message = rf"Expected hidden\[0\] size \(1, 2, {H}\), got \[1, 3, {H}\]"
    with pytest.raises(RuntimeError, match=message):
        make()(packed, (h, h))


def test_bad_steps() -> None:
    x = torch.zeros(N, I)
    with pytest.raises(ValueError, match=r"BNLSTM\.step: bidirectional=True"):
        make(bidirectional=True).step(x)
    with pytest.raises(ValueError, match=r"Expected x_t to be 1D or 2D, got 3D"):
        make().step(X)
    with pytest.raises(TypeError, match="state should be what step returned"):
        make().step(x, (torch.zeros(1, N, H), torch.zeros(1, N, H)))
    with pytest.raises(TypeError, match="x_t should be a Tensor, got int"):
        make().step(3)
    module = make(input_stats="sequence")
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        module.step(x)
    module.eval().step(x)


@pytest.mark.parametrize("name", ["gamma_init", "forget_bias"])
def test_initial_values_are_finite_numbers(name: str) -> None:
    module = make(**{name: 0.25})
    for value in ("1", None, True):
        with pytest.raises(TypeError, match=rf"{name}: got {value!r} \(.*\), expected a number"):
            make(**{name: value})
        with pytest.raises(TypeError, match=rf"{name}: got {value!r} \(.*\), expected a number"):
            setattr(module, name, value)
    with pytest.raises(ValueError, match=f"{name}: got nan, expected a finite number"):
        make(**{name: float("nan")})
    with pytest.raises(ValueError, match=f"{name}: got nan, expected a finite number"):
        setattr(module, name, float("nan"))
    assert getattr(module, name) == 0.25


@pytest.mark.parametrize(("name", "value"), [("dropout", "0"), ("input_stats", "batch")])
def test_a_prepared_call_has_no_settings_that_cannot_be(name: str, value: str) -> None:
    """It takes what is not "sequence" for "step", and drops nothing."""
    module = make()
    for _ in range(3):
        module(X)
    before = getattr(module, name)
    with pytest.raises(ValueError, match=rf"{name} should be .* got '{value}'"):
        setattr(module, name, value)
    assert getattr(module, name) == before


def test_what_is_recalibrated_on() -> None:
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for bad, what in ((X, "Tensor"), (3, "int")):
        with pytest.raises(TypeError, match=f"batches: got {what}, expected an iterable of inputs"):
            module.recalibrate(bad)
    for bad in (3, (X,), "ab"):
        with pytest.raises(TypeError, match="among them, expected an input or a pair"):
            module.recalibrate([X, bad])
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_bad_functional_arguments() -> None:
    module = make()
    own, statistics = module._weights(), module._statistics()
    with pytest.raises(ValueError, match="flat_weights: got 6 tensors, expected 7"):
        functional.bnlstm(X, None, own[:-1], statistics)
    with pytest.raises(ValueError, match="flat_statistics: got 0 tensors, expected 7"):
        functional.bnlstm(X, None, own, [])
    with pytest.raises(RuntimeError, match=r"flat_statistics\[2\]: got shape \(20,\)"):
        functional.bnlstm(X, None, own, [*statistics[:2], statistics[2][0], *statistics[3:]])
    with pytest.raises(ValueError, match="flat_statistics: got no rows, expected those of one"):
        functional.bnlstm(X, None, own, [t[:0] for t in statistics])
    with pytest.raises(ValueError, match="first_step: got -1, expected at least 0"):
        functional.bnlstm(X, None, own, statistics, first_step=-1)
    with pytest.raises(ValueError, match="input_stats: got 'all'"):
        functional.bnlstm(X, None, own, statistics, input_stats="all")


def test_a_dtype_without_kernels() -> None:
    """Of the operators themselves: the functional converts it."""
    with pytest.raises(TypeError, match=r"x: got torch\.bfloat16, .* has CPU kernels of float32"):
        solve_ops(BNProblem(BNCase(dtype=torch.bfloat16)))
