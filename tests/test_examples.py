"""The examples: small runs through their main(), with every cell and flag."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
SIZES = "--bytes 6000 --hidden 8 --embedding 4 --batch 8 --steps 10 --sample-length 5"
SMALL = [*SIZES.split(), "--threads", "1"]
EPOCH = 67  # iterations in an epoch of SMALL
CELLS = ("lstm", "gru", "rhn", "bnlstm")
# Flags by cell; each changes what is computed.
FLAGS = [
    ("lstm", "--layers 2 --dropout 0.2"),
    ("lstm", "--recurrent-dropout 0.3"),
    ("lstm", "--recurrent-dropout 0.3 --recurrent-dropout-mode cell"),
    ("lstm", "--recurrent-dropout 0.3 --recurrent-dropout-mode state"),
    ("lstm", "--recurrent-dropout 0.3 --recurrent-dropout-per sequence"),
    ("lstm", "--zoneout 0.1"),
    ("lstm", "--weight-dropout 0.4"),
    ("gru", "--recurrent-dropout 0.3 --recurrent-dropout-mode update"),
    ("gru", "--recurrent-dropout 0.3 --recurrent-dropout-mode state"),
    ("gru", "--zoneout 0.1 --weight-dropout 0.4"),
    ("rhn", "--variational 0.2"),
    ("rhn", "--depth 2"),
    ("bnlstm", "--layers 2 --dropout 0.1"),
]


@pytest.fixture(autouse=True)
def _one_thread(set_threads: Callable[[int], None]) -> None:
    """Puts back what --threads changes."""
    set_threads(1)


def _load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    for module in (name, "_common"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return __import__(name)


@pytest.fixture
def char_lm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load("char_lm", monkeypatch)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load("sequential_digits", monkeypatch)


@pytest.fixture
def run(char_lm: ModuleType, tmp_path: Path) -> Any:
    """Calls char_lm.main with small sizes."""

    def call(arguments: str = "", *more: str) -> Any:
        output = ["--output", str(tmp_path / "transcript.txt")]
        return char_lm.main([*SMALL, *output, *arguments.split(), *more])

    return call


# ---- the language model ----------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_the_language_model_learns(
    cell: str, run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = run(
        f"--cell {cell} --bytes 30000 --hidden 32 --embedding 16 --epochs 1 --lr 0.01 "
        "--sample-at 5 100"
    )
    count = len(made.losses)
    assert count == 337
    # From about log(96) = 4.6 nats; the frequencies of the characters alone give 3.3.
    assert made.losses[0] > 4.2
    assert sum(made.losses[-20:]) / 20 < 2.8
    assert made.valid[1] < 3.0
    assert made.test < 3.0
    assert made.train[1] == pytest.approx(sum(made.losses) / count)
    assert sorted(made.samples) == [5, 100]
    for text in made.samples.values():
        assert text.startswith("def ")
        assert len(text) == 9
    out = capsys.readouterr().out
    valid = made.valid[1]
    assert f"perplexity {math.exp(valid):6.3f}, {valid / math.log(2):.3f} BPC" in out
    assert f"test perplexity {math.exp(made.test):6.3f}" in out
    assert "backend: cpu" in out
    transcript = (tmp_path / "transcript.txt").read_text()
    assert made.samples[100] in transcript
    assert "test perplexity" in transcript


@pytest.mark.parametrize("cell, flags", FLAGS)
def test_every_flag_changes_the_training(cell: str, flags: str, run: Any) -> None:
    layers = "--layers 2" if "--layers" in flags else ""
    plain = run(f"--cell {cell} --iterations 3 {layers}")
    changed = run(f"--cell {cell} --iterations 3 {flags}")
    assert len(changed.losses) == 3
    assert all(math.isfinite(loss) for loss in [*changed.losses, changed.test])
    assert changed.losses != plain.losses


@pytest.mark.parametrize(
    "cell, flags",
    [
        ("lstm", "--layers 2 --dropout 0.2 --recurrent-dropout 0.2 --zoneout 0.1"),
        ("gru", "--weight-dropout 0.3"),
        ("rhn", "--depth 2 --variational 0.2"),
        ("bnlstm", ""),
    ],
)
@pytest.mark.parametrize("stop", [EPOCH - 3, EPOCH, EPOCH + 2])
def test_resuming_is_as_not_stopping(
    cell: str, flags: str, stop: int, run: Any, tmp_path: Path
) -> None:
    arguments = f"--cell {cell} {flags} --epochs 2 --sample-at {EPOCH - 4} {EPOCH + 3}"
    kept = ("--checkpoint", str(tmp_path / "kept.pt"))
    whole = run(f"{arguments} --iterations {EPOCH + 5}")
    first = run(f"{arguments} --iterations {stop}", *kept)
    torch.manual_seed(1)  # what happens in between does not matter
    second = run(f"{arguments} --iterations {EPOCH + 5} --resume", *kept)
    assert len(first.losses) == stop
    assert first.losses + second.losses == whole.losses
    assert {**first.train, **second.train} == whole.train
    assert {**first.valid, **second.valid} == whole.valid
    assert {**first.samples, **second.samples} == whole.samples
    assert second.test == whole.test


def test_a_checkpoint_is_written_on_the_way(
    char_lm: ModuleType, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash the run goes on from the last one."""
    path = tmp_path / "folder" / "kept.pt"
    whole = run("--iterations 9")

    class Crash(Exception):
        pass

    def crash(*_: Any) -> str:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(char_lm, "sample", crash)
        with pytest.raises(Crash):
            run(f"--iterations 9 --sample-at 6 --save-every 4 --checkpoint {path}")
    assert [file.name for file in path.parent.iterdir()] == ["kept.pt"]
    # The list of samples is not part of the run's identity.
    rest = run(f"--iterations 9 --save-every 4 --resume --checkpoint {path}")
    assert rest.losses == whole.losses[4:]


