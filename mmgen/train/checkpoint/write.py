"""Writing checkpoints while training goes on.

A save copies this rank's fragments to host memory (the only time that training waits), and a thread writes, hashes and
syncs them under a temporary name. Once every rank reports its file, which costs no message of its own, rank 0 writes
the manifest, renames the folder and moves `latest`. One save is in flight at a time, and its buffers are used again.
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
    """Saves of one run, into `folder/step-N`; all ranks call it alike."""

    def __init__(self, folder: Path, engine: Engine, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
        self.folder, self.engine, self.tokenizer, self.say = folder, engine, tokenizer, say
        self._host = HostCopy(engine)
        self._save: Save | None = None

    def begin(self, state: TrainerState) -> None:
        """Copy the state of the engine and start writing it; an earlier save is finished first."""
        self.finish()
        ranks, save = self.engine.ranks, Save(self.folder, state.step)
        if ranks.rank == 0:
            with save.noting_errors():
                shutil.rmtree(save.temporary, ignore_errors=True)
                save.temporary.mkdir(parents=True)
        ranks.sums([0.0])  # no rank writes before the folder is there
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
        self.tokenizer.save(save.temporary / "tokenizer.json")
        for other in [*texts, "tokenizer.json"]:
            sync(save.temporary / other)
            save.digests[other] = sha256(save.temporary / other)

    @property
    def progress(self) -> tuple[float, float]:
        """(1 while this rank's part is not written, 1 where it could not be written), to be summed over ranks."""
        save = self._save
        if save is None:
            return 1.0, 0.0
        return float(not save.done), float(save.done and save.error is not None)

    def poll(self, unwritten: float, failed: float) -> None:
        """Publish the save in flight once all ranks have written, and say why where it is lost.

        `unwritten` and `failed` count ranks: the sums of their `progress`.
        """
        if problem := self._conclude(unwritten, failed):
            self.say(problem)

    def finish(self, must: bool = False) -> None:
        """Wait for the save in flight, on all ranks.

        Raises:
            OSError: it could not be written, and `must` is set; else this is only reported.
        """
        if self._save is None:
            return
        self._save.join()
        problem = self._conclude(*self.engine.ranks.sums(self.progress))
        if problem and must:
            raise OSError(problem)
        if problem:
            self.say(problem)

    def _conclude(self, unwritten: float, failed: float) -> str | None:
        """Publish what all ranks have written; returns what went wrong."""
        save, ranks = self._save, self.engine.ranks
        if save is None or unwritten:
            return None
        save.join()
        self._save = None
        digests: dict[str, str] = {}
        for found in ranks.gather_objects(save.digests):
            digests |= found
        if ranks.rank == 0 and not failed:
            with save.noting_errors():
                publish(save, digests, self.engine.config.train)
        errors = [text for text in ranks.gather_objects(str(save.error) if save.error else None) if text]
        if not errors:
            return None
        if ranks.rank == 0:
            shutil.rmtree(save.temporary, ignore_errors=True)
        return f"checkpoint {save.name} could not be written ({errors[0]}); the one before it is as it was"


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
        """Do the work in a thread, unless an error was noted before."""

        def run() -> None:
            with contextlib.suppress(AttributeError, OSError):
                # Below training's priority where the two share processors (Linux takes a thread's number here).
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
        """Keep an error until it can be shared with all ranks; a thread that died silently would hang them."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error


class HostCopy:
    """A rank's state in host memory, in buffers that every save uses again."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._buffers: dict[str, Tensor] = {}

    def take(self) -> dict[str, Tensor]:
        """Copy this rank's fragments, buffers and random state; the only time that training waits for a save."""
        found: dict[str, Tensor] = {}
        rank, states = self.engine.ranks.rank, self.engine.optimizer.state
        for fragment in self.engine.fragments:
            if not fragment.owned:
                continue
            kinds = {"weight": fragment.flat}
            kinds |= {kind: t for kind, t in states.get(fragment.flat, {}).items() if torch.is_tensor(t) and t.ndim}
            for kind, tensor in kinds.items():
                found[f"{kind}|{fragment.name}|{fragment.start}"] = fragment.of(tensor)
        if rank == 0:
            stored = self.engine.model.state_dict()
            found |= {f"buffer|{n}|0": b for n, b in self.engine.model.named_buffers() if n in stored}
        found[f"rng|{rank}|0"] = torch.get_rng_state()
        if torch.cuda.is_available():
            found[f"rng_cuda|{rank}|0"] = torch.cuda.get_rng_state()
        for key, tensor in found.items():
            if key not in self._buffers:
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                self._buffers[key] = torch.empty(tensor.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
            self._buffers[key].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {key: self._buffers[key] for key in found}


def publish(save: Save, digests: dict[str, str], settings: TrainConfig) -> None:
    """Give a written save its name, move `latest` to it, and delete checkpoints that need not be kept."""
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
    """Delete a checkpoint; at no moment is a part of it left under its name."""
    gone = folder.with_name(f".{folder.name}.gone.tmp")
    os.replace(folder, gone)
    shutil.rmtree(gone)


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
