"""Archives, shards and streams that several data tests use."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mmgen.config import Config
from mmgen.data.documents import Step
from mmgen.data.order import Cursor
from mmgen.data.streams import StreamCorpus, Streams, training_corpus
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import pairs, write_tar

STEPS = 9


def write_shards(folder: Path, count: int = 7) -> list[str]:
    """Shards of 5, 6, ... captioned pictures; no key occurs twice."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(count):
        members = {f"{number}-{name}": data for name, data in pairs(5 + number, number).items()}
        paths.append(str(write_tar(folder / f"part-{number}.tar", members)))
    return paths


def tokenizer_of(config: Config) -> Tokenizer:
    return Tokenizer.of(config)


def opened(config: Config) -> StreamCorpus:
    corpus = training_corpus(config, tokenizer_of(config))
    assert isinstance(corpus, StreamCorpus)
    return corpus


def row_digests(step: Step) -> list[str]:
    """A digest of each row of a step: tokens, pixels, noise and times."""
    found = []
    for batch in step.micro:
        for b in range(len(batch.ids_BS)):
            here = batch.at_I // batch.ids_BS.shape[1] == b
            parts = [batch.ids_BS[b], batch.document_BS[b], batch.label_BS[b], batch.patches_UP[batch.source_I][here]]
            parts += [batch.draws[name][here] for name in sorted(batch.draws)]
            parts += [batch.noise_key_C[batch.image_I[here]]]
            found.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
    return found


def contents(step: Step) -> tuple[Any, ...]:
    return row_digests(step), step.after, step.documents, step.positions, step.images


def names(shards: list[str]) -> set[tuple[str, str]]:
    """(shard, key) of every sample, as tarfile lists them."""
    return {(Path(s).name, name.split(".")[0]) for s in shards for name in tarfile.open(s).getnames()}


def epoch_names(streams: Streams, epoch: int) -> Counter[tuple[str, str]]:
    seen: Counter[tuple[str, str]] = Counter()
    for stream in range(streams.count):
        for row in streams.rows(stream, Cursor()):
            if row.documents[0].epoch > epoch:
                break
            seen.update((d.sample.shard, d.sample.key) for d in row.documents if d.epoch == epoch)
    return seen


def tar_of(names: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def with_size(content: bytearray, size: bytes) -> bytes:
    changed = bytearray(content)
    changed[124:136] = size
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed[:512])
    return bytes(changed)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()
