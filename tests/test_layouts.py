"""Arguments that are no ordinary arrays: refused by name, whatever call came before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import functional

T, N, I, H = 4, 2, 3, 5
MODULES: dict[str, Callable[..., Any]] = {
    "lstm": lambda **k: fastrnn.LSTM(I, H, **k),
    "gru": lambda **k: fastrnn.GRU(I, H, **k),
    "rnn": lambda **k: fastrnn.RNN(I, H, **k),
    "rhn": lambda **k: fastrnn.RHN(I, H, depth=2, **k),
    "bnlstm": lambda **k: fastrnn.BNLSTM(I, H, max_length=T, **k),
}
CELLS: dict[str, Any] = {
    "lstm": fastrnn.LSTMCell,
    "gru": fastrnn.GRUCell,
    "rnn": fastrnn.RNNCell,
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.sparse_coo": Tensor.to_sparse,
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
}
if torch.backends.mkldnn.is_available():
    LAYOUTS["torch._mkldnn"] = Tensor.to_mkldnn
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
]

X, RESET = torch.randn(T, N, I), torch.zeros(T, N, dtype=torch.bool)


def pair(name: str, h: Tensor, c: Tensor | None = None) -> Any:
    return (h, h if c is None else c) if "lstm" in name else h


def message(name: str, layout: str) -> str:
    if layout == "nested":
        return rf"^{name}: got a nested tensor, expected a padded one; pass torch.nested.to_padded"
    return rf"^{name}: got a tensor of layout {layout}, expected torch.strided; pass .*to_dense"


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_states(name: str, layout: str, grad: bool) -> None:
    module, h = MODULES[name](), torch.randn(1, N, H)
    first = r"hx\[0\]" if "lstm" in name else "hx"
    other = LAYOUTS[layout](h)
    cases = [(pair(name, other), first)]
    if "lstm" in name:
        cases.append(((h, other), r"hx\[1\]"))
    with torch.set_grad_enabled(grad):
        for _ in range(4):  # unprepared and prepared
            for state, named in cases:
                with pytest.raises(RuntimeError, match=message(named, layout)):
                    module(X, state)
                if name != "bnlstm":
                    with pytest.raises(RuntimeError, match=message(named, layout)):
                        module.step(X[0], state)
            module(X, pair(name, h))
        module.eval()
        expected = module(X, pair(name, h))[0]
        assert torch.equal(expected, module(X, pair(name, h.clone()))[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_states_of_functions(name: str, layout: str) -> None:
    module, h = MODULES[name](), torch.randn(1, N, H)
    extra = [module._statistics()] if name == "bnlstm" else []
    function = getattr(functional, name)
    first = r"hx\[0\]" if "lstm" in name else "hx"
    other = LAYOUTS[layout](h)
    with pytest.raises(RuntimeError, match=message(first, layout)):
        function(X, pair(name, other), module._weights(), *extra)
    if "lstm" in name:
        with pytest.raises(RuntimeError, match=message(r"hx\[1\]", layout)):
            function(X, (h, other), module._weights(), *extra)


@pytest.mark.parametrize("name", MODULES)
def test_torchs_words_where_it_has_some(name: str) -> None:
    module, h = MODULES[name](), torch.randn(1, N, H)
    flat = pair(name, h[0].to_sparse_csr())
    jagged = pair(name, torch.nested.nested_tensor(list(h), layout=torch.jagged))
    for state, words in ((flat, "For batched 3-D input"), (jagged, "Expected hidden")):
        with pytest.raises(RuntimeError, match=words):
            module(X, state)
        if hasattr(nn, name.upper()):
            with pytest.raises(RuntimeError, match=words):
                getattr(nn, name.upper())(I, H)(X, state)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_lengths_and_reset(name: str, batch_first: bool) -> None:
    module, lengths = MODULES[name](batch_first=batch_first), torch.tensor([T, 1])
    x, reset = (X.transpose(0, 1), RESET.t()) if batch_first else (X, RESET)
    for _ in range(2):
        for layout, convert in LAYOUTS.items():
            if layout == "torch._mkldnn":  # of floating point only
                continue
            with pytest.raises(RuntimeError, match=message("reset", layout)):
                module(x, reset=convert(reset))
            if layout != "nested":
                with pytest.raises(RuntimeError, match=message("lengths", layout)):
                    module(x, lengths=convert(lengths))
        with pytest.raises(RuntimeError, match=message("reset", "torch.sparse_csr")):
            module(x, reset=reset.to_sparse_csr())
        module(x, lengths=lengths, reset=reset)
    with pytest.raises(RuntimeError, match=message("reset", "torch.sparse_coo")):
        module(X[:, 0], reset=RESET[:, 0].to_sparse())


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, layout: str, grad: bool) -> None:
    cell, x, h = CELLS[name](I, H), X[0], torch.randn(N, H)
    first = r"hx\[0\]" if name == "lstm" else "hx"
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            with pytest.raises(RuntimeError, match=message(first, layout)):
                cell(x, pair(name, LAYOUTS[layout](h)))
            with pytest.raises(RuntimeError, match=message("input", layout)):
                cell(LAYOUTS[layout](x), pair(name, h))
            if name == "lstm":
                with pytest.raises(RuntimeError, match=message(r"hx\[1\]", layout)):
                    cell(x, (h, LAYOUTS[layout](h)))
            cell(x, pair(name, h))


def test_another_error_of_the_library_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("its own")

    module, h = fastrnn.GRU(I, H), torch.randn(1, N, H)
    monkeypatch.setattr(fastrnn.GRU, "_natively_recorded", fails)
    with pytest.raises(RuntimeError, match="its own"):
        module(X, h)
