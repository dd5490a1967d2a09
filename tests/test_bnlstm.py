"""fastrnn.BNLSTM as a user meets it: arguments, statistics, modes, states, errors."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.reference import bnlstm_layer
from tests.tolerances import assert_close_by_rule, assert_same_bits

T, N, I, H, L = 6, 4, 3, 5, 4
TERMS = ("mean_ih", "var_ih", "mean_hh", "var_hh", "mean_c", "var_c")


def make(**options: Any) -> fastrnn.BNLSTM:
    return fastrnn.BNLSTM(I, H, **{"max_length": L, "eps": 0.1, **options})


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.named_buffers()}


def assert_same_buffers(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in module.named_buffers():
        assert_same_bits(name, value, before[name])


def weights(module: fastrnn.BNLSTM, suffix: str = "_l0") -> list[Tensor]:
    names = ["weight_ih", "weight_hh", "bias", "bn_weight_ih", "bn_weight_hh"]
    return [getattr(module, n + suffix) for n in [*names, "bn_weight_c", "bn_bias_c"]]


def used(module: fastrnn.BNLSTM, x: Tensor, suffix: str = "_l0", **options: Any) -> list[Tensor]:
    """Mean and variance per step of each term, by the reference in float64."""
    state = torch.zeros(x.size(1), H, dtype=torch.float64)
    own = [w.detach().double() for w in weights(module, suffix)]
    running = [getattr(module, f"running_{t}{suffix}").double() for t in TERMS]
    results = bnlstm_layer(
        x.double(), state, state, own, running, batch_stats=True, eps=module.eps,
        sequence=module.input_stats == "sequence", **options,
    )  # fmt: skip
    return [part for term in results[4:] for part in term]


def test_parameters_and_buffers() -> None:
    module = fastrnn.BNLSTM(I, H, 2, bidirectional=True, max_length=L, learn_init_state=True)
    for k, inputs in ((0, I), (1, 2 * H)):
        for suffix in (f"_l{k}", f"_l{k}_reverse"):
            shapes = {
                "weight_ih": (4 * H, inputs), "weight_hh": (4 * H, H), "bias": (4 * H,),
                "bn_weight_ih": (4 * H,), "bn_weight_hh": (4 * H,), "bn_weight_c": (H,),
                "bn_bias_c": (H,), "h_0": (H,), "c_0": (H,), "num_batches_tracked": (L,),
                "running_mean_ih": (L, 4 * H), "running_var_ih": (L, 4 * H),
                "running_mean_hh": (L, 4 * H), "running_var_hh": (L, 4 * H),
                "running_mean_c": (L, H), "running_var_c": (L, H),
            }  # fmt: skip
            for name, shape in shapes.items():
                assert getattr(module, name + suffix).shape == shape
    assert len(module.state_dict()) == 4 * 16
    assert module.num_batches_tracked_l0.dtype == torch.int64
    bare = make(bias=False, input_stats="sequence")
    assert [n for n, _ in bare.named_parameters()] == [
        "weight_ih_l0", "weight_hh_l0", "bn_weight_ih_l0", "bn_weight_hh_l0", "bn_weight_c_l0",
        "bn_bias_c_l0",
    ]  # fmt: skip
    assert bare.running_mean_ih_l0.shape == bare.running_var_ih_l0.shape == (1, 4 * H)


def test_initial_values() -> None:
    module = make(gamma_init=0.2, forget_bias=1.5, learn_init_state=True)
    assert torch.equal(module.bias_l0, torch.tensor([0.0, 1.5, 0, 0]).repeat_interleave(H))
    for name in ("bn_weight_ih_l0", "bn_weight_hh_l0", "bn_weight_c_l0"):
        assert (getattr(module, name) == 0.2).all()
    for name in ("bn_bias_c_l0", "h_0_l0", "c_0_l0", "running_mean_c_l0", "num_batches_tracked_l0"):
        assert not getattr(module, name).any()
    assert (module.running_var_hh_l0 == 1).all()
    for weight in (module.weight_ih_l0, module.weight_hh_l0):
        assert 0.5 / H**0.5 < weight.abs().max() <= 1 / H**0.5


@pytest.mark.parametrize("momentum", [0.3, 1.0, 0.0, None])
@pytest.mark.parametrize("stats", ["step", "sequence"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_running_statistics(backend: str, stats: str, momentum: float | None) -> None:
    """After three batches, one of them ragged, they are what the formula makes of them."""
    module = make(momentum=momentum, input_stats=stats)
    expected = {t: getattr(module, f"running_{t}_l0").double() for t in TERMS}
    counts = torch.zeros(L, dtype=torch.int64)
    batches = [
        (torch.randn(T, N, I), None),
        (torch.randn(T, N, I), torch.tensor([2, 1, 6, 3])),  # steps 0..2 have two rows or more
        (torch.randn(2, N, I), None),
    ]
    for x, lengths in batches:
        ends = torch.full((N,), x.size(0)) if lengths is None else lengths
        found = dict(zip(TERMS, used(module, x, lengths=lengths), strict=True))
        for s in range(L):
            if int((ends > s).sum()) < 2:
                continue
            counts[s] += 1
            weight = 1 / float(counts[s]) if momentum is None else momentum
            for name, value in expected.items():
                if stats == "sequence" and "ih" in name and s > 0:
                    continue
                value[s] = (1 - weight) * value[s] + weight * found[name][s]
        with fastrnn.use_backend(backend), torch.no_grad():
            module(x, lengths=lengths)
    assert torch.equal(module.num_batches_tracked_l0, counts)
    assert counts.tolist() == [3, 3, 2, 1]
    for name, value in expected.items():
        got = getattr(module, f"running_{name}_l0")
        assert_close_by_rule(name, got, value, value.float())


def test_gradients_do_not_matter_to_the_statistics() -> None:
    a, x = make(num_layers=2, bidirectional=True), torch.randn(T, N, I)
    b = copy.deepcopy(a)
    a(x)
    with torch.no_grad():
        b(x)
    assert_same_buffers(a, buffers(b))


def test_reverse_direction_counts_its_own_steps() -> None:
    """It is the forward direction on sequences turned round within their lengths."""
    module = make(bidirectional=True)
    lengths = torch.tensor([2, 6, 3, 6])
    x = torch.randn(T, N, I)
    turned = x.clone()
    for n, end in enumerate(lengths.tolist()):
        turned[:end, n] = x[:end, n].flip(0)
    alone = make()
    alone.load_state_dict(
        {k.removesuffix("_reverse"): v for k, v in module.state_dict().items() if "reverse" in k}
    )
    for mode in (True, False):
        module.train(mode), alone.train(mode)
        y, (h, _) = module(x, lengths=lengths)
        z, (h_alone, _) = alone(turned, lengths=lengths)
        assert_same_bits("h_n", h[1:], h_alone)
        for n, end in enumerate(lengths.tolist()):
            assert_same_bits("y", y[:end, n, H:], z[:end, n].flip(0))
        for name, value in alone.named_buffers():
            assert_same_bits(name, getattr(module, name + "_reverse"), value)


@pytest.mark.parametrize("stats", ["step", "sequence"])
def test_eval_does_not_depend_on_the_company(stats: str) -> None:
    """A sequence alone, unpadded, gives what it gives in a batch; nothing is left behind."""
    module = make(bidirectional=True, num_layers=2, input_stats=stats)
    for _ in range(3):
        module(torch.randn(T, N, I))
    module.eval()
    before = buffers(module)
    lengths = torch.tensor([2, 6, 3, 1])
    x = torch.randn(T, N, I)
    y, (h, c) = module(x, lengths=lengths)
    for n, end in enumerate(lengths.tolist()):
        alone, (h_alone, c_alone) = module(x[:end, n])
        assert_same_bits("y", y[:end, n], alone)
        assert_same_bits("h", h[:, n], h_alone)
        assert_same_bits("c", c[:, n], c_alone)
    assert_same_buffers(module, before)


def test_steps_beyond_max_length() -> None:
    """In eval they take the last row; in training their own statistics, which nobody records."""
    module = make(max_length=2)
    long = make(max_length=T)
    module(torch.randn(T, N, I))
    long.load_state_dict(module.state_dict() | {
        k: v[[0, 1, 1, 1, 1, 1]] for k, v in module.named_buffers()
    })  # fmt: skip
    x = torch.randn(T, N, I)
    assert_same_bits("eval", module.eval()(x)[0], long.eval()(x)[0])
    assert_same_bits("train", module.train()(x)[0], long.train()(x)[0])
    for name, value in module.named_buffers():
        assert_same_bits(name, value, dict(long.named_buffers())[name][:2])


@pytest.mark.parametrize("stats", ["step", "sequence"])
def test_a_batch_of_one_takes_the_running_statistics(stats: str) -> None:
    module = make(input_stats=stats)
    before = buffers(module)
    x = torch.randn(T, I)
    trained = module(x)[0]
    assert_same_buffers(module, before)
    assert_same_bits("unbatched", trained, module.eval()(x)[0])
    assert_same_bits("batch of one", trained, module.train()(x.unsqueeze(1))[0].squeeze(1))


def test_layouts_agree() -> None:
    """batch_first, lengths and PackedSequence say the same."""
    first, module = make(batch_first=True, bidirectional=True), make(bidirectional=True)
    first.load_state_dict(module.state_dict())
    packer = copy.deepcopy(module)
    lengths = torch.tensor([2, 6, 3, 6])
    x, h0, c0 = torch.randn(T, N, I), torch.randn(2, N, H), torch.randn(2, N, H)
    y, (h, c), cells = module(x, (h0, c0), lengths=lengths, return_cells=True)
    y1, (h1, c1), cells1 = first(x.transpose(0, 1), (h0, c0), lengths=lengths, return_cells=True)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y2, (h2, c2), cells2 = packer(packed, (h0, c0), return_cells=True)
    for name, a, b in (("y", y, y1), ("cells", cells, cells1)):
        assert_same_bits(name, a, b.transpose(0, 1))
    assert_same_bits("h", h, h1), assert_same_bits("c", c, c1)
    # Sorted by length the rows are summed in another order.
    y2, cells2 = (pad_packed_sequence(part, total_length=T)[0] for part in (y2, cells2))
    for name, a, b in (("y", y, y2), ("cells", cells, cells2), ("h", h, h2), ("c", c, c2)):
        assert_close_by_rule(name, b, a.detach().double(), a)
    assert_same_buffers(first, buffers(module))


def test_learned_initial_states() -> None:
    module = make(num_layers=2, bidirectional=True, learn_init_state=True)
    names = [f"_l{k}{d}" for k in range(2) for d in ("", "_reverse")]
    with torch.no_grad():
        for name in names:
            getattr(module, "h_0" + name).normal_(), getattr(module, "c_0" + name).normal_()
    x = torch.randn(T, N, I)
    states = [
        torch.stack([getattr(module, kind + name) for name in names]).unsqueeze(1).repeat(1, N, 1)
        for kind in ("h_0", "c_0")
    ]
    module.eval()
    assert_same_bits("given", module(x)[0], module(x, tuple(states))[0])
    module.train()(x)[0].square().sum().backward()
    assert all(getattr(module, "c_0" + name).grad.any() for name in names)
    packed = pack_padded_sequence(x, [T] * N)
    y = module.eval()(x)[0]
    assert_same_bits("packed", module(packed)[0].data, y.flatten(0, 1))
    module.batch_first = True
    assert_same_bits("batch_first", module(x.transpose(0, 1))[0].transpose(0, 1), y)


def test_gradient_of_a_state_alone() -> None:
    module = make().requires_grad_(False)
    h = torch.zeros(1, N, H, requires_grad=True)
    module(torch.randn(T, N, I), (h, torch.randn(1, N, H)))[0].sum().backward()
    assert h.grad.any()


def test_noise_on_h_0() -> None:
    module, x = make(h0_noise=0.5), torch.randn(1, 400, I)
    calm = copy.deepcopy(module)
    calm.h0_noise = 0.0
    states = (torch.zeros(1, 400, H), torch.zeros(1, 400, H))
    assert not torch.equal(module(x)[0], module(x)[0])
    assert_same_bits("hx", module(x, states)[0], calm(x, states)[0])
    assert_same_bits("eval", module.eval()(x)[0], calm.load_state_dict(module.state_dict()) and
                     calm.eval()(x)[0])  # fmt: skip
    # The recurrent term of step 0 is W_hh times the noise: its variance is known.
    module.train().reset_running_stats()
    module.momentum = 1.0
    module(x)
    expected = 0.25 * module.weight_hh_l0.detach().square().sum(1)
    ratio = module.running_var_hh_l0[0] / expected
    assert 0.7 < ratio.min() <= ratio.max() < 1.3  # 400 draws: 4 standard deviations


def test_dropout_between_layers() -> None:
    module = make(num_layers=2, dropout=0.5)
    x = torch.randn(T, N, I)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert_same_bits("eval", module(x)[0], module(x)[0])
    torch.manual_seed(1)
    a = copy.deepcopy(module).train()(x)[0]
    torch.manual_seed(1)
    assert_same_bits("seed", a, copy.deepcopy(module).train()(x)[0])
    torch.manual_seed(1)
    module.batch_first = True
    turned = copy.deepcopy(module).train()(x.transpose(0, 1))[0].transpose(0, 1)
    assert_same_bits("batch first", turned, a)


@pytest.mark.parametrize("stats", ["step", "sequence"])
def test_recalibrate(stats: str) -> None:
    """Means over the batches of the batches' statistics, without dropout and noise."""
    module = make(num_layers=2, dropout=0.5, h0_noise=0.3, input_stats=stats)
    batches = [torch.randn(T, N, I), torch.randn(3, N, I)]
    lengths = torch.tensor([3, 1, 2, 6])
    module(batches[0])
    state = torch.random.get_rng_state()
    before = dict(module.__dict__)
    assert module.recalibrate([batches[0], (batches[0], lengths), batches[1]]) is module
    assert torch.equal(torch.random.get_rng_state(), state)
    assert module.__dict__ == before
    assert module.training
    assert module.num_batches_tracked_l0.tolist() == [3, 3, 3, 1]
    found = [used(module, batches[0]), used(module, batches[0], lengths=lengths)]
    found.append(used(module, batches[1]))
    for i, term in enumerate(TERMS):
        want = torch.stack([f[i][:1] for f in found]).mean(0)
        got = getattr(module, f"running_{term}_l0")
        assert_close_by_rule(term, got[:1], want, want.float())
        if got.size(0) > 1:
            assert_close_by_rule(term, got[3], found[0][i][3], found[0][i][3].float())


