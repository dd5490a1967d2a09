"""Classify handwritten digits read one pixel at a time, with torch.nn and with fastrnn.

The same script trains twice: once with `torch.nn.LSTM`, once with `fastrnn.LSTM`, from the same
seed, on the same batches. The loss curves coincide; only the time differs.

    python examples/sequential_digits.py                      both libraries, LSTM
    python examples/sequential_digits.py --cell gru --epochs 10
    python examples/sequential_digits.py --library fastrnn    one of them

torch.nn has no RHN and no BNLSTM: `--cell rhn` and `--cell bnlstm` train fastrnn's alone.
`--compare` trains several of fastrnn's cells, from the same seed and on the same batches:

    python examples/sequential_digits.py --compare lstm rhn bnlstm
    python examples/sequential_digits.py --compare lstm bnlstm --permuted --hidden 100

`--permuted` reads the pixels in a fixed random order, which puts neighbours far apart in time: the
task on which Cooijmans et al., arXiv:1603.09025, show that batch normalisation learns faster.

Data: scikit-learn's bundled digits (1797 images of 8 x 8), 64 steps of one pixel each.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
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

LIBRARIES: dict[str, ModuleType] = {"torch.nn": nn, "fastrnn": fastrnn}
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "rhn": "RHN", "bnlstm": "BNLSTM"}
SHARED = ("lstm", "gru", "rnn")  # with torch.nn
PIXELS = 64
FIGURE = OUTPUT / "sequential_digits.png"


class Classifier(nn.Module):
    """A recurrent layer over the pixels, a linear layer on its final state."""

    def __init__(self, library: ModuleType, cell: str, hidden: int) -> None:
        super().__init__()
        extra: dict[str, Any] = {}
        if cell == "bnlstm":
            # One scale for all pixels: those of the corners have no variance of their own. Equal
            # first states have none either, hence the noise.
            extra = {"max_length": PIXELS, "input_stats": "sequence", "h0_noise": 0.1}
        self.rnn = getattr(library, CELLS[cell])(1, hidden, **extra)  # the library's only line
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


def load(permuted: bool = False) -> Data:
    """The digits, a fifth of them kept for testing; their pixels row by row or shuffled."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    if permuted:
        order = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(0))
        pixels = pixels[:, order.numpy()]
    parts = train_test_split(pixels, labels, test_size=0.2, random_state=0, stratify=labels)
    mean, deviation = parts[0].mean(), parts[0].std()
    scaled = [torch.tensor((part - mean) / deviation).float() for part in parts[:2]]
    train_x, test_x = (part.t()[:, :, None] for part in scaled)
    train_y, test_y = (torch.tensor(part) for part in parts[2:])
    return Data(train_x.contiguous(), train_y, test_x.contiguous(), test_y)


