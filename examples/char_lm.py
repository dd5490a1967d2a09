"""Train a character language model on the source text of Python's own standard library.

    python examples/char_lm.py                                  an LSTM, about two minutes
    python examples/char_lm.py --cell rhn --depth 4 --variational 0.1
    python examples/char_lm.py --cell lstm --recurrent-dropout 0.2 --recurrent-dropout-mode cell
    python examples/char_lm.py --checkpoint lm.pt --iterations 500
    python examples/char_lm.py --checkpoint lm.pt --resume      goes on, as if it had not stopped

Truncated backpropagation through time with the state carried over; perplexity and bits per
character (BPC) per epoch; text sampled with `module.step` on the way.
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _common import (
    OUTPUT,
    add_common,
    check_above_zero,
    check_at_least,
    check_common,
    check_writable,
    need,
    progress,
    set_threads,
)
from torch import Tensor, nn

import fastrnn

CELLS = {"lstm": "LSTM", "gru": "GRU", "rhn": "RHN", "bnlstm": "BNLSTM"}
# Flags that not every cell takes, and the cells that take them.
TAKEN_BY = {
    "recurrent_dropout": ("lstm", "gru"),
    "recurrent_dropout_mode": ("lstm", "gru"),
    "recurrent_dropout_per": ("lstm", "gru"),
    "zoneout": ("lstm", "gru"),
    "weight_dropout": ("lstm", "gru"),
    "variational": ("rhn",),
    "depth": ("rhn",),
}
MODES = {"update": ("lstm", "gru"), "cell": ("lstm",), "state": ("lstm", "gru")}
# What a resumed run may change without becoming another run.
FREE = {"checkpoint", "resume", "iterations", "epochs", "threads", "output", "save_every"}
FREE |= {"sample_at", "sample_length", "temperature", "prime"}


@dataclass
class Corpus:
    """Character numbers of the three parts, and the character of each number."""

    characters: str
    train: Tensor
    valid: Tensor
    test: Tensor
    checksum: int

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.characters.index(character) for character in text])

    def decode(self, numbers: list[int]) -> str:
        return "".join(self.characters[number] for number in numbers)


def read_corpus(size: int) -> Corpus:
    """The first ``size`` ASCII characters of the standard library's modules, split 90/5/5."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes().translate(None, delete=b"\r" + bytes(range(128, 256)))
        if len(text) >= size:
            break
    if not text:
        raise SystemExit(f"{folder} has no *.py files; run a Python whose library is not zipped")
    text = text[:size]
    used = sorted(set(text))
    numbers = torch.zeros(128, dtype=torch.int64)
    numbers[used] = torch.arange(len(used))
    encoded = numbers[torch.frombuffer(text, dtype=torch.uint8).long()]
    twentieth = len(text) // 20
    parts = encoded.split([len(text) - 2 * twentieth, twentieth, twentieth])
    return Corpus(bytes(used).decode(), *parts, checksum=zlib.crc32(text))


def columns(numbers: Tensor, count: int) -> Tensor:
    """(S,) to (S // count, count): column n is the n-th stretch of the text."""
    length = numbers.numel() // count
    return numbers[: length * count].view(count, length).t().contiguous()


def build(options: argparse.Namespace, wide: int) -> nn.Module:
    """The recurrent layer; flags that were not given are left to the module's defaults."""
    extra: dict[str, Any] = {
        name: getattr(options, name)
        for name in TAKEN_BY
        if name != "variational" and getattr(options, name) is not None
    }
    if options.layers > 1:
        extra["dropout"] = options.dropout
    if options.variational is not None:
        extra["variational_input"] = extra["variational_state"] = options.variational
    if options.cell == "bnlstm":
        # Statistics for each step of a chunk. The state is carried over, but a first one is zero.
        extra.update(max_length=options.steps, h0_noise=0.1)
    layer: nn.Module = getattr(fastrnn, CELLS[options.cell])(
        wide, options.hidden, options.layers, **extra
    )
    return layer


