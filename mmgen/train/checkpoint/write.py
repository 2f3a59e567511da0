"""Writes checkpoints in a thread, while training continues.

A save copies this rank's fragments to host memory; training waits for this copy only. A thread then writes, hashes and
syncs the file under a temporary name. Each step's message between ranks also reports whose file is written. Once all
are, rank 0 writes the manifest, renames the folder and moves `latest`. One save is written at a time, and all saves use
the same buffers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mmgen.config import TrainConfig
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint.fragments import write
from mmgen.train.engine import Engine
from mmgen.train.state import TrainerState


class Saver:
    """Writes the checkpoints of one run to `folder/step-N`; every rank must make the same calls."""

    def __init__(self, folder: Path, engine: Engine, tokenizer: Tokenizer, report: Callable[[str], None]) -> None:
        self.folder, self.engine, self.tokenizer, self.report = folder, engine, tokenizer, report
        self._host = HostCopy(engine)
        self._save: Save | None = None

    def begin(self, state: TrainerState) -> None:
        """Copy the state of the engine and start writing it, after an earlier save is finished."""
        self.finish()
        ranks, save = self.engine.ranks, Save(self.folder, state.step)
        if ranks.rank == 0:
            with save.noting_errors():
                shutil.rmtree(save.temporary, ignore_errors=True)
                save.temporary.mkdir(parents=True)
        ranks.sums([0.0])  # a barrier: no rank writes before the folder exists
        tensors, texts = self._host.take(), dict[str, str]()
        if ranks.rank == 0:
            texts = {"trainer.json": state.to_json(), "config.json": self.engine.model.config.to_json_string()}
        self._save = save
        save.start(lambda: self._write(save, tensors, texts))

    def _write(self, save: Save, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        name = f"state-{self.engine.ranks.rank:05d}.safetensors"
        save.digests[name] = write(save.temporary / name, tensors)
        if self.engine.ranks.rank:
            return
        for text_name, text in texts.items():
            (save.temporary / text_name).write_text(text)
        written = self.tokenizer.save(save.temporary / "tokenizer.json")
        for other in [*texts, *(path.name for path in written)]:
            sync(save.temporary / other)
            save.digests[other] = sha256(save.temporary / other)

    @property
    def progress(self) -> tuple[float, float]:
        """Two numbers to be summed over ranks: 1 while this rank's part is not written, and 1 if writing it failed."""
        save = self._save
        if save is None:
            return 1.0, 0.0
        return float(not save.done), float(save.done and save.error is not None)

    def poll(self, unwritten: float, failed: float) -> None:
        """Publish the save once all ranks have written their parts, or print why it failed.

        `unwritten` and `failed` are the sums of `progress` over ranks.
        """
        if problem := self._conclude(unwritten, failed):
            self.report(problem)

    def finish(self, must: bool = False) -> None:
        """Wait on all ranks until the save is published. A failure is printed, unless `must` is set.

        Raises:
            OSError: `must` is set and the save could not be written.
        """
        if self._save is None:
            return
        self._save.join()
        problem = self._conclude(*self.engine.ranks.sums(self.progress))
        if problem and must:
            raise OSError(problem)
        if problem:
            self.report(problem)

    def _conclude(self, unwritten: float, failed: float) -> str | None:
        """Publish the save if all ranks have written their parts; returns a message if one of them failed."""
        save, ranks = self._save, self.engine.ranks
        if save is None or unwritten:
            return None
        save.join()
        self._save = None
        digests: dict[str, str] = {}
        for written in ranks.gather_objects(save.digests):
            digests |= written
        if ranks.rank == 0 and not failed:
            with save.noting_errors():
                publish(save, digests, self.engine.config.train)
        errors = [text for text in ranks.gather_objects(str(save.error) if save.error else None) if text]
        if not errors:
            return None
        if ranks.rank == 0:
            shutil.rmtree(save.temporary, ignore_errors=True)
        return f"checkpoint {save.name} could not be written ({errors[0]}); the previous one is unchanged"


class Save:
    """This rank's part of one save, written under a temporary name by a thread."""

    def __init__(self, folder: Path, step: int) -> None:
        self.name = f"step-{step}"
        self.temporary, self.final = folder / f".{self.name}.tmp", folder / self.name
        self.digests: dict[str, str] = {}
        """SHA-256 of each file that this rank wrote."""
        self.error: Exception | None = None
        self.done = False
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Do the work in a thread, unless an error was recorded before."""

        def run() -> None:
            with contextlib.suppress(AttributeError, OSError):
                # Training has priority if both share processors. Linux accepts the number of a thread here.
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            with self.noting_errors():
                if self.error is None:
                    work()
            self.done = True

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until this rank's part is written."""
        if self._thread is not None:
            self._thread.join()

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Record an error until all ranks can exchange it; if a thread only died, the other ranks would hang."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error


class HostCopy:
    """Copies a rank's state to host memory, into buffers that all saves share."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._buffers: dict[str, Tensor] = {}

    def take(self) -> dict[str, Tensor]:
        """Copy this rank's fragments, buffers and random state; training waits for this part of a save only."""
        state: dict[str, Tensor] = {}
        rank, states = self.engine.ranks.rank, self.engine.optimizer.state
        for fragment in self.engine.fragments:
            if not fragment.owned:
                continue
            kinds = {"weight": fragment.flat}
            kinds |= {kind: t for kind, t in states.get(fragment.flat, {}).items() if torch.is_tensor(t) and t.ndim}
            for kind, tensor in kinds.items():
                state[f"{kind}|{fragment.name}|{fragment.start}"] = fragment.of(tensor)
        if rank == 0:
            stored = self.engine.model.state_dict()
            state |= {f"buffer|{n}|0": b for n, b in self.engine.model.named_buffers() if n in stored}
        state[f"rng|{rank}|0"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state[f"rng_cuda|{rank}|0"] = torch.cuda.get_rng_state()
        for key, tensor in state.items():
            if key not in self._buffers:
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                self._buffers[key] = torch.empty(tensor.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
            self._buffers[key].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {key: self._buffers[key] for key in state}


def publish(save: Save, digests: dict[str, str], settings: TrainConfig) -> None:
    """Rename a written save, move `latest` to it, and delete checkpoints that are no longer kept."""
    folder, manifest = save.final.parent, save.temporary / "manifest.json"
    manifest.write_text(json.dumps(digests, indent=1))
    sync(manifest)
    sync(save.temporary)
    if save.final.exists():
        remove(save.final)
    os.replace(save.temporary, save.final)
    sync(folder)
    link = folder / ".latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(save.name)
    os.replace(link, folder / "latest")
    sync(folder)
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    for step in steps[: -settings.keep_last]:
        kept = bool(settings.keep_every) and step % settings.keep_every == 0
        if not kept and f"step-{step}" != save.name:
            remove(folder / f"step-{step}")


def remove(folder: Path) -> None:
    """Delete a checkpoint, renaming it first, so that no incomplete checkpoint ever has its name."""
    gone = folder.with_name(f".{folder.name}.gone.tmp")
    os.replace(folder, gone)
    shutil.rmtree(gone)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