def train(library: str, cell: str, data: Data, options: argparse.Namespace) -> Run:
    """Trains one model; evaluation is not part of the measured time."""
    torch.manual_seed(options.seed)
    model = Classifier(LIBRARIES[library], cell, options.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, eps=1e-5)
    criterion = nn.CrossEntropyLoss()
    count = data.train_y.numel()
    steps = options.epochs * -(-count // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
    order = torch.Generator().manual_seed(options.seed)
    criterion(model(data.train_x[:, : options.batch]), data.train_y[: options.batch]).backward()
    run = Run()
    with progress(steps, cell if options.compare else library) as bar:
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
    """Time and accuracy of each run; how far apart the loss curves of the libraries are."""
    steps = len(next(iter(runs.values())).losses)
    lines = [
        f"{title(options)}, T={PIXELS}, N={options.batch}: {steps} steps "
        f"on {torch.get_num_threads()} threads"
    ]
    for name, run in runs.items():
        line = (
            f"  {name:>8}: {run.seconds:6.1f} s, {run.seconds / steps * 1e3:6.2f} ms per step, "
            f"final loss {run.losses[-1]:.4f}, test accuracy {run.accuracies[-1]:.1%}"
        )
        if options.compare:
            goals = (f"{goal:.0%} in epoch {first_at(goal, run)}" for goal in (0.5, 0.9))
            line += f" ({', '.join(goals)})"
        lines.append(line)
    if set(runs) == set(LIBRARIES):
        ours, theirs = runs["fastrnn"], runs["torch.nn"]
        apart = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
        lines.append(
            f"  fastrnn trains {theirs.seconds / ours.seconds:.2f}x as fast; "
            f"the loss curves differ by at most {apart:.1e}"
        )
    return "\n".join(lines)


def title(options: argparse.Namespace) -> str:
    cells = ", ".join(CELLS[cell] for cell in options.compare or [options.cell])
    return f"{cells}, H={options.hidden}" + (", pixels permuted" if options.permuted else "")


def first_at(goal: float, run: Run) -> str:
    """The first epoch after which the test accuracy is ``goal`` or more."""
    reached = (epoch for epoch, value in enumerate(run.accuracies, 1) if value >= goal)
    return str(next(reached, "-"))


def draw(runs: dict[str, Run], options: argparse.Namespace) -> Path:
    """Writes the figure: of libraries by step and by second, of cells by epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    (draw_cells if options.compare else draw_libraries)(runs, *axes)
    for panel in axes:
        panel.legend(frameon=False)
    figure.suptitle(f"Digits pixel by pixel: {title(options)}", fontsize=10)
    figure.savefig(options.plot, dpi=120)
    plt.close(figure)
    return options.plot


def draw_libraries(runs: dict[str, Run], by_step: Any, by_time: Any) -> None:
    """Loss over steps (the curves lie on each other) and over seconds (they do not)."""
    styles = {"torch.nn": {"color": "#d95f02", "linewidth": 3.0}, "fastrnn": {"color": "#1f77b4"}}
    for name, run in runs.items():
        steps = range(1, len(run.losses) + 1)
        by_step.plot(steps, run.losses, label=name, **styles[name])
        times = [run.seconds * step / len(run.losses) for step in steps]
        by_time.plot(times, run.losses, label=f"{name}, {run.seconds:.1f} s", **styles[name])
    for axes, label in ((by_step, "training step"), (by_time, "seconds")):
        axes.set_xlabel(label)
        axes.set_ylabel("training loss")


def draw_cells(runs: dict[str, Run], loss: Any, accuracy: Any) -> None:
    """Mean training loss and test accuracy of each epoch."""
    for name, run in runs.items():
        epochs = range(1, len(run.accuracies) + 1)
        each = torch.tensor(run.losses).view(len(epochs), -1).mean(1)
        loss.plot(epochs, each.tolist(), label=CELLS[name], marker=".")
        accuracy.plot(epochs, run.accuracies, label=CELLS[name], marker=".")
    loss.set_ylabel("training loss")
    accuracy.set_ylabel("test accuracy")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    it = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    it.add_argument("--library", choices=("both", *LIBRARIES), help="default: all that have it")
    it.add_argument("--cell", choices=tuple(CELLS), help="default: lstm")
    it.add_argument("--compare", choices=tuple(CELLS), nargs="+", help="cells of fastrnn")
    it.add_argument("--permuted", action="store_true", help="pixels in a fixed random order")
    it.add_argument("--hidden", type=int, default=64)
    it.add_argument("--epochs", type=int, default=16)
    it.add_argument("--batch", type=int, default=128)
    it.add_argument("--lr", type=float, default=2e-3)
    it.add_argument("--plot", type=Path, default=FIGURE, help=f"default: {FIGURE.name} in output/")
    add_common(it)
    options = it.parse_args(arguments)
    check_at_least(it, options, 1, "hidden", "epochs", "batch")
    check_above_zero(it, options, "lr")
    check_common(it, options)
    if options.compare and options.cell:
        it.error(f"--cell {options.cell} with --compare; add it to those that --compare names")
    options.cell = options.cell or "lstm"
    if options.compare and options.library in ("both", "torch.nn"):
        it.error(f"--library {options.library} with --compare; expected fastrnn, whose cells it is")
    for cell in options.compare or ():
        if options.compare.count(cell) > 1:
            it.error(f"--compare names {cell} twice; expected each cell once")
    if options.library in ("both", "torch.nn") and options.cell not in SHARED:
        it.error(
            f"--library {options.library} has no {CELLS[options.cell]}; "
            f"expected --library fastrnn, or --cell {', '.join(SHARED)}"
        )
    check_writable(it, "--plot", options.plot)
    need("tqdm", "sklearn", "matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if options.plot.suffix[1:].lower() not in kinds:
        it.error(f"--plot is {options.plot}; expected a name that ends in one of {kinds}")
    return options


def contestants(options: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """What is trained: (library, cell) by the name it is reported under."""
    if options.compare:
        return {cell: ("fastrnn", cell) for cell in options.compare}
    both = options.library == "both" or (options.library is None and options.cell in SHARED)
    names = tuple(LIBRARIES) if both else (options.library or "fastrnn",)
    return {name: (name, options.cell) for name in names}


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    options = parse(arguments)
    set_threads(options)
    data = load(options.permuted)
    runs = {
        name: train(library, cell, data, options)
        for name, (library, cell) in contestants(options).items()
    }
    print(report(runs, options))
    print(f"  plot: {draw(runs, options)}")
    return runs


if __name__ == "__main__":
    main()