def test_resuming_another_run_is_refused(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "kept.pt"
    run(f"--iterations 2 --checkpoint {path}")
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="hidden was 8, is 9") as refusal:
        run(f"--iterations 4 --hidden 9 --checkpoint {path} --resume")
    assert "clip" not in str(refusal.value)
    with pytest.raises(SystemExit, match=r"text was \d+, is \d+"):
        run(f"--iterations 4 --bytes 11990 --checkpoint {path} --resume")
    assert path.read_bytes() == before


def test_the_same_call_gives_the_same_run_and_sampling_does_not_disturb_it(run: Any) -> None:
    flags = "--cell lstm --layers 2 --dropout 0.3 --iterations 6"
    one, two = run(f"{flags} --sample-at 2 4"), run(f"{flags} --sample-at 2 4")
    assert (one.losses, one.samples, one.test) == (two.losses, two.samples, two.test)
    without = run(f"{flags} --sample-at")
    assert (without.losses, without.samples) == (one.losses, {})
    assert run(f"{flags} --sample-at --seed 1").losses != one.losses


def _training(char_lm: ModuleType, arguments: str) -> Any:
    options = char_lm.parse([*SMALL, *arguments.split()])
    return char_lm.Training(char_lm.read_corpus(options.bytes), options)


@pytest.mark.parametrize("cell", CELLS)
def test_the_state_is_carried_from_chunk_to_chunk(cell: str, char_lm: ModuleType) -> None:
    training = _training(char_lm, f"--cell {cell} --lr 1e-30")  # the weights stay
    first, second = training.iterate(), training.iterate()
    again = _training(char_lm, f"--cell {cell} --lr 1e-30")
    text, steps = again.text, again.options.steps
    scores, state = again.model(text[:steps])
    assert first == char_lm.loss_of(scores, text[1 : steps + 1]).item()
    following, targets = text[steps : 2 * steps], text[steps + 1 : 2 * steps + 1]
    carried, _ = again.model(following, char_lm.detach(state))
    assert second == char_lm.loss_of(carried, targets).item()
    fresh, _ = again.model(following)
    assert second != char_lm.loss_of(fresh, targets).item()
    parts = training.at.state if isinstance(training.at.state, tuple) else (training.at.state,)
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rhn"])
def test_evaluation_covers_every_character_once(cell: str, char_lm: ModuleType) -> None:
    training = _training(char_lm, f"--cell {cell} --batch 1 --dropout 0.5")
    model = training.model.double()
    part = training.corpus.valid[:87]  # eight chunks of ten and one of six
    found = char_lm.evaluate(model, part, training.options)
    assert model.training
    scores, _ = model.eval()(part[:-1, None])
    expected = char_lm.loss_of(scores, part[1:, None])
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_sampling_steps_through_what_the_model_computes(cell: str, char_lm: ModuleType) -> None:
    """Near temperature 0 the sample is the likeliest character each time."""
    training = _training(char_lm, f"--cell {cell} --temperature 1e-6 --lr 0.02 --sample-length 20")
    for _ in range(30):
        training.iterate()
    model, corpus = training.model, training.corpus
    text = char_lm.sample(model, corpus, training.options, 0)
    assert model.training
    numbers: Tensor = corpus.encode("def ")
    model.eval()
    with torch.no_grad():
        for _ in range(20):
            scores, _ = model(numbers[:, None])
            numbers = torch.cat([numbers, scores[-1].argmax(1)])
    assert text == corpus.decode(numbers.tolist())


