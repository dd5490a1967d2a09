"""Public models with their recurrent layers swapped for fastrnn's: the same numbers, end to end.

    python -m benchmarks.models                  # verify each, then time inference and training
    python -m benchmarks.models --verify-only --small
    python -m benchmarks.models --only tacotron2

The models come from pip (`pip install fastrnn[models]`); those that are not installed are named
and left out. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from benchmarks.arguments import check_out
from benchmarks.schema import SCHEMA, cpu_name, environment
from benchmarks.timing import LocalRunner, Timing, measure

Call = Callable[[nn.Module], Sequence[Tensor]]


@dataclass(frozen=True)
class Model:
    """One model.

    package: what has to be installed. what: for the table.
    build: small or real size -> the model with torch.nn's layers, and a call that returns its
      outputs from a fixed input, in the dtype of the model's parameters.
    swap: replaces the recurrent layers in place.
    """

    name: str
    package: str
    what: str
    build: Callable[[bool], tuple[nn.Module, Call]]
    swap: Callable[[nn.Module], nn.Module] = fastrnn.replace


def load(package: str) -> Any:
    """Import a package.

    torchaudio's wheel on PyPI wants the libraries of a torch with CUDA. Its models are Python, so
    where those are absent it is imported without its compiled part, as its wheels for pex are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if package in ("torchaudio", "openunmix"):
            try:
                importlib.import_module("torchaudio")
            except OSError:
                for name in [n for n in sys.modules if n.split(".")[0] == "torchaudio"]:
                    del sys.modules[name]
                stub = types.ModuleType("torchaudio._extension")
                vars(stub).update(_IS_TORCHAUDIO_EXT_AVAILABLE=False, fail_if_no_align=_same)
                sys.modules["torchaudio._extension"] = stub
        return importlib.import_module(package)


