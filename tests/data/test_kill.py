"""A process that reads data is killed at any point; the next one resumes from the last saved position."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from torch.utils.data import IterableDataset

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import Share
from mmgen.data.loader import ahead, steps
from mmgen.data.order import Cursors, Position
from mmgen.data.streams import training_corpus
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import tiny
from tests.data.common import row_digests, write_shards

LAST = 14


def position_of(stored: dict[str, Any]) -> Any:
    return Cursors.of(stored) if "streams" in stored else Position(**stored)


def consume(config: Config, folder: Path, world: int, every: int, fault: str | None) -> None:
    """Read global steps and record their contents, saving the position at intervals, as a training run does."""
    corpus = training_corpus(config, Tokenizer.of(config))
    saved, record = folder / "saved.json", folder / "record.jsonl"
    state = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "position": corpus.start.as_dict()}
    kept = record.read_text().splitlines()[: state["step"]] if record.exists() else []
    # Written atomically: a kill during the write would lose the record.
    (folder / "record.part").write_text("".join(line + "\n" for line in kept))
    os.replace(folder / "record.part", record)
    ranks = [
        steps(corpus, state["step"], LAST, position_of(state["position"]), Share(rank, world)) for rank in range(world)
    ]
    with record.open("a") as file:
        for number, shares in enumerate(zip(*ranks, strict=True), state["step"] + 1):
            digests = [row_digests(share) for share in shares]
            rows = [digests[i % world][i // world] for i in range(config.train.batch_rows)]
            after = Cursors.union(share.after for share in shares) if config.data.streams else shares[0].after
            file.write(json.dumps(rows) + "\n")
            file.flush()
            if number % every == 0:
                step = number - 1 if fault == "repeats" else number
                position = position_of(state["position"]) if fault == "forgets" else after
                (folder / "saved.part").write_text(json.dumps({"step": step, "position": position.as_dict()}))
                os.replace(folder / "saved.part", saved)


def killed_and_resumed(config: Config, folder: Path, kills: int, seed: int, fault: str | None = None) -> list[str]:
    """The record of a reader that is killed `kills` times and then left to finish."""
    folder.mkdir()
    rng, forks = np.random.default_rng(seed), get_context("fork")
    record = folder / "record.jsonl"
    for number in range(kills + 1):
        reader = forks.Process(target=consume, args=(config, folder, (1, 2, 4)[number % 3], 2, fault))
        reader.start()
        if number < kills:
            lines = int(rng.integers(3 if fault else 0, LAST - 1))  # a fault shows only once a position is saved
            while reader.is_alive() and (not record.exists() or record.read_bytes().count(b"\n") < lines):
                time.sleep(0.001)
            time.sleep(float(rng.uniform(0, 0.02)))
            if reader.pid and reader.is_alive():
                os.kill(reader.pid, signal.SIGKILL)
        reader.join()
    assert reader.exitcode == 0
    return record.read_text().splitlines()


def source(tmp_path: Path, streams: int, workers: int = 0) -> Config:
    shards = write_shards(tmp_path / "shards")
    data = {"train": shards, "streams": streams, "window": 12, "workers": workers}
    return tiny(tmp_path, data=data, train={"batch_rows": 8})


def whole(config: Config, folder: Path) -> list[str]:
    folder.mkdir()
    consume(override(config, {"data": {"workers": 0}}), folder, 1, LAST, None)
    return (folder / "record.jsonl").read_text().splitlines()


@pytest.mark.parametrize("streams", [0, 4])
def test_a_killed_reader_loses_and_repeats_nothing(tmp_path: Path, streams: int) -> None:
    config = source(tmp_path, streams)
    expected = whole(config, tmp_path / "whole")
    assert len(set(expected)) == LAST
    assert killed_and_resumed(config, tmp_path / "killed", 4, streams) == expected
    for fault in ("repeats", "forgets"):
        assert killed_and_resumed(config, tmp_path / fault, 2, 5, fault) != expected, (
            "a wrong position must change the record"
        )


class Stuck(IterableDataset[int]):
    """Gives a loader's worker that never returns, like one whose queue is full and not read."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def __iter__(self) -> Iterator[int]:
        self.note.write_text(str(os.getpid()))
        time.sleep(600)
        yield 0


def stuck_worker(folder: Path) -> None:
    next(ahead(Stuck(folder / "worker"), 1, False))


def test_a_worker_of_a_killed_reader_ends(tmp_path: Path) -> None:
    reader = get_context("fork").Process(target=stuck_worker, args=(tmp_path,))
    reader.start()
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        time.sleep(0.01)
    worker = psutil.Process(int((tmp_path / "worker").read_text()))
    os.kill(reader.pid or 0, signal.SIGKILL)
    reader.join()
    _, alive = psutil.wait_procs([worker], timeout=10)
    for left in alive:
        left.kill()
    assert not alive


FAILING = """
import sys
from torch.utils.data import IterableDataset
from mmgen.data.loader import ahead

class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(100))

stream = ahead(Numbers(), 2, False)
next(stream)
raise RuntimeError("a step failed")
"""


def test_a_reader_that_fails_does_not_wait_for_its_workers(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "a step failed" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streams", [0, 4])
def test_a_reader_killed_often_loses_and_repeats_nothing(tmp_path: Path, streams: int, workers: int) -> None:
    config = source(tmp_path, streams, workers)
    expected = whole(config, tmp_path / "whole")
    for seed in range(8):
        assert killed_and_resumed(config, tmp_path / f"killed-{seed}", 5, seed) == expected