class LanguageModel(nn.Module):
    """Embedding, recurrent layers, scores of the next character; dropout between all of them
    (Zaremba et al., arXiv:1409.2329)."""

    def __init__(self, characters: int, options: argparse.Namespace) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, options.embedding)
        self.rnn = build(options, options.embedding)
        self.drop = nn.Dropout(options.dropout)
        self.head = nn.Linear(options.hidden, characters)

    def forward(self, numbers: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """numbers: (T, N). Returns (T, N, V) scores and the state after the last step."""
        output, state = self.rnn(self.drop(self.embed(numbers)), state)
        return self.head(self.drop(output)), state

    def step(self, numbers: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """numbers: (N,). Returns (N, V) scores and the state to pass to the next call."""
        output, state = self.rnn.step(self.drop(self.embed(numbers)), state)
        return self.head(self.drop(output)), state


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per character."""
    return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


def detach(state: Any) -> Any:
    return state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)


@torch.no_grad()
def evaluate(model: LanguageModel, numbers: Tensor, options: argparse.Namespace) -> float:
    """Mean nats per character over a whole part, the state carried through it."""
    model.eval()
    text = columns(numbers, max(1, min(options.batch, numbers.numel() // (options.steps + 1))))
    total, state = 0.0, None
    for begin in range(0, len(text) - 1, options.steps):
        end = min(begin + options.steps, len(text) - 1)
        scores, state = model(text[begin:end], state)
        total += loss_of(scores, text[begin + 1 : end + 1]).item() * (end - begin)
    model.train()
    return total / (len(text) - 1)


@torch.no_grad()
def sample(
    model: LanguageModel, corpus: Corpus, options: argparse.Namespace, iteration: int
) -> str:
    """The prime and what the model makes of it, one `step` per character."""
    model.eval()
    # A generator of its own: sampling leaves the training's random numbers alone.
    generator = torch.Generator().manual_seed(options.seed + iteration)
    state: Any = None
    for number in corpus.encode(options.prime):
        scores, state = model.step(number[None], state)
    drawn: list[int] = []
    for _ in range(options.sample_length):
        chances = (scores[0] / options.temperature).softmax(0)
        number = torch.multinomial(chances, 1, generator=generator)
        drawn.append(int(number))
        scores, state = model.step(number, state)
    model.train()
    return options.prime + corpus.decode(drawn)


@dataclass
class Position:
    """Where a training run is: the next chunk of the stream, and what is carried to it."""

    iteration: int = 0
    epoch: int = 0
    chunk: int = 0
    loss: float = 0.0  # the epoch's chunks so far, summed
    state: Any = None


@dataclass
class Run:
    """What a call leaves behind; losses are in nats per character."""

    losses: list[float] = field(default_factory=list)  # of each iteration made by this call
    train: dict[int, float] = field(default_factory=dict)  # by epoch
    valid: dict[int, float] = field(default_factory=dict)
    samples: dict[int, str] = field(default_factory=dict)  # by iteration
    test: float = math.nan


class Training:
    """A model, its optimiser and its place in the text: what a checkpoint holds."""

    def __init__(self, corpus: Corpus, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.corpus, self.options = corpus, options
        self.model = LanguageModel(len(corpus.characters), options)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr)
        self.text = columns(corpus.train, options.batch)
        self.chunks = (len(self.text) - 1) // options.steps
        self.at = Position()

    def planned(self) -> int:
        """Iterations of the whole run."""
        whole = self.options.epochs * self.chunks
        return whole if self.options.iterations is None else min(whole, self.options.iterations)

    def iterate(self) -> float:
        """One chunk of every column: forward, backward, one step of the optimiser."""
        at, begin = self.at, self.at.chunk * self.options.steps
        end = begin + self.options.steps
        self.optimizer.zero_grad()
        scores, state = self.model(self.text[begin:end], at.state)
        loss = loss_of(scores, self.text[begin + 1 : end + 1])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        at.state = detach(state)
        at.loss += loss.item()
        at.chunk += 1
        at.iteration += 1
        return loss.item()

    def next_epoch(self) -> None:
        self.at = Position(self.at.iteration, self.at.epoch + 1)

    def _settings(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self.options).items() if name not in FREE}
        return {**kept, "text": self.corpus.checksum}

    def save(self) -> None:
        """Writes the checkpoint; the old one stays until the new one is whole."""
        if self.options.checkpoint is None:
            return
        path: Path = self.options.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        content = {
            "settings": self._settings(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "position": asdict(self.at),
        }
        torch.save(content, partial)
        os.replace(partial, path)

    def load(self) -> None:
        """Goes on where the checkpoint was written."""
        try:
            content = torch.load(self.options.checkpoint, weights_only=True)
        except OSError:
            raise
        except Exception:  # torch raises a dozen kinds of them at other files
            content = None
        parts = {"settings", "model", "optimizer", "random", "position"}
        if not (isinstance(content, dict) and parts <= content.keys()):
            raise SystemExit(
                f"{self.options.checkpoint} is no checkpoint of this script; name one that it "
                "wrote, or leave out --resume and name a new file"
            )
        then, now = content["settings"], self._settings()
        other = [f"{name} was {then.get(name)!r}, is {now[name]!r}"
                 for name in now if then.get(name) != now[name]]  # fmt: skip
        if other:
            raise SystemExit(
                f"{self.options.checkpoint} is of another run: {'; '.join(other)}. Resume with "
                "the arguments, and the Python, that it began with"
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"])
        self.at = Position(**content["position"])


def figures(nats: float) -> str:
    perplexity = math.inf if nats > 700 else math.exp(nats)  # which would overflow
    return f"perplexity {perplexity:6.3f}, {nats / math.log(2):.3f} BPC"


def train(training: Training, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Trains to the end, and yields ("loss", ...), ("sample", ...) and ("epoch", ...) as they come.

    Wherever it is stopped and resumed, the sequence of losses is the same.
    """
    corpus, model = training.corpus, training.model
    while training.at.iteration < training.planned():
        yield "loss", training.iterate()
        iteration = training.at.iteration
        if iteration in options.sample_at:
            yield "sample", (iteration, sample(model, corpus, options, iteration))
        if training.at.chunk == training.chunks:
            mean = training.at.loss / training.chunks
            training.next_epoch()
            yield "epoch", (training.at.epoch, mean, evaluate(model, corpus.valid, options))
        if iteration % options.save_every == 0:
            training.save()
    training.save()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    it = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    it.add_argument("--cell", choices=tuple(CELLS), default="lstm")
    it.add_argument("--hidden", type=int, default=256)
    it.add_argument("--embedding", type=int, default=64, help="features of a character")
    it.add_argument("--layers", type=int, default=1)
    it.add_argument("--depth", type=int, help="rhn: micro-steps in a time step")
    it.add_argument("--bytes", type=int, default=2_000_000, help="how much text, at most")
    it.add_argument("--batch", type=int, default=32)
    it.add_argument("--steps", type=int, default=64, help="steps that gradients go back")
    it.add_argument("--epochs", type=int, default=2)
    it.add_argument("--iterations", type=int, help="stop after so many, counted from the start")
    it.add_argument("--lr", type=float, default=3e-3)
    it.add_argument("--clip", type=float, default=1.0, help="largest norm of all gradients")
    add_common(it)
    drop = it.add_argument_group("dropout, all of it off by default")
    drop.add_argument("--dropout", type=float, default=0.0, metavar="P", help="around each layer")
    for flag in ("--recurrent-dropout", "--zoneout", "--weight-dropout"):
        drop.add_argument(flag, type=float, metavar="P", help="lstm, gru")
    drop.add_argument("--recurrent-dropout-mode", choices=tuple(MODES), help="cell: lstm only")
    drop.add_argument("--recurrent-dropout-per", choices=("step", "sequence"))
    drop.add_argument("--variational", type=float, metavar="P", help="rhn: on input and state")
    text = it.add_argument_group("sampled text")
    text.add_argument("--sample-at", type=int, nargs="*", default=[100, 300, 700, 2000])
    text.add_argument("--sample-length", type=int, default=300)
    text.add_argument("--temperature", type=float, default=0.7)
    text.add_argument("--prime", default="def ", help="what a sample begins with")
    file = it.add_argument_group("files")
    file.add_argument("--checkpoint", type=Path, help="written at the end and every --save-every")
    file.add_argument("--save-every", type=int, default=500, help="iterations")
    file.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    file.add_argument("--output", type=Path, help="transcript; default: output/char_lm_CELL.txt")
    options = it.parse_args(arguments)
    check(it, options)
    return options


def check(it: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with what is wrong, what was expected and the way out."""
    names = ("hidden", "embedding", "layers", "bytes", "batch", "steps", "epochs", "iterations")
    check_at_least(it, options, 1, *names, "depth", "save_every", "sample_length")
    check_above_zero(it, options, "lr", "clip", "temperature")
    check_common(it, options)
    for name in ("dropout", "recurrent_dropout", "zoneout", "weight_dropout", "variational"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1:
            flag = "--" + name.replace("_", "-")
            it.error(f"{flag} is {value}; expected a probability, 0 <= p < 1")
    for name, cells in TAKEN_BY.items():
        if getattr(options, name) is not None and options.cell not in cells:
            flag = "--" + name.replace("_", "-")
            it.error(f"{flag} is not for --cell {options.cell}; it is for {', '.join(cells)}")
    mode = options.recurrent_dropout_mode
    if mode is not None and options.cell not in MODES[mode]:
        it.error(
            f"--recurrent-dropout-mode {mode} is not for --cell {options.cell}; "
            f"it is for {', '.join(MODES[mode])}"
        )
    for name in ("recurrent_dropout_mode", "recurrent_dropout_per"):
        if getattr(options, name) is not None and options.recurrent_dropout is None:
            it.error(f"--{name.replace('_', '-')} does nothing without --recurrent-dropout P")
    if not options.prime:
        it.error("--prime is empty; expected at least one character")
    path = options.checkpoint
    if options.resume and path is None:
        it.error("--resume needs --checkpoint FILE")
    if options.resume and not path.is_file():
        it.error(f"--checkpoint {path} does not exist; leave out --resume to begin it")
    if not options.resume and path is not None and path.exists():
        it.error(f"--checkpoint {path} exists; give --resume to go on, or remove it")
    if path is not None:
        check_writable(it, "--checkpoint", path)
    if options.output is None:
        options.output = OUTPUT / f"char_lm_{options.cell}.txt"
    check_writable(it, "--output", options.output)


def check_text(corpus: Corpus, options: argparse.Namespace) -> None:
    """What can be said only after the text is read."""
    needed = options.batch * (options.steps + 1)
    if corpus.train.numel() < needed or corpus.valid.numel() < 2:
        raise SystemExit(
            f"{corpus.train.numel()} characters to train on, {corpus.valid.numel()} to validate; "
            f"expected at least batch * (steps + 1) = {needed} and 2: raise --bytes, or lower "
            "--batch or --steps"
        )
    unknown = sorted(set(options.prime) - set(corpus.characters))
    if unknown:
        raise SystemExit(f"--prime has {unknown}, which the text has not; leave them out")


def main(arguments: list[str] | None = None) -> Run:
    options = parse(arguments)
    need("tqdm")
    set_threads(options)
    corpus = read_corpus(options.bytes)
    check_text(corpus, options)
    training, run = Training(corpus, options), Run()
    if options.resume:
        training.load()
    total, done = training.planned(), training.at.iteration
    with (
        options.output.open("a" if options.resume else "w") as transcript,
        progress(total, options.cell, done) as bar,
    ):

        def say(text: str) -> None:
            bar.write(text)
            print(text, file=transcript, flush=True)

        rnn = training.model.rnn
        example = torch.zeros(options.steps, options.batch, options.embedding)
        say(f"{rnn}: {sum(p.numel() for p in training.model.parameters()):,} parameters in all")
        say(f"text: {', '.join(f'{len(p):,}' for p in (corpus.train, corpus.valid, corpus.test))} "
            f"characters of {len(corpus.characters)} kinds")  # fmt: skip
        say(f"runs on: {fastrnn.explain(rnn, example)}")
        for kind, what in train(training, options):
            if kind == "loss":
                run.losses.append(what)
                bar.update()
                bar.set_postfix(loss=f"{what:.3f}", refresh=False)
            elif kind == "sample":
                iteration, text = what
                run.samples[iteration] = text
                say(f"--- iteration {iteration}, temperature {options.temperature} ---\n{text}\n")
            else:
                epoch, run.train[what[0]], run.valid[what[0]] = what
                say(f"epoch {epoch}: train {figures(run.train[epoch])} (while it learns); "
                    f"validation {figures(run.valid[epoch])}")  # fmt: skip
        run.test = evaluate(training.model, corpus.test, options)
        say(f"iteration {training.at.iteration}: test {figures(run.test)}")
    print(f"transcript: {options.output}")
    return run


if __name__ == "__main__":
    main()
