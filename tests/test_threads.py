"""The thread team seen from Python: thread counts, forks, concurrent callers, idling, exit.

What concerns a whole process (forks, thread counts, exit) is checked in a process of its own, with
both kinds of team: torch's libgomp, borrowed, and the library's own pool.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastrnn

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}
TEAMS = ("auto", "own")
HANG = 120  # seconds after which a process counts as hung


def train_step(kind: str = "lstm", bidirectional: bool = False) -> list[Tensor]:
    """Outputs and gradients of one layer that is big enough for a team of several threads.

    Every tensor stays below torch's own threshold for several threads (32,768 elements): after a
    fork torch's parallel loops hang, and that is not what is tested here.
    """
    gen = torch.Generator().manual_seed(1)
    layer = LAYERS[kind](48, 64, bidirectional=bidirectional)
    for weight in layer.parameters():
        weight.data.uniform_(-0.1, 0.1, generator=gen)
    x = torch.randn(20, 8, 48, generator=gen).requires_grad_()
    with fastrnn.use_backend("cpu"):
        y, _ = layer(x)
        y.sum().backward()
    grads = [p.grad for p in (x, *layer.parameters())]
    assert all(g is not None for g in grads)
    return [y.detach(), *(g for g in grads if g is not None)]


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    """Whether two results of train_step are equal, bit for bit."""
    return len(got) == len(want) and all(map(torch.equal, got, want))


def child_matches(want: list[Tensor]) -> bool:
    """Run in a child process: several threads must give the parent's bits."""
    torch.set_num_threads(2)
    return same_bits(train_step(), want)


def run_script(script: str, team: str = "auto", **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python source in a process of its own; fail if it hangs or does not end with status 0."""
    prelude = "import os, sys, time, torch, fastrnn\nfrom tests.test_threads import *\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        cwd=ROOT,
        env=os.environ | {"FASTRNN_TEAM": team, "CUDA_VISIBLE_DEVICES": ""} | env,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def own_workers() -> list[Path]:
    """The threads of this process that belong to the library's own pool."""
    tasks = Path("/proc/self/task").iterdir()
    return [t for t in tasks if (t / "comm").read_text().strip() == "fastrnn"]


def worker_ticks() -> int:
    """CPU time of the own pool's workers, in clock ticks."""
    fields = [(t / "stat").read_text().rpartition(")")[2].split() for t in own_workers()]
    return sum(int(f[11]) + int(f[12]) for f in fields)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("kind", LAYERS)
def test_bits_do_not_depend_on_thread_count(kind, bidirectional, threads, set_threads):
    set_threads(1)
    want = train_step(kind, bidirectional)
    set_threads(threads)
    assert same_bits(train_step(kind, bidirectional), want)


@pytest.mark.parametrize("team", TEAMS)
def test_both_teams_give_the_same_bits_in_turn_with_torch(team, tmp_path):
    torch.save(train_step(), tmp_path / "want.pt")
    script = f"""
        want = torch.load({str(tmp_path / "want.pt")!r})
        torch.set_num_threads(3)
        a = torch.randn(300, 300)
        product = a @ a
        for _ in range(20):
            assert same_bits(train_step(), want)
            assert torch.equal(a @ a, product)
    """
    run_script(script, team)


def test_set_num_threads_is_respected():
    script = """
        torch.set_num_threads(1)
        train_step()
        assert len(own_workers()) == 0, own_workers()
        torch.set_num_threads(3)
        train_step()
        assert len(own_workers()) == 2, own_workers()
        torch.set_num_threads(1)
        time.sleep(0.01)
        before = worker_ticks()
        for _ in range(50):
            train_step()
        assert worker_ticks() == before
    """
    run_script(script, "own")


def test_own_pool_is_not_started_beside_libgomp():
    script = """
        from fastrnn import _cpu
        print(_cpu.team_kind())
        torch.set_num_threads(2)
        train_step()
        assert len(own_workers()) == (_cpu.team_kind() == "own pool"), own_workers()
    """
    run_script(script)


def test_fork_before_the_first_use() -> None:
    """Where the parent has used torch's threads only."""
    script = """
        import signal
        torch.set_num_threads(2)
        a = torch.randn(512, 512)
        a @ a
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            train_step()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    """
    run_script(script)


@pytest.mark.parametrize("team", TEAMS)
def test_fork_after_use(team):
    # The parent's libgomp threads do not exist in the child, where libgomp would wait for them.
    script = """
        import signal
        torch.set_num_threads(2)
        a = torch.randn(512, 512)
        a @ a
        want = train_step()
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)
                os._exit(0 if same_bits(train_step(), want) else 1)
            assert os.waitpid(pid, 0)[1] == 0
            a @ a
            assert same_bits(train_step(), want)
    """
    run_script(script, team)


# A spawned child begins anew, whatever team its parent had.
@pytest.mark.parametrize("start, team", [*(("fork", team) for team in TEAMS), ("spawn", "auto")])
def test_multiprocessing(start, team):
    script = f"""
        import multiprocessing
        torch.set_num_threads(2)
        a = torch.randn(512, 512)
        a @ a
        want = train_step()
        arrays = [t.numpy() for t in want]
        with multiprocessing.get_context({start!r}).Pool(2) as pool:
            answers = [pool.apply_async(child_matches_arrays, (arrays,)) for _ in range(4)]
            assert all(a.get(timeout=90) for a in answers)
    """
    run_script(script, team)


def child_matches_arrays(arrays) -> bool:
    """child_matches for what can be sent to a process without shared memory."""
    return child_matches([torch.from_numpy(a) for a in arrays])


@pytest.mark.parametrize("team", TEAMS)
def test_concurrent_python_threads(team):
    script = """
        from concurrent.futures import ThreadPoolExecutor
        torch.set_num_threads(2)
        want = {kind: train_step(kind) for kind in LAYERS}
        def work(i):
            torch.set_num_threads(1 + i % 3)
            kind = list(LAYERS)[i % 3]
            return all(same_bits(train_step(kind), want[kind]) for _ in range(5))
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(24)))
        assert same_bits(train_step(), want["lstm"])
    """
    run_script(script, team)


def test_concurrent_python_threads_in_this_process(set_threads):
    set_threads(2)
    want = train_step()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: same_bits(train_step(), want), range(16)))


