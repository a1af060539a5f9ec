"""However a run came about, its rows are the same: in one process or two, in one go or killed time and again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch

import vlprune
from vlprune.evals import journal

from . import small

KILLS = 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted, in one process."""
    out = tmp_path_factory.mktemp("whole")
    small.run(out)
    return out


def sorted_rows(out: Path) -> list[bytes]:
    """Lines of all row files, times aside."""
    return sorted(json.dumps(small.measured_anew(row), ensure_ascii=False).encode() for row in journal.raw_rows(out))


@contextmanager
def launched(out: Path, processes: int, *more: str) -> Iterator[subprocess.Popen]:
    """A run shared by processes that ``accelerate launch`` starts; all are killed in the end.

    Without ``--multi_gpu`` it starts a single process on machines that have no GPU.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(vlprune.__file__).parents[1])}
    command = [*launch, "--main_process_port", str(port), small.__file__, str(out), *more]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen) -> None:
    """The launcher and its workers, which are in sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        workers = psutil.Process(process.pid).children(recursive=True)
        for one in [process, *workers]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(workers)
    process.wait()


def test_two_processes_equal_one(whole: Path, tmp_path: Path):
    with launched(tmp_path, 2) as process:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    files = journal.row_files(tmp_path)
    assert [path.name for path in files] == ["rows-00000.jsonl", "rows-00001.jsonl"]
    assert all(path.stat().st_size for path in files)
    assert sorted_rows(tmp_path) == sorted_rows(whole)
    assert journal.read_manifest(tmp_path)["sessions"][0]["processes"] == 2


def test_two_processes_are_killed_and_one_goes_on(whole: Path, tmp_path: Path):
    with launched(tmp_path, 2, "--slowly") as process:
        deadline = time.monotonic() + 300
        while len(list(journal.raw_rows(tmp_path))) < 12:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill_all(process)
    kept = len(list(journal.raw_rows(tmp_path)))
    assert 12 <= kept < len(sorted_rows(whole))
    small.run(tmp_path)
    assert sorted_rows(tmp_path) == sorted_rows(whole)
    assert len(journal.read_manifest(tmp_path)["sessions"]) == 2


def run_in_child(out: Path) -> None:
    torch.set_num_threads(1)
    small.run(out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork spares the child what takes longest, its imports")
def test_killed_ten_times_at_random_moments(whole: Path, tmp_path: Path):
    """Moments are those of rows: each child is killed when a random number of bytes has been written, if it lives so long."""
    chance = random.Random(0)
    context = multiprocessing.get_context("fork")
    killed = 0
    size = sum(path.stat().st_size for path in journal.row_files(whole))
    written = 0
    for kill in range(KILLS):
        child = context.Process(target=run_in_child, args=(tmp_path,))
        child.start()
        goal = written + chance.random() * (size - written) / (KILLS - kill + 2)
        while child.is_alive() and bytes_in(tmp_path) < goal:
            time.sleep(0.001)
        time.sleep(0.05 * chance.random())
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        written = bytes_in(tmp_path)
    assert killed == KILLS
    assert 0 < written < size
    small.run(tmp_path)
    assert sorted_rows(tmp_path) == sorted_rows(whole)
    assert journal.read_rows(tmp_path)
    assert len(journal.read_manifest(tmp_path)["sessions"]) >= 2


def bytes_in(out: Path) -> int:
    return sum(path.stat().st_size for path in journal.row_files(out))