def _same(function: Any) -> Any:
    return function


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _tacotron2(small: bool) -> tuple[nn.Module, Call]:
    """An encoder of two directions over packed text, and a decoder of two cells."""
    tacotron2 = load("torchaudio.models").Tacotron2
    if small:
        model = tacotron2(
            n_mels=5, n_symbol=12, symbol_embedding_dim=8, encoder_embedding_dim=8,
            decoder_rnn_dim=9, attention_rnn_dim=7, attention_hidden_dim=6,
            attention_location_n_filter=3, attention_location_kernel_size=3, prenet_dim=6,
            postnet_embedding_dim=8,
        )  # fmt: skip
        rows, letters, frames, mels, symbols = 3, 7, 6, 5, 12
    else:
        model = tacotron2()
        rows, letters, frames, mels, symbols = 8, 80, 100, 80, 148
    tokens = torch.randint(1, symbols, (rows, letters))
    lengths = torch.linspace(letters, letters // 2, rows).long()
    mel, mel_lengths = torch.randn(rows, mels, frames), torch.full((rows,), frames)

    def call(model: nn.Module) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = model(tokens, lengths, mel.to(_dtype(model)), mel_lengths)
        return outputs

    return model, call


def _wavernn(small: bool) -> tuple[nn.Module, Call]:
    """Two GRUs over the samples of a waveform, batch first."""
    wavernn = load("torchaudio.models").WaveRNN
    if small:
        model = wavernn([2, 2], 4, 4, 1, 8, 8, kernel_size=3, n_freq=6, n_hidden=8, n_output=8)
        rows, frames, hop, freq = 2, 5, 4, 6
    else:
        model, (rows, frames, hop, freq) = wavernn([5, 5, 8], 512, 200), (16, 9, 200, 128)
    wave = torch.randn(rows, 1, (frames - model.kernel_size + 1) * hop)
    spectrum = torch.randn(rows, 1, freq, frames)
    return model, lambda model: [model(wave.to(_dtype(model)), spectrum.to(_dtype(model)))]


def _dprnn(small: bool) -> tuple[nn.Module, Call]:
    """Short sequences of two directions along and across chunks, in turn (TorchAudio-Squim)."""
    dprnn = load("torchaudio.models.squim.objective").DPRNN
    model = dprnn(6, 7, 1, "GRU", 8, 4, 2) if small else dprnn()
    x = torch.randn(2, 6, 21) if small else torch.randn(2, 64, 4000)
    return model, lambda model: [model(x.to(_dtype(model)))]


def _rnnt(small: bool) -> tuple[nn.Module, Call]:
    """An Emformer transducer; its prediction network has LSTM layers of its own class."""
    models = load("torchaudio.models")
    if small:
        model = models.rnnt.emformer_rnnt_model(
            input_dim=5, encoding_dim=6, num_symbols=9, segment_length=4, right_context_length=1,
            time_reduction_input_dim=4, time_reduction_stride=2, transformer_num_heads=2,
            transformer_ffn_dim=8, transformer_num_layers=1, transformer_dropout=0.1,
            transformer_activation="gelu", transformer_left_context_length=3,
            transformer_max_memory_size=0,
            transformer_weight_init_scale_strategy="depthwise", transformer_tanh_on_mem=True,
            symbol_embedding_dim=6, num_lstm_layers=2, lstm_layer_norm=False,
            lstm_layer_norm_epsilon=1e-3, lstm_dropout=0.3,
        )  # fmt: skip
        rows, words, symbols = 3, 7, 9
    else:
        model = models.rnnt.emformer_rnnt_base(num_symbols=4097)
        model.predictor.lstm_layers = nn.ModuleList(
            [models.rnnt._CustomLSTM(512, 512) for _ in model.predictor.lstm_layers]
        )
        rows, words, symbols = 16, 100, 4097
    predictor = model.predictor
    tokens, lengths = torch.randint(0, symbols, (rows, words)), torch.full((rows,), words)
    states = [
        [torch.randn(rows, layer.hidden_dim) for _ in "hc"] for layer in predictor.lstm_layers
    ]

    def call(model: nn.Module) -> Sequence[Tensor]:
        given = [[state.to(_dtype(model)) for state in pair] for pair in states]
        output, _, new = model(tokens, lengths, given)
        return [output, *(state for pair in new for state in pair)]

    return predictor, call


class FusedPredictorLayer(nn.Module):
    """torchaudio's own LSTM layer without layer norm, its parameters under their names."""

    def __init__(self, custom: Any) -> None:
        super().__init__()
        self.x2g, self.p2g = custom.x2g, custom.p2g
        zeros = torch.zeros_like(custom.x2g.bias)
        self.register_buffer("b_hh", zeros, persistent=False)

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, list[Tensor]]:
        hx = None if state is None else (state[0].unsqueeze(0), state[1].unsqueeze(0))
        weights = [self.x2g.weight, self.p2g.weight, self.x2g.bias, self.b_hh]
        output, h, c = fastrnn.functional.lstm(input, hx, weights)
        return output, [h.squeeze(0), c.squeeze(0)]


def _fuse_predictor(model: nn.Module) -> nn.Module:
    layers: Any = model.lstm_layers
    model.lstm_layers = nn.ModuleList([FusedPredictorLayer(layer) for layer in layers])
    return model


def _openunmix(small: bool) -> tuple[nn.Module, Call]:
    """Three layers of two directions with dropout between them, over spectrogram frames."""
    load("openunmix")
    unmix = load("openunmix.model").OpenUnmix
    if small:
        model, x = unmix(nb_bins=9, nb_channels=2, hidden_size=12, nb_layers=2), (3, 2, 9, 6)
    else:
        model, x = unmix(nb_bins=2049, hidden_size=512, max_bin=1487), (4, 2, 2049, 255)
    spectrum = torch.rand(x)
    return model, lambda model: [model(spectrum.to(_dtype(model)))]