def test_the_temperature_and_the_prime_are_heeded(run: Any) -> None:
    flags = "--iterations 2 --sample-at 2 --sample-length 40"
    hot = run(f"{flags} --temperature 5 --prime class").samples[2]
    cold = run(f"{flags} --temperature 0.05 --prime class").samples[2]
    assert hot.startswith("class")
    assert cold.startswith("class")
    assert len(set(hot)) > len(set(cold))


def test_the_corpus_is_ascii_text_split_in_order(char_lm: ModuleType) -> None:
    corpus = char_lm.read_corpus(10_000)
    assert [part.numel() for part in (corpus.train, corpus.valid, corpus.test)] == [9000, 500, 500]
    text = corpus.decode(torch.cat([corpus.train, corpus.valid, corpus.test]).tolist())
    assert text.isascii()
    assert sorted(set(text)) == list(corpus.characters)
    assert char_lm.read_corpus(20_000).decode(char_lm.read_corpus(20_000).train.tolist())[
        :10_000
    ] == text  # fmt: skip
    assert corpus.encode("def").tolist() == [corpus.characters.index(c) for c in "def"]
    columns = char_lm.columns(torch.arange(11), 3)
    assert columns.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--cell gru --variational 0.1", "--variational is not for --cell gru; it is for rhn"),
        ("--cell lstm --depth 2", "--depth is not for --cell lstm; it is for rhn"),
        ("--cell rhn --zoneout 0.1", "--zoneout is not for --cell rhn; it is for lstm, gru"),
        ("--cell bnlstm --weight-dropout 0.1", "--weight-dropout is not for --cell bnlstm"),
        ("--cell bnlstm --recurrent-dropout 0.1", "it is for lstm, gru"),
        (
            "--cell gru --recurrent-dropout 0.1 --recurrent-dropout-mode cell",
            "--recurrent-dropout-mode cell is not for --cell gru; it is for lstm",
        ),
        ("--recurrent-dropout-mode cell", "does nothing without --recurrent-dropout"),
        ("--recurrent-dropout-per step", "does nothing without --recurrent-dropout"),
        ("--dropout 1.0", "--dropout is 1.0; expected a probability, 0 <= p < 1"),
        ("--zoneout -0.1", "--zoneout is -0.1; expected a probability"),
        ("--dropout nan", "--dropout is nan; expected a probability"),
        ("--hidden 0", "--hidden is 0; expected at least 1"),
        ("--iterations 0", "--iterations is 0; expected at least 1"),
        ("--temperature 0", "--temperature is 0.0; expected a number above 0"),
        ("--lr nan", "--lr is nan; expected a number above 0"),
        ("--resume", "--resume needs --checkpoint FILE"),
        ("--resume --checkpoint nowhere.pt", "nowhere.pt does not exist; leave out --resume"),
        (f"--checkpoint {Path(__file__).name}", "exists; give --resume to go on, or remove it"),
        (f"--checkpoint {Path(__file__).name}/kept.pt", "/kept.pt cannot be written ("),
        ("--output .", "--output . cannot be written ("),
        ("--seed -1", "--seed is -1; expected 0 <= seed < 2**63"),
        (f"--seed {2**63}", f"--seed is {2**63}; expected 0 <= seed < 2**63"),
        ("--threads 0", "--threads is 0; expected at least 1"),
    ],
)
def test_wrong_flags_end_the_program(
    arguments: str,
    words: str,
    run: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    with pytest.raises(SystemExit) as end:
        run(arguments)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--bytes", "90"], r"82 characters to train on, 4 to validate; .* \+ 1\) = 88 and 2"),
        (
            ["--prime", "d\u00e9f"],
            r"--prime has \['\u00e9'\], which the text has not",
        ),
    ],
)
def test_what_the_text_does_not_allow_is_said(arguments: list[str], words: str, run: Any) -> None:
    with pytest.raises(SystemExit, match=words):
        run("", *arguments)


