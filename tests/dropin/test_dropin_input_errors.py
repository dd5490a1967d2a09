"""Wrong input raises what torch.nn raises, word for word, and leaves the module as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin_cases import (
    Kind,
    assert_same_bits,
    outcome,
    raised,
    random_packed,
    random_state,
    twins,
)

from tests.versions import OLD


def reshaped(module: Any, change: Callable[[torch.Tensor], torch.Tensor], which: int = 0) -> Any:
    """A good hx for a batch of 3 with `change` applied to its `which`-th tensor."""
    hx = random_state(module, 3)
    if module.mode != "LSTM":
        return change(hx)
    return tuple(change(t) if i == which else t for i, t in enumerate(hx))


Arguments = Callable[[Any], tuple]

SAME_TEXT: dict[str, Arguments] = {
    "input_0d": lambda m: (torch.randn(()),),
    "input_1d": lambda m: (torch.randn(5),),
    "input_4d": lambda m: (torch.randn(1, 2, 3, 5),),
    "features": lambda m: (torch.randn(4, 3, 6),),
    "features_unbatched": lambda m: (torch.randn(4, 6),),
    "no_features": lambda m: (torch.randn(4, 3, 0),),
    "double_input": lambda m: (torch.randn(4, 3, 5).double(),),
    "half_input": lambda m: (torch.randn(4, 3, 5).half(),),
    "integer_input": lambda m: (torch.ones(4, 3, 5, dtype=torch.int64),),
    "complex_input": lambda m: (torch.ones(4, 3, 5, dtype=torch.complex64),),
    "no_steps": lambda m: (torch.randn(0, 3, 5),),
    "no_steps_unbatched": lambda m: (torch.randn(0, 5),),
    "no_steps_with_state": lambda m: (torch.randn(0, 3, 5), random_state(m, 3)),
    "hx_2d_for_batch": lambda m: (torch.randn(4, 3, 5), random_state(m, None)),
    "hx_3d_for_unbatched": lambda m: (torch.randn(4, 5), random_state(m, 1)),
    "hx_4d": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t[None])),
    "hx_batch": lambda m: (torch.randn(4, 3, 5), random_state(m, 2)),
    "hx_layers": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t[1:])),
    "hx_hidden": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t[..., 1:])),
    "hx_hidden_unbatched": lambda m: (torch.randn(4, 5), reshaped(m, lambda t: t[:, 0, 1:])),
    "meta_input": lambda m: (torch.randn(4, 3, 5, device="meta"),),
    "meta_state": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t.to("meta"))),
}
LSTM_ONLY: dict[str, Arguments] = {
    "cx_2d": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t[:, 0], 1)),
    "cx_batch": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t[:, 1:], 1)),
    "cx_layers": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t[1:], 1)),
    "cx_hidden": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t[..., 1:], 1)),
    "cx_meta": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t.to("meta"), 1)),
}
# torch.nn.LSTM does not check packed input: test_dropin_beyond.py.
PACKED: dict[str, Arguments] = {
    "features": lambda m: (random_packed(6, [3, 2]),),
    "double": lambda m: (random_packed(5, [3, 2]).double(),),
    "hx_batch": lambda m: (random_packed(5, [3, 2], True), random_state(m, 3)),
    "hx_hidden": lambda m: (random_packed(5, [3, 2, 2]), reshaped(m, lambda t: t[..., 1:])),
}
REFUSED: dict[str, Arguments] = {
    "double_state": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t.double())),
    "integer_state": lambda m: (torch.randn(4, 3, 5), reshaped(m, lambda t: t.long())),
    "double_state_packed": lambda m: (
        random_packed(5, [3, 2, 2], True),
        reshaped(m, lambda t: t.double()),
    ),
}


def refuses_like_torch(ours: Any, theirs: Any, arguments: Arguments, *, text: bool) -> None:
    good = torch.randn(4, 3, 5)
    before = outcome(ours, good)
    weights = {k: v.clone() for k, v in ours.state_dict().items()}
    torch.manual_seed(1)
    expected = raised(lambda: theirs(*arguments(theirs)))
    torch.manual_seed(1)
    found = raised(lambda: ours(*arguments(ours)))
    if text and OLD and "does not match weight dtype" in found[1]:  # newer torch's words
        assert found[0] is expected[0]
        assert "input must have the type" in expected[1]
    elif text:
        assert found == expected
    else:
        assert issubclass(found[0], (RuntimeError, ValueError, TypeError))
        assert any(word in found[1] for word in ("hx", "hidden", "dtype")), found[1]
    assert_same_bits(ours.state_dict(), weights)
    assert_same_bits(outcome(ours, good), before)


@pytest.mark.parametrize("arguments", SAME_TEXT.values(), ids=SAME_TEXT.keys())
def test_same_error(any_kind: Kind, arguments: Arguments) -> None:
    ours, theirs = twins(any_kind, 5, 7, num_layers=2, bidirectional=True)
    refuses_like_torch(ours, theirs, arguments, text=True)


@pytest.mark.parametrize("arguments", LSTM_ONLY.values(), ids=LSTM_ONLY.keys())
@pytest.mark.parametrize("options", [{}, {"proj_size": 3}], ids=["plain", "proj"])
def test_same_error_of_cell_state(arguments: Arguments, options: dict) -> None:
    ours, theirs = twins(Kind("lstm", "LSTM"), 5, 7, num_layers=2, bidirectional=True, **options)
    refuses_like_torch(ours, theirs, arguments, text=True)


@pytest.mark.parametrize("arguments", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_same_error_packed(name: str, arguments: Arguments) -> None:
    ours, theirs = twins(Kind(name, name), 5, 7, num_layers=2, bidirectional=True)
    refuses_like_torch(ours, theirs, arguments, text=True)


def test_same_error_batch_first(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 5, 7, batch_first=True)
    for arguments in (
        lambda m: (torch.randn(4, 3, 6),),
        lambda m: (torch.randn(3, 0, 5),),
        lambda m: (torch.randn(4, 3, 5), random_state(m, 3)),
    ):
        assert raised(ours, *arguments(ours)) == raised(theirs, *arguments(theirs))


def test_wrong_state_dtype_is_refused(any_kind: Kind) -> None:
    """torch.nn's text comes from deep inside its kernels: only the kind of error is compared."""
    ours, theirs = twins(any_kind, 5, 7, num_layers=2, bidirectional=True)
    for arguments in REFUSED.values():
        refuses_like_torch(ours, theirs, arguments, text=False)


def test_check_methods_stay_available(any_kind: Kind) -> None:
    """Subclasses of torch.nn modules call these."""
    ours, theirs = twins(any_kind, 5, 7, num_layers=2)
    x = torch.randn(4, 3, 5)
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    for module in (ours, theirs):
        module.check_input(x, None)
        module.check_forward_args(x, random_state(module, 3), None)
        hx, order = random_state(module, 3), torch.tensor([2, 0, 1])
        permuted = module.permute_hidden(hx, order)
        first, given = (permuted[0], hx[0]) if any_kind.has_cell_state else (permuted, hx)
        assert torch.equal(first, given[:, order])
    assert raised(lambda: ours.check_input(x[..., 1:], None)) == raised(
        lambda: theirs.check_input(x[..., 1:], None)
    )
