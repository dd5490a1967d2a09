"""Classify handwritten digits read one pixel at a time, with torch.nn and with fastrnn.

The same script trains twice: once with `torch.nn.LSTM`, once with `fastrnn.LSTM`, from the same
seed, on the same batches. The loss curves coincide; only the time differs.

    python examples/sequential_digits.py                      both libraries, LSTM
    python examples/sequential_digits.py --cell gru --epochs 10
    python examples/sequential_digits.py --library fastrnn    one of them

Data: scikit-learn's bundled digits (1797 images of 8 x 8), 64 steps of one pixel each.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import fastrnn

LIBRARIES: dict[str, ModuleType] = {"torch.nn": nn, "fastrnn": fastrnn}
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
FIGURE = Path(__file__).parent / "output" / "sequential_digits.png"


class Classifier(nn.Module):
    """A recurrent layer over the pixels, a linear layer on its final state."""

    def __init__(self, library: ModuleType, cell: str, hidden: int) -> None:
        super().__init__()
        self.rnn = getattr(library, CELLS[cell])(1, hidden)  # the only library-specific line
        # torch scales every weight by 1 / sqrt(hidden); the weights of a single pixel need more.
        nn.init.uniform_(self.rnn.weight_ih_l0, -0.5, 0.5)
        if cell == "lstm":
            with torch.no_grad():
                self.rnn.bias_hh_l0[hidden : 2 * hidden] += 1.0  # forget gates start open
        self.head = nn.Linear(hidden, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (T, N, 1). Returns (N, 10) scores."""
        _, state = self.rnn(pixels)
        h_n = state[0] if isinstance(state, tuple) else state
        return self.head(h_n[-1])


@dataclass
class Run:
    """What a training run leaves behind: a loss per step, test accuracy per epoch, seconds."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Data:
    """Sequences (T, N, 1) of standardised pixels and labels (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load() -> Data:
    """The digits, a fifth of them kept for testing."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=0.2, random_state=0, stratify=labels)
    mean, deviation = parts[0].mean(), parts[0].std()
    scaled = [torch.tensor((part - mean) / deviation).float() for part in parts[:2]]
    train_x, test_x = (part.t()[:, :, None] for part in scaled)
    train_y, test_y = (torch.tensor(part) for part in parts[2:])
    return Data(train_x.contiguous(), train_y, test_x.contiguous(), test_y)


def train(library: str, data: Data, options: argparse.Namespace) -> Run:
    """Trains one model; evaluation is not part of the measured time."""
    torch.manual_seed(options.seed)
    model = Classifier(LIBRARIES[library], options.cell, options.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, eps=1e-5)
    criterion = nn.CrossEntropyLoss()
    count = data.train_y.numel()
    steps = options.epochs * -(-count // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
    order = torch.Generator().manual_seed(options.seed)
    criterion(model(data.train_x[:, : options.batch]), data.train_y[: options.batch]).backward()
    run = Run()
    with tqdm(total=steps, desc=f"{library:>8}", file=sys.stderr) as bar:
        for _ in range(options.epochs):
            begin = time.perf_counter()
            model.train()
            for index in torch.randperm(count, generator=order).split(options.batch):
                optimizer.zero_grad()
                loss = criterion(model(data.train_x[:, index]), data.train_y[index])
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                run.losses.append(loss.item())
                bar.update()
            run.seconds += time.perf_counter() - begin
            run.accuracies.append(accuracy(model, data))
            bar.set_postfix(loss=f"{run.losses[-1]:.3f}", accuracy=f"{run.accuracies[-1]:.1%}")
    return run


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    return float((model(data.test_x).argmax(1) == data.test_y).float().mean())


def report(runs: dict[str, Run], options: argparse.Namespace) -> str:
    """Time and accuracy of each run, and how far apart the loss curves are."""
    steps = len(next(iter(runs.values())).losses)
    title = f"{CELLS[options.cell]}, H={options.hidden}, T=64, N={options.batch}: {steps} steps"
    lines = [f"{title} on {torch.get_num_threads()} threads"]
    for name, run in runs.items():
        lines.append(
            f"  {name:>8}: {run.seconds:6.1f} s, {run.seconds / steps * 1e3:6.2f} ms per step, "
            f"final loss {run.losses[-1]:.4f}, test accuracy {run.accuracies[-1]:.1%}"
        )
    if len(runs) == 2:
        ours, theirs = runs["fastrnn"], runs["torch.nn"]
        apart = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
        lines.append(
            f"  fastrnn trains {theirs.seconds / ours.seconds:.2f}x as fast; "
            f"the loss curves differ by at most {apart:.1e}"
        )
    return "\n".join(lines)


def draw(runs: dict[str, Run], options: argparse.Namespace) -> Path:
    """Loss over steps (the curves lie on each other) and over seconds (they do not)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    styles = {"torch.nn": {"color": "#d95f02", "linewidth": 3.0}, "fastrnn": {"color": "#1f77b4"}}
    for name, run in runs.items():
        steps = range(1, len(run.losses) + 1)
        by_step.plot(steps, run.losses, label=name, **styles[name])
        times = [run.seconds * step / len(run.losses) for step in steps]
        by_time.plot(times, run.losses, label=f"{name}, {run.seconds:.1f} s", **styles[name])
    for axes, label in ((by_step, "training step"), (by_time, "seconds")):
        axes.set_xlabel(label)
        axes.set_ylabel("training loss")
        axes.legend(frameon=False)
    figure.suptitle(
        f"{CELLS[options.cell]}, digits pixel by pixel, H={options.hidden}", fontsize=10
    )
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=120)
    plt.close(figure)
    return options.plot


def parse(arguments: list[str] | None) -> argparse.Namespace:
    it = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    it.add_argument("--library", choices=("both", *LIBRARIES), default="both")
    it.add_argument("--cell", choices=tuple(CELLS), default="lstm")
    it.add_argument("--hidden", type=int, default=64)
    it.add_argument("--epochs", type=int, default=16)
    it.add_argument("--batch", type=int, default=128)
    it.add_argument("--lr", type=float, default=2e-3)
    it.add_argument("--seed", type=int, default=0)
    it.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    it.add_argument("--plot", type=Path, default=FIGURE, help=f"default: {FIGURE.name} in output/")
    options = it.parse_args(arguments)
    for name in ("hidden", "epochs", "batch"):
        if getattr(options, name) < 1:
            it.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = load()
    names = LIBRARIES if options.library == "both" else (options.library,)
    runs = {name: train(name, data, options) for name in names}
    print(report(runs, options))
    print(f"  plot: {draw(runs, options)}")
    return runs


if __name__ == "__main__":
    main()