@pytest.mark.parametrize("stats", ["step", "sequence"])
def test_recalibrate_keeps_the_steps_that_no_batch_reaches(stats: str) -> None:
    module = make(input_stats=stats)
    module(torch.randn(T, N, I))
    before = buffers(module)
    module.recalibrate([torch.randn(2, N, I)])
    for name, was in before.items():
        now = getattr(module, name)
        if now.size(0) > 1:
            assert torch.equal(now[2:], was[2:]), name
        assert not torch.equal(now[:2], was[:2]) or "tracked" in name, name


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"input_stats": "sequence"}], ids=str)
def test_recalibrate_with_one_longest_sequence(options: dict[str, Any]) -> None:
    """Its last steps are normalised by what they had: the layer above takes its statistics there,
    as in a training step."""
    module = make(num_layers=2, gamma_init=1.0, **options)
    for _ in range(3):
        module(3 * torch.randn(T, N, I) + 1)
    trained, x, lengths = copy.deepcopy(module), torch.randn(T, N, I), [2, 4, 1, 2]
    trained.momentum = 1.0
    trained(x, lengths=lengths)
    module.recalibrate([(x, lengths)])
    for name, value in trained.named_buffers():
        if value.is_floating_point():
            assert torch.equal(getattr(module, name), value), name


