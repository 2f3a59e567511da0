"""State on disk: safetensors files of fragments `kind|parameter|start`, which any number of processes can read.

There is one file per rank. `kind` is weight, exp_avg, exp_avg_sq or the name of averaged weights; `start` is the first
element in the flattened parameter. Buffers are `buffer|name|0`, and a rank's random state is `rng|RANK|0`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8",
         torch.float64: "F64", torch.int32: "I32", torch.bool: "BOOL"}  # fmt: skip
CHUNK = 16 * 2**20


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write contiguous CPU tensors as a safetensors file and sync it to disk; returns its SHA-256.

    The writer of the safetensors library copies every tensor and holds Python's lock, so training would have to wait.
    """
    header: dict[str, dict[str, object]] = {}
    at = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[key] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for piece in (len(head).to_bytes(8, "little"), head):
            digest.update(piece)
            file.write(piece)
        for tensor in tensors.values():
            data: Any = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for begin in range(0, len(data), CHUNK):
                rest = data[begin : begin + CHUNK]
                digest.update(rest)
                while rest:
                    rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


class Store:
    """The fragments of a checkpoint folder, from all ranks that wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {path.name: safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))}
        self._index: dict[tuple[str, str], list[tuple[int, int, str, str]]] = defaultdict(list)
        for file, opened in self._files.items():
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                if key.count("|") == 2:
                    kind, name, start = key.split("|")
                    numel = math.prod(opened.get_slice(key).get_shape())
                    self._index[kind, name].append((int(start), int(start) + numel, file, key))

    def names(self, kind: str) -> list[str]:
        """Names of the parameters that have this kind of state."""
        return [name for stored, name in self._index if stored == kind]

    def kinds(self) -> set[str]:
        """All kinds of state in the checkpoint."""
        return {kind for kind, _ in self._index}

    def numel(self, kind: str, name: str) -> int:
        """Number of stored elements of a parameter; 0 if it is not stored."""
        return max((end for _, end, _, _ in self._index.get((kind, name), [])), default=0)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter, joined from fragments of any ranks.

        Raises:
            ValueError: some of the elements are not in the checkpoint.
        """
        parts: list[tuple[int, Tensor]] = []
        for begin, end, file, key in self._index.get((kind, name), []):
            low, high = max(begin, start), min(end, start + numel)
            if low < high:
                parts.append((low, self._files[file].get_slice(key)[low - begin : high - begin]))
        parts.sort(key=lambda part: part[0])
        ends = [low + len(part) for low, part in parts]
        if [low for low, _ in parts] != [start, *ends[:-1]] or (ends or [start])[-1] != start + numel:
            raise ValueError(f"checkpoint {self.folder} lacks elements of {kind} of parameter {name}")
        return torch.cat([part for _, part in parts]) if len(parts) != 1 else parts[0][1]

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole parameter, flattened, or a whole buffer."""
        (first, *others) = self._index[kind, name]
        if not others:
            return torch.as_tensor(self._files[first[2]].get_tensor(first[3]))
        return self.read(kind, name, 0, self.numel(kind, name))

    def fill(self, model: torch.nn.Module, kind: str, transform: Callable[[str], Tensor] | None = None) -> None:
        """Copy whole parameters and buffers into a model on one process.

        A parameter without this kind of state gets its plain weights. `transform` returns the values of a parameter by
        name, instead of the stored ones.
        """
        for name, p in model.named_parameters():
            chosen = kind if (kind, name) in self._index else "weight"
            p.data.copy_((self.whole(chosen, name) if transform is None else transform(name)).view_as(p))
        for name, buffer in model.named_buffers():
            if ("buffer", name) in self._index:
                buffer.copy_(self.whole("buffer", name))
