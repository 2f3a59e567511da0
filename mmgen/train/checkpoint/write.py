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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint.fragments import write
from mmgen.train.engine import Engine
from mmgen.train.ranks import Ranks

IDLE, WRITING, WRITTEN, FAILED = range(4)


class Saver:
    """Saves of one run, into `folder/step-N`."""

    def __init__(self, folder: Path, engine: Engine, ranks: Ranks, tokenizer: Tokenizer) -> None:
        self.folder, self.engine, self.ranks, self.tokenizer = folder, engine, ranks, tokenizer
        self.status = IDLE
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._digests: dict[str, str] = {}
        self._name = ""
        self._kept: Callable[[int], bool] = lambda step: True
        self._newest = 1

    def begin(self, step: int, record: dict[str, Any], keep_last: int, keep_every: int) -> None:
        """Copy the state of `step` and start writing it; an earlier save is finished first."""
        self.finish()
        self._name, self._newest = f"step-{step}", keep_last
        self._kept = lambda number: bool(keep_every) and number % keep_every == 0
        self._error, self._digests = None, {}
        if self.ranks.rank == 0:
            with self._noting_errors():
                shutil.rmtree(self._temporary, ignore_errors=True)
                self._temporary.mkdir(parents=True)
        self.ranks.sums([0.0])  # nobody writes before the folder is there
        tensors = self._copy()
        texts: dict[str, str] = {}
        if self.ranks.rank == 0:
            texts = {
                "trainer.json": json.dumps(record, indent=1),
                "config.json": self.engine.model.config.to_json_string(),
            }
        self.status = WRITING
        self._thread = threading.Thread(target=self._write, args=(tensors, texts), name="checkpoint", daemon=True)
        self._thread.start()

    def _copy(self) -> dict[str, Tensor]:
        """This rank's state on the host, in buffers that every save uses again."""
        found: dict[str, Tensor] = {}
        states = self.engine.optimizer.state
        for fragment in self.engine.fragments:
            if not fragment.owned:
                continue
            kinds = {"weight": fragment.flat}
            kinds |= {kind: t for kind, t in states.get(fragment.flat, {}).items() if torch.is_tensor(t) and t.ndim}
            for kind, tensor in kinds.items():
                found[f"{kind}|{fragment.name}|{fragment.start}"] = fragment.of(tensor)
        if self.ranks.rank == 0:
            stored = self.engine.model.state_dict()
            found |= {f"buffer|{n}|0": b for n, b in self.engine.model.named_buffers() if n in stored}
        found[f"rng|{self.ranks.rank}|0"] = torch.get_rng_state()
        if torch.cuda.is_available():
            found[f"rng_cuda|{self.ranks.rank}|0"] = torch.cuda.get_rng_state()
        for key, tensor in found.items():
            if key not in self._buffers:
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                self._buffers[key] = torch.empty(tensor.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
            self._buffers[key].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {key: self._buffers[key] for key in found}

    def _write(self, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        with contextlib.suppress(AttributeError, OSError):
            # Below training's priority where the two share processors (Linux takes a thread's number here).
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        with self._noting_errors():
            if self._error is None:
                name = f"state-{self.ranks.rank:05d}.safetensors"
                self._digests[name] = write(self._temporary / name, tensors)
                for text_name, text in texts.items():
                    (self._temporary / text_name).write_text(text)
                if self.ranks.rank == 0:
                    self.tokenizer.save(self._temporary / "tokenizer.json")
                    for other in [*texts, "tokenizer.json"]:
                        sync(self._temporary / other)
                        self._digests[other] = sha256(self._temporary / other)
        self.status = WRITTEN if self._error is None else FAILED

    @contextlib.contextmanager
    def _noting_errors(self) -> Any:
        try:
            yield
        except Exception as error:  # told by `poll` on every rank; a thread that died silently would hang them
            self._error = self._error or error

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self._name}.tmp"

    @property
    def progress(self) -> tuple[float, float]:
        """(1 while this rank's part is not written, 1 where it could not be written), to be summed over ranks."""
        return float(self.status < WRITTEN), float(self.status == FAILED)

    def poll(self, unwritten: float, failed: float) -> str | None:
        """Told how many ranks have not written, and failed: once all have, publish; returns what people should know."""
        if unwritten:
            return None
        assert self._thread is not None
        self._thread.join()
        self._thread, self.status = None, IDLE
        digests: dict[str, str] = {}
        for found in self.ranks.gather_objects(self._digests):
            digests |= found
        if self.ranks.rank == 0 and not failed:
            with self._noting_errors():
                self._publish(digests)
        errors = [told for told in self.ranks.gather_objects(str(self._error) if self._error else None) if told]
        if not errors:
            return None
        if self.ranks.rank == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)
        return f"checkpoint {self._name} could not be written ({errors[0]}); the one before it is as it was"

    def finish(self) -> str | None:
        """Wait for the save in flight, on all ranks; returns as `poll` does."""
        if self._thread is None:
            return None
        self._thread.join()
        unwritten, failed = self.ranks.sums(self.progress)
        return self.poll(unwritten, failed)

    def _publish(self, digests: dict[str, str]) -> None:
        manifest = self._temporary / "manifest.json"
        manifest.write_text(json.dumps(digests, indent=1))
        sync(manifest)
        sync(self._temporary)
        final = self.folder / self._name
        if final.exists():
            remove(final)
        os.replace(self._temporary, final)
        sync(self.folder)
        link = self.folder / ".latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, self.folder / "latest")
        sync(self.folder)
        steps = sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))
        for step in steps[: -self._newest]:
            if not self._kept(step) and f"step-{step}" != final.name:
                remove(self.folder / f"step-{step}")


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