def _recurrent_ppo(small: bool) -> tuple[nn.Module, Call]:
    """The policy of RecurrentPPO: an actor and a critic, episodes starting inside a sequence."""
    load("sb3_contrib")
    policies = load("sb3_contrib.common.recurrent.policies")
    states_type = load("sb3_contrib.common.recurrent.type_aliases").RNNStates
    layers = load("stable_baselines3.common.torch_layers")
    spaces = load("gymnasium.spaces")

    class Features(layers.FlattenExtractor):  # type: ignore[misc, name-defined]
        """Its own casts every observation to float32; this one goes with the policy."""

        def __init__(self, space: Any) -> None:
            super().__init__(space)
            self.register_buffer("like", torch.zeros(()), persistent=False)

        def forward(self, observations: Tensor) -> Tensor:
            features: Tensor = super().forward(observations)
            return features.to(self.like.dtype)

    rows, steps, hidden, width = (3, 5, 8, 4) if small else (8, 128, 256, 24)
    policy = policies.RecurrentActorCriticPolicy(
        spaces.Box(-1, 1, (width,)), spaces.Discrete(3), lambda _: 1e-3, lstm_hidden_size=hidden,
        features_extractor_class=Features,
    )  # fmt: skip
    observations = torch.rand(rows * steps, width)
    actions = torch.randint(0, 3, (rows * steps,))
    starts = torch.zeros(rows, steps)
    starts[0, steps // 2] = 1
    whole = torch.zeros(rows * steps)
    states = torch.randn(4, 1, rows, hidden)

    def call(policy: nn.Module) -> Sequence[Tensor]:
        h, c, hv, cv = states.to(_dtype(policy)).unbind()
        given = states_type((h, c), (hv, cv))
        # Once with an episode's start inside, where it steps; once as one sequence.
        found: list[Tensor] = []
        for episode_starts in (starts.flatten(), whole):
            found += policy.evaluate_actions(  # type: ignore[operator]
                observations, actions, given, episode_starts.to(_dtype(policy))
            )
        return found

    return policy, call


MODELS = (
    Model(
        "tacotron2",
        "torchaudio",
        "text to speech: LSTM over text, cells in the decoder",
        _tacotron2,
    ),
    Model("wavernn", "torchaudio", "vocoder: two GRUs over samples", _wavernn),
    Model("dprnn", "torchaudio", "speech quality: LSTMs along and across chunks", _dprnn),
    Model(
        "rnnt-predictor",
        "torchaudio",
        "transducer: LSTM layers of its own class",
        _rnnt,
        _fuse_predictor,
    ),
    Model("open-unmix", "openunmix", "music separation: LSTMs of two directions", _openunmix),
    Model(
        "recurrent-ppo",
        "sb3_contrib",
        "reinforcement learning: actor and critic LSTM",
        _recurrent_ppo,
    ),
)


def missing(model: Model) -> str:
    """Why a model cannot be built here, or ""."""
    try:
        load(model.package)
    except ImportError as error:
        return f"{model.package} is not installed ({error}); pip install fastrnn[models]"
    return ""


def outputs_and_gradients(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """Outputs, loss and the gradients of all parameters, from one seed: dropout is alike."""
    torch.manual_seed(11)
    model.zero_grad()
    outputs = [output for output in call(model) if output.is_floating_point()]
    loss = torch.stack([output.square().mean() for output in outputs]).sum()
    loss.backward()
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    found["loss"] = loss.detach()
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return {**found, **{n: g for n, g in gradients.items() if g is not None}}


def inference(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """Outputs of a second call without gradients: it may take a way of its own, which is timed."""
    with torch.no_grad():
        call(model)
        torch.manual_seed(11)
        outputs = [output for output in call(model) if output.is_floating_point()]
    return {f"inference output {i}": output for i, output in enumerate(outputs)}


def three(model: Model, small: bool) -> tuple[nn.Module, nn.Module, nn.Module, Call]:
    """The model in float64, with torch.nn's layers, and with ours; and its call."""
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, call = model.build(small)
    wide = copy.deepcopy(plain).double()
    return wide, plain, model.swap(copy.deepcopy(plain)), call


def three_results(model: Model, small: bool, training: bool) -> list[dict[str, Tensor]]:
    """What `outputs_and_gradients` gives of each of the `three`, in evaluation `inference` too."""
    *models, call = three(model, small)
    found = [outputs_and_gradients(each.train(training), call) for each in models]
    if not training:
        found = [{**f, **inference(m, call)} for f, m in zip(found, models, strict=True)]
    return found


def verify(model: Model, small: bool) -> str:
    """ "", or the worst tensor beyond the tests' rule, in training and in evaluation."""
    from benchmarks.verify import error, rule

    for training in (True, False):
        wide, plain, ours = three_results(model, small, training)
        if not wide.keys() == plain.keys() == ours.keys():
            return "other tensors have gradients"
        for name, truth in wide.items():
            allowed = rule().allowed_error(truth, plain[name], plain[name].dtype)
            off = error(ours[name], truth) / allowed
            if not off <= 1:
                return f"{name} is off by {off:.3g} times what the rule allows"
    return ""


def _time(
    plain: nn.Module, ours: nn.Module, call: Call, training: bool, seconds: float
) -> dict[str, Timing]:
    def runner(model: nn.Module) -> LocalRunner:
        model.train(training)
        if training:
            return LocalRunner(lambda: outputs_and_gradients(model, call))
        return LocalRunner(lambda: call(model), torch.no_grad)

    return measure({"torch": runner(plain), "fastrnn": runner(ours)}, budget=seconds)


def _columns(timings: dict[str, Timing]) -> str:
    old, new = timings["torch"].median, timings["fastrnn"].median
    mark = " disturbed" if any(timing.disturbed for timing in timings.values()) else ""
    return f"{old * 1e3:.1f} ms | {new * 1e3:.1f} ms | {old / new:.2f}{mark}"


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if a check was red or no model could be built."""
    it = argparse.ArgumentParser("python -m benchmarks.models", description=__doc__)
    names = [model.name for model in MODELS]
    it.add_argument("--only", choices=names, help="one model")
    it.add_argument("--small", action="store_true", help="the sizes of the tests")
    it.add_argument("--verify-only", action="store_true", help="compare, time nothing")
    it.add_argument("--seconds", type=float, default=10.0, help="of timing for each line")
    it.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    it.add_argument("--out", type=Path, help="a JSON file for the times")
    options = it.parse_args(arguments)
    if options.threads < 1:
        it.error(f"--threads is {options.threads}; expected at least 1")
    if not options.seconds > 0:
        it.error(f"--seconds is {options.seconds}; expected a number above 0")
    check_out(it, options.out)
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    print(f"{cpu_name()}, {options.threads} threads, torch {torch.__version__}\n")
    print("| model | | mode | torch.nn | fastrnn | times faster |\n|---|---|---|---|---|---|")
    green = red = 0
    for model in MODELS:
        if options.only not in (None, model.name):
            continue
        reason = missing(model)
        if reason:
            print(f"{model.name}: left out: {reason}", file=sys.stderr)
            continue
        reason = verify(model, options.small)
        if reason:
            print(f"{model.name}: RED: {reason}", file=sys.stderr)
            red += 1
            continue
        green += 1
        _, plain, ours, call = three(model, options.small)
        for training in (False, True):
            mode = "training step" if training else "inference"
            if options.verify_only:
                print(f"| {model.name} | {model.what} | {mode} | verified | verified | |")
            else:
                timings = _time(plain, ours, call, training, options.seconds)
                print(f"| {model.name} | {model.what} | {mode} | {_columns(timings)} |", flush=True)
                named = {name: asdict(timing) for name, timing in timings.items()}
                found.append({"model": model.name, "mode": mode, "timings": named})
    if options.out is not None:
        at = environment(options.threads)
        written = {"schema": SCHEMA, "kind": "models", "environment": at, "models": found}
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    return 0 if green and not red else 1


if __name__ == "__main__":
    sys.exit(main())
