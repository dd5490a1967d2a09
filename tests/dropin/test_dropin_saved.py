"""Calls whose tape or backward others keep: saved-tensor hooks, traces, exports, inference mode."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin_cases import assert_same_bits
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastrnn
from tests.saved_strides import transposed
from tests.versions import exporting

MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "lstm": lambda: fastrnn.LSTM(3, 5),
    "gru": lambda: fastrnn.GRU(3, 5, 2),
    "rnn": lambda: fastrnn.RNN(3, 5),
    "rhn": lambda: fastrnn.RHN(3, 5, depth=2),
    "bnlstm": lambda: fastrnn.BNLSTM(3, 5, max_length=4, learn_init_state=True),
}


@pytest.fixture(params=list(MODULES))
def module(request: pytest.FixtureRequest) -> torch.nn.Module:
    return MODULES[request.param]()


@pytest.mark.parametrize(
    "unpack",
    [lambda t: t.double(), lambda t: t.half(), lambda t: t.reshape(-1)[:1], lambda t: None],
    ids=["double", "half", "one element", "none"],
)
def test_unpacking_another_tensor(module: torch.nn.Module, unpack: Callable[..., Tensor]) -> None:
    """An error in the first call of a shape and in the fourth, which is a prepared one."""
    for call in range(1, 5):
        x = torch.randn(4, 2, 3, requires_grad=True)
        if call in (2, 3):
            module(x)[0].sum().backward()
            continue
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = module(x)[0]
        with pytest.raises((RuntimeError, TypeError), match=r"saved-tensor hooks|unpack_hook"):
            y.sum().backward()


class Subclass(Tensor):
    pass


def test_unpacking_another_class(module: torch.nn.Module) -> None:
    """Of the same values, in the first call of a shape and in a prepared one."""
    x = torch.randn(4, 2, 3, requires_grad=True)
    for _ in range(4):
        (expected,) = torch.autograd.grad(module(x)[0].sum(), x)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t, lambda t: t.as_subclass(Subclass)
        ):
            y = module(x)[0]
        (found,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(found, expected)


VARIANTS: dict[str, Callable[[], torch.nn.Module]] = MODULES | {
    "bidirectional": lambda: fastrnn.GRU(3, 5, bidirectional=True, reset_after=False),
    "projected": lambda: fastrnn.LSTM(3, 5, proj_size=2),
    "layer_norm": lambda: fastrnn.LSTM(3, 5, layer_norm=True),
    "regularised": lambda: fastrnn.LSTM(3, 5, zoneout=0.3, recurrent_dropout=0.2),
    "rhn_masks": lambda: fastrnn.RHN(
        3, 5, depth=3, couple_carry=False, bidirectional=True, variational_input=0.2,
        variational_state=0.2, tie_gate_masks=False,
    ),
    "rhn_recompute": lambda: fastrnn.RHN(3, 5, depth=2, recompute=True),
    "bnlstm_sequence": lambda: fastrnn.BNLSTM(
        3, 5, max_length=4, input_stats="sequence", bidirectional=True
    ),
    "bnlstm_eval": lambda: fastrnn.BNLSTM(3, 5, max_length=4).eval(),
}  # fmt: skip


def gradients(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    inputs = [x, *module.parameters()]
    return torch.autograd.grad(
        module(x)[0].sum(), inputs, allow_unused=True, materialize_grads=True
    )


@pytest.mark.parametrize(
    "other", [lambda t: t[..., :1].clone(), Tensor.half], ids=["shape", "dtype"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_data_that_no_longer_fits(variant: str, other: Callable[[Tensor], Tensor]) -> None:
    """Assigned between forward and backward, where no version counter shows it: the kernels would
    read past its end. In the first call of a shape and in a prepared one."""
    module = VARIANTS[variant]()
    x = torch.randn(4, 2, 3, requires_grad=True)
    own = dict(module.named_parameters())
    read = [own[name] for name in own if not name.startswith(("h_0", "c_0"))]  # expanded by torch
    for _ in range(2):
        for tensor in (x, *read):
            kept = tensor.data
            y = module(x)[0]
            tensor.data = other(kept)
            with pytest.raises(RuntimeError, match=r"assign to \.data after the backward"):
                y.sum().backward()
            tensor.data = kept
        expected = gradients(module, x)
        for a, b in zip(gradients(module, x), expected, strict=True):
            assert torch.equal(a, b)


def every_second(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t


@pytest.mark.parametrize("restride", [transposed, every_second], ids=lambda f: f.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_tensors_with_other_strides(
    variant: str, restride: Callable[[Tensor], Tensor]
) -> None:
    """In the first call of a shape and in the fourth, which is a prepared one."""
    module = VARIANTS[variant]()
    initial = copy.deepcopy(module.state_dict())  # running statistics move
    x = torch.randn(4, 3, 3)
    sequences = [torch.randn(n, 3) for n in (4, 3, 1)]

    def gradients(**call: Any) -> dict[str, Tensor]:
        module.load_state_dict(initial)
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)  # of masks
        output, state = module(leaf, **call)
        packed, _ = module(pack_sequence(sequences))
        states = state if isinstance(state, tuple) else (state,)
        sum(t.square().sum() for t in (output, packed.data, *states)).backward()
        return {"x": leaf.grad} | {n: p.grad.clone() for n, p in module.named_parameters()}

    ragged = {"lengths": [2, 4, 3], "reset": torch.rand(4, 3) < 0.3}
    for call in ({}, ragged, {}, {}):
        expected = gradients(**call)
        with torch.autograd.graph.saved_tensors_hooks(restride, restride):
            assert_same_bits(gradients(**call), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_in_grad_mode(module: torch.nn.Module) -> None:
    """As torch.nn: it is saved and loaded, and runs for other sizes; a backward is an error."""
    module.eval()
    traced = torch.jit.trace(module, (torch.randn(4, 2, 3),))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for steps, size in ((4, 2), (6, 3)):
        x = torch.randn(steps, size, 3)
        found = loaded(x)[0]
        torch.testing.assert_close(found, module(x)[0])
    with pytest.raises(RuntimeError, match="for inference"):
        found.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_with_a_packed_sequence(module: torch.nn.Module) -> None:
    """As torch.nn: for other lengths, and another number of them."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module.eval()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            return self.module(packed)[0].data

    with torch.no_grad():
        traced = torch.jit.trace(Model(), (torch.randn(4, 2, 3), torch.tensor([3, 4])))
        x, lengths = torch.randn(5, 3, 3), torch.tensor([1, 5, 2])
        torch.testing.assert_close(traced(x, lengths), Model()(x, lengths))