@pytest.mark.parametrize(
    "content",
    [b"", b"def f(): pass", b"PK\x03\x04 not all of it", [1, 2], {"model": {}}, {"settings": {}}],
    ids=repr,
)
def test_a_file_that_is_no_checkpoint_is_refused(content: Any, run: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"other\.pt is no checkpoint of this script; name one"):
        run(f"--iterations 2 --resume --checkpoint {path}")
    assert path.read_bytes() == before


def test_a_model_saved_whole_is_no_checkpoint(run: Any, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="is no checkpoint of this script"):
        run(f"--iterations 2 --resume --checkpoint {tmp_path / 'other.pt'}")


def test_a_run_that_diverged_has_figures(char_lm: ModuleType) -> None:
    assert char_lm.figures(1e4) == "perplexity    inf, 14426.950 BPC"
    assert char_lm.figures(math.log(2)) == "perplexity  2.000, 1.000 BPC"
    assert char_lm.figures(math.nan) == "perplexity    nan, nan BPC"


def test_the_prime_is_not_empty(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("", "--prime", "")
    assert "--prime is empty" in capsys.readouterr().err


# ---- the digits ------------------------------------------------------------------------------


def _tiny(figure: Path, *more: str) -> list[str]:
    return ["--epochs", "1", "--hidden", "8", "--batch", "512", "--plot", str(figure), *more]


def test_the_digits_train_both_libraries_alike(
    digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "curves.png"
    runs = digits.main(_tiny(figure))
    assert set(runs) == {"torch.nn", "fastrnn"}
    ours, theirs = (torch.tensor(runs[name].losses) for name in ("fastrnn", "torch.nn"))
    assert len(ours) == 3
    # Half of float32's digits: the same training, not the same rounding.
    torch.testing.assert_close(ours, theirs, rtol=3.5e-4, atol=0.0)
    assert "loss curves differ by at most" in capsys.readouterr().out
    assert figure.stat().st_size > 0


@pytest.mark.parametrize("cell", ["rhn", "bnlstm"])
def test_a_cell_that_torch_lacks_is_trained_alone(
    cell: str, digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "curves.png"
    runs = digits.main(_tiny(figure, "--cell", cell))
    assert list(runs) == ["fastrnn"]
    assert len(runs["fastrnn"].losses) == 3
    assert all(math.isfinite(loss) for loss in runs["fastrnn"].losses)
    assert digits.CELLS[cell] in capsys.readouterr().out
    assert figure.stat().st_size > 0


def test_cells_are_compared_in_one_figure(
    digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "curves.png"
    more = ["--compare", "lstm", "rhn", "bnlstm", "--permuted", "--epochs", "2"]
    runs = digits.main(_tiny(figure, *more))
    assert list(runs) == ["lstm", "rhn", "bnlstm"]
    assert [len(run.losses) for run in runs.values()] == [6, 6, 6]
    assert [len(run.accuracies) for run in runs.values()] == [2, 2, 2]
    assert len({run.losses[-1] for run in runs.values()}) == 3
    out = capsys.readouterr().out
    assert "LSTM, RHN, BNLSTM, H=8, pixels permuted" in out
    assert out.count("90% in epoch -") == 3
    assert figure.stat().st_size > 0


def test_the_comparison_draws_each_cell_by_epoch(digits: ModuleType) -> None:
    from matplotlib.figure import Figure

    runs = {
        "lstm": digits.Run([4.0, 2.0, 1.0, 1.0], [0.25, 0.5], 1.0),
        "bnlstm": digits.Run([2.0, 1.0, 0.5, 0.5], [0.5, 0.9], 1.0),
    }
    loss, accuracy = Figure().subplots(1, 2)
    digits.draw_cells(runs, loss, accuracy)
    lines = {line.get_label(): line.get_ydata().tolist() for line in loss.lines}
    assert lines == {"LSTM": [3.0, 1.0], "BNLSTM": [1.5, 0.5]}
    lines = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert lines == {"LSTM": [0.25, 0.5], "BNLSTM": [0.5, 0.9]}
    assert [digits.first_at(0.5, run) for run in runs.values()] == ["2", "1"]
    assert [digits.first_at(0.9, run) for run in runs.values()] == ["-", "2"]


def test_the_permutation_is_one_for_all_images(digits: ModuleType) -> None:
    plain, permuted = digits.load(), digits.load(permuted=True)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert permuted.train_x.equal(plain.train_x[order])
    assert permuted.test_x.equal(plain.test_x[order])
    assert permuted.train_y.equal(plain.train_y)
    assert not permuted.train_x.equal(plain.train_x)


def test_the_classifier_reads_the_final_state(digits: ModuleType) -> None:
    torch.manual_seed(0)
    model = digits.Classifier(nn, "lstm", 4)
    pixels = torch.randn(64, 3, 1)
    output, _ = model.rnn(pixels)
    assert model(pixels).equal(model.head(output[-1]))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--library", "both", "--cell", "rhn"], "--library both has no RHN; expected --library"),
        (["--library", "torch.nn", "--cell", "bnlstm"], "or --cell lstm, gru, rnn"),
        (["--library", "torch.nn", "--compare", "lstm"], "--compare; expected fastrnn"),
        (["--compare", "lstm", "lstm"], "--compare names lstm twice"),
        (["--compare", "transformer"], "invalid choice: 'transformer'"),
        (["--epochs", "0"], "--epochs is 0; expected at least 1"),
        (["--threads", "0"], "--threads is 0; expected at least 1"),
        (["--lr", "0"], "--lr is 0.0; expected a number above 0"),
        (["--lr", "nan"], "--lr is nan; expected a number above 0"),
        (["--seed", "-1"], "--seed is -1; expected 0 <= seed < 2**63"),
        (["--compare", "lstm", "--cell", "gru"], "--cell gru with --compare; add it to those"),
        (["--plot", f"{__file__}/curves.png"], "/curves.png cannot be written ("),
        (["--plot", "."], "--plot . cannot be written ("),
        (["--plot", "curves.txt"], "curves.txt; expected a name that ends in one of ["),
        (["--plot", "curves"], "curves; expected a name that ends in one of ["),
    ],
)
def test_wrong_flags_of_the_digits_end_the_program(
    arguments: list[str], words: str, digits: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        digits.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "example, module",
    [
        ("char_lm", "tqdm"),
        ("sequential_digits", "tqdm"),
        ("sequential_digits", "sklearn"),
        ("sequential_digits", "matplotlib"),
    ],
)
def test_a_missing_package_ends_the_program_in_one_line(
    example: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    script = _load(example, monkeypatch)
    flag = "--output" if example == "char_lm" else "--plot"
    with pytest.raises(SystemExit) as end:
        script.main([flag, str(tmp_path / "file.png")])
    assert end.value.code == f"{module} is not installed; pip install 'fastrnn[bench]'"