def test_recalibrate_replaces_what_is_no_number() -> None:
    module = make()
    with torch.no_grad():
        module.running_mean_hh_l0.fill_(torch.nan)
        module.running_var_c_l0.fill_(torch.inf)
    module.recalibrate([torch.randn(T, N, I)])
    assert all(buffer.isfinite().all() for buffer in module.buffers())


def test_means_over_batches_are_taken_in_the_modules_dtype() -> None:
    module = make(momentum=None).double()
    batches = torch.randn(3, T, N, I, dtype=torch.float64)
    found = []
    for batch in batches:
        module(batch)
        found.append(used(module, batch))
    want = torch.stack([f[0] for f in found]).mean(0)
    got = getattr(module, f"running_{TERMS[0]}_l0")
    # The last row serves all later steps.
    torch.testing.assert_close(got[: L - 1], want[: L - 1], rtol=0, atol=1e-12)


def test_recalibrate_that_fails_changes_nothing() -> None:
    module = make()
    module(torch.randn(T, N, I))
    before = buffers(module)
    with pytest.raises(ValueError, match="recalibrate: got no batch of two sequences"):
        module.recalibrate([])
    with pytest.raises(ValueError, match="recalibrate: got no batch of two sequences"):
        module.recalibrate([torch.randn(T, 1, I)])
    with pytest.raises(RuntimeError, match="input_size"):
        module.recalibrate([torch.randn(T, N, I), torch.randn(T, N, I + 1)])
    assert_same_buffers(module, before)


