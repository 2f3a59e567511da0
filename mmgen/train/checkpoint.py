"""Checkpoints: written under a temporary name, hashed, renamed; state as named fragments in safetensors.

A checkpoint folder holds config.json (the model), tokenizer.json, trainer.json (step, data position, settings),
state-00000.safetensors with keys `kind|parameter|start` (weight, exp_avg, exp_avg_sq, ema; flat slices from element
`start` on), and manifest.json with the SHA-256 of each file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmgen.config import Config, differences
from mmgen.data.order import Position
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.tokenizer import Tokenizer
from mmgen.train.optimizer import EMA

MOMENTS = ("exp_avg", "exp_avg_sq", EMA)
STATE = "state-00000.safetensors"


def save(
    folder: Path,
    step: int,
    model: MMGenModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    config: Config,
    trainer: dict[str, Any],
) -> Path:
    """Write `folder/step-N`, point `latest` at it and drop old ones; returns the new folder.

    A crash at any moment leaves the previous checkpoint and `latest` as they were.
    """
    final, temporary = folder / f"step-{step}", folder / f".step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fragments: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        fragments[f"weight|{name}|0"] = p.detach().float().flatten()
        state = optimizer.state.get(p, {})
        for kind in MOMENTS:
            if kind in state:
                fragments[f"{kind}|{name}|0"] = state[kind].flatten()
    save_file({key: value.contiguous().cpu() for key, value in fragments.items()}, temporary / STATE)
    model.config.save_pretrained(temporary)
    tokenizer.save(temporary / "tokenizer.json")
    record = {"step": step, "config": config.model_dump(mode="json"), **trainer}
    (temporary / "trainer.json").write_text(json.dumps(record, indent=1))
    manifest = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    link = folder / ".latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, folder / "latest")
    _sync(folder)
    for old in sorted(folder.glob("step-*"), key=_number)[: -config.train.keep_last]:
        if old != final:
            shutil.rmtree(old)
    return final


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None where there is none.

    Raises:
        ValueError: steps are there but `latest` does not lead to one; starting anew would overwrite the run.
    """
    link = run / "checkpoints" / "latest"
    if link.exists():
        return link.resolve()
    others = sorted(link.parent.glob("step-*"), key=_number)
    if others or link.is_symlink():
        fix = f"point it at {others[-1].name}" if others else f"delete {link} to start anew"
        raise ValueError(f"{link} does not lead to a checkpoint: {fix}, or choose another run.dir")
    return None


def read_trainer(folder: Path) -> dict[str, Any]:
    """Verify every file against the manifest and return trainer.json.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a checkpoint of mmgen ({error})") from None
    for name, digest in manifest.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise ValueError(
                f"checkpoint file {folder / name} is missing or damaged: delete {folder} and point "
                f"{folder.parent / 'latest'} at an older step, or train again"
            )
    trainer: dict[str, Any] = json.loads((folder / "trainer.json").read_text())
    return trainer


def check_same_run(trainer: dict[str, Any], config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Raise ValueError where the tokenizer, or settings that shape weights or data order, are not the checkpoint's."""

    def shape(settings: dict[str, Any]) -> dict[str, Any]:
        data = {k: v for k, v in settings["data"].items() if k not in ("workers", "max_bad_fraction", "val")}
        train = {"batch_rows": settings["train"]["batch_rows"]}
        seed = {"seed": settings["run"]["seed"]}
        return {
            "run": seed,
            "data": data,
            "model": settings["model"],
            "objective": settings["objective"],
            "train": train,
        }

    _refuse(differences(shape(config.model_dump(mode="json")), shape(_settings(trainer, folder))), folder)
    if Tokenizer.load(folder / "tokenizer.json", config.model.patcher.grids) != tokenizer:
        raise ValueError(
            f"{config.data.tokenizer} is not the tokenizer of the checkpoint {folder}: its ids would mean other words. "
            f"Copy {folder / 'tokenizer.json'} back, or choose another run.dir to start a new run"
        )


def check_same_model(trainer: dict[str, Any], config: Config, folder: Path) -> None:
    """Raise ValueError where the model or the objective that is asked for is not the checkpoint's."""

    def shape(settings: dict[str, Any]) -> dict[str, Any]:
        return {name: settings[name] for name in ("model", "objective")}

    _refuse(differences(shape(config.model_dump(mode="json")), shape(_settings(trainer, folder))), folder)


def _settings(trainer: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings stored with a checkpoint; those that are younger than it have their defaults."""
    try:
        return Config.model_validate(trainer["config"]).model_dump(mode="json")
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise ValueError(
            f"the checkpoint {folder} was written with settings that this version does not know: {fields}"
        ) from None


def _refuse(changed: list[str], folder: Path) -> None:
    if changed:
        raise ValueError(
            f"the checkpoint {folder} belongs to another configuration: {'; '.join(changed)}. "
            "Restore these settings, or choose another run.dir to start a new run"
        )


def restore(folder: Path, model: MMGenModel, optimizer: torch.optim.Optimizer) -> None:
    """Load weights, moments and averages into a model and its optimiser."""
    with safe_open(folder / STATE, framework="pt") as state:
        keys = set(state.keys())
        steps = json.loads((folder / "trainer.json").read_text())["optimizer_steps"]
        for name, p in model.named_parameters():
            p.data.copy_(state.get_tensor(f"weight|{name}|0").view_as(p))
            for kind in MOMENTS:
                if f"{kind}|{name}|0" in keys:
                    tensor = state.get_tensor(f"{kind}|{name}|0").view(p.shape).to(p.device)
                    optimizer.state[p][kind] = tensor
                    optimizer.state[p].setdefault("step", torch.tensor(float(steps), device=p.device))


def load_model(folder: Path, averaged: bool = True) -> tuple[MMGenModel, Tokenizer]:
    """The model and tokenizer of a checkpoint, by default with averaged weights."""
    read_trainer(folder)
    model = MMGenModel(MMGenConfig.from_pretrained(folder))
    with safe_open(folder / STATE, framework="pt") as state:
        keys = set(state.keys())
        for name, p in model.named_parameters():
            key = f"{EMA}|{name}|0" if averaged and f"{EMA}|{name}|0" in keys else f"weight|{name}|0"
            p.data.copy_(state.get_tensor(key).view_as(p))
    return model.eval(), Tokenizer.load(folder / "tokenizer.json", model.patcher.grids)


def position_of(trainer: dict[str, Any]) -> Position:
    """Where the checkpoint's run stands in its data."""
    return Position(**trainer["position"])


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