@pytest.mark.parametrize("team", TEAMS)
def test_idle_team_uses_no_cpu(team):
    script = """
        torch.set_num_threads(2)
        for _ in range(5):
            train_step()
        time.sleep(0.1)  # libgomp's workers spin for some milliseconds before they sleep
        before = time.process_time()
        time.sleep(0.5)
        used = time.process_time() - before
        assert used < 0.02, f"{used:.3f} s of CPU time in 0.5 s of idling"
        train_step()
    """
    run_script(script, team)


@pytest.mark.parametrize("team", TEAMS)
def test_exit_from_a_thread_does_not_hang(team):
    script = """
        import threading
        torch.set_num_threads(2)
        worker = threading.Thread(target=lambda: [train_step() for _ in range(10)])
        worker.start()  # joined by the interpreter, after the main thread has ended
    """
    run_script(script, team)


def test_workers_leave_signals_to_the_program():
    script = """
        import signal
        torch.set_num_threads(2)
        train_step()
        [worker] = own_workers()
        lines = (worker / "status").read_text().splitlines()
        blocked = next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk"))
        assert blocked >> (signal.SIGINT - 1) & 1 and blocked >> (signal.SIGTERM - 1) & 1
    """
    run_script(script, "own")


def test_unknown_team_is_named():
    done = run_script("torch.set_num_threads(2); train_step()", "openmp")
    assert "FASTRNN_TEAM=openmp" in done.stderr
    assert "auto, own, gomp or caller" in done.stderr


def test_team_of_the_caller_alone():
    script = """
        from fastrnn import _cpu
        assert _cpu.team_kind() == "caller only"
        torch.set_num_threads(2)
        train_step()
        assert not own_workers()
    """
    run_script(script, "caller")