def test_training_an_exported_program_is_an_error(module: torch.nn.Module) -> None:
    """Gradients of layers before it do not go missing in silence."""
    before = torch.nn.Linear(3, 3)
    model = torch.nn.ModuleList([before, module.eval()])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model[1](self.model[0](x))[0]

    x = torch.randn(4, 2, 3)
    with exporting():
        program = torch.export.export(Model(), (x,)).module()
    found = program(x)
    torch.testing.assert_close(found, Model()(x))
    with pytest.raises(RuntimeError, match="train the module itself"):
        found.sum().backward()


def test_grad_mode_inside_inference_mode(module: torch.nn.Module) -> None:
    """Nothing is recorded, as by torch.nn."""
    x = torch.randn(4, 2, 3)
    for _ in range(4):
        with torch.inference_mode(), torch.enable_grad():
            y = module(x)[0]
        assert not y.requires_grad
        assert y.is_inference()
    module(x)[0].sum().backward()


def test_vmap_over_lengths() -> None:
    layer = fastrnn.LSTM(3, 5).requires_grad_(False)
    x, lengths = torch.randn(2, 4, 3, 3), torch.tensor([[4, 1, 2], [3, 3, 1]])
    found = torch.func.vmap(lambda x, n: layer(x, lengths=n)[0])(x, lengths)
    for i in range(2):
        torch.testing.assert_close(found[i], layer(x[i], lengths=lengths[i])[0])