def test_step_is_the_sequence() -> None:
    module = make(num_layers=2, learn_init_state=True)
    for _ in range(2):
        module(torch.randn(T, N, I))
    module.eval()
    x = torch.randn(T, N, I)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, (h, c) = module(x)
            state = None
            for t in range(T):
                y_t, state = module.step(x[t], state)
                assert_same_bits(f"step {t}", y_t, y[t])
            assert_same_bits("h", state.h, h), assert_same_bits("c", state.c, c)
    state = None
    for t in range(T):
        y_t, state = module.step(x[t, 1], state)
        assert_same_bits(f"unbatched {t}", y_t, y[t, 1])


def test_step_in_training_moves_its_own_row() -> None:
    stepped, whole = make(), make()
    whole.load_state_dict(stepped.state_dict())
    x, state = torch.randn(T, N, I), None
    y = whole(x)[0]
    for t in range(T):
        y_t, state = stepped.step(x[t], state)
        assert_same_bits(f"step {t}", y_t, y[t])
    assert_same_buffers(stepped, buffers(whole))


def test_copies() -> None:
    module = make(bidirectional=True, momentum=None, eps=1e-3)
    x = torch.randn(T, N, I)
    module(x)
    module.eval()(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert repr(other) == repr(module)
        assert_same_bits("copy", other(x)[0], module(x)[0])
    fresh = make(bidirectional=True, momentum=None, eps=1e-3).eval()
    fresh(x)
    fresh.load_state_dict(module.state_dict())
    assert_same_bits("state_dict", fresh(x)[0], module(x)[0])


def test_repr() -> None:
    assert repr(make(eps=1e-5)) == "BNLSTM(3, 5, max_length=4)"
    text = repr(fastrnn.BNLSTM(3, 5, 2, max_length=4, momentum=None, input_stats="sequence"))
    assert text == "BNLSTM(3, 5, max_length=4, num_layers=2, momentum=None, input_stats='sequence')"


def test_weights_written_in_place_are_noticed() -> None:
    module, x = make().eval(), torch.randn(T, N, I)
    with torch.no_grad():
        before = module(x)[0]
        module.weight_hh_l0.mul_(2)
        after = module(x)[0]
        assert not torch.equal(before, after)
        with fastrnn.use_backend("reference"):
            same = module(x)[0]
    truth = copy.deepcopy(module).double()(x.double())[0]
    assert_close_by_rule("after", after, truth.detach(), same)


@pytest.mark.parametrize("bias", [True, False])
def test_packed_weights_of_both_directions(bias: bool) -> None:
    module, x = make(num_layers=2, bias=bias, bidirectional=True).eval(), torch.randn(T, N, I)
    expected = module(x)[0].detach()
    with torch.no_grad():
        for _ in range(2):
            assert_same_bits("packed", module(x)[0], expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_explain(training: bool) -> None:
    module, x = make().train(training), torch.randn(T, N, I)
    told = fastrnn.explain(module, x)
    assert told.backend == "cpu"
    assert "all steps in one call" in told.plan
    half = fastrnn.explain(copy.deepcopy(module).bfloat16(), x.bfloat16())
    assert half.plan.startswith("bfloat16 converted to float32 and back, ")
    with fastrnn.use_backend("reference"):
        assert fastrnn.explain(module, x).plan == "a Python loop over the steps"
    with fastrnn.use_backend("torch", strict=False):
        told = fastrnn.explain(module, x)
    assert (told.backend, told.rejected[0]) == (
        "cpu", ("torch", "torch.nn has no batch-normalised LSTM")
    )  # fmt: skip


def test_vmap_over_stacked_modules() -> None:
    modules = [make().eval() for _ in range(3)]
    state = {k: torch.stack([m.state_dict()[k] for m in modules]) for k in modules[0].state_dict()}
    x = torch.randn(T, N, I)
    run = torch.func.vmap(
        lambda s, x: torch.func.functional_call(modules[0], s, (x,))[0], (0, None)
    )
    for got, module in zip(run(state, x), modules, strict=True):
        expected = module(x)[0].detach()
        assert_close_by_rule("vmap", got, expected.double(), expected)
