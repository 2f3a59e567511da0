"""Reads checkpoints: finds the one to continue from, verifies it, compares its settings, and loads its weights.

A checkpoint folder holds config.json (the model), tokenizer.json, trainer.json (step, data position, settings), one
state-RANK.safetensors per process with named fragments (`fragments.py`), and manifest.json with the SHA-256 of each
file. `write.py` writes it. Nothing in it is unpickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from mmgen.config import OBJECTIVE_SETTINGS, Config
from mmgen.image.latent import AutoencoderFacts
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint.fragments import Store
from mmgen.train.checkpoint.write import sha256
from mmgen.train.engine import Engine
from mmgen.train.optimizer import EMA
from mmgen.train.ranks import Ranks
from mmgen.train.state import TrainerState


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files are verified, and its trainer.json."""

    folder: Path
    state: TrainerState


def latest(run: Path) -> Path | None:
    """The checkpoint that `latest` points to, else the newest one of a run folder; None if there is none."""
    folders = candidates(run)
    return folders[0] if folders else None


def candidates(run: Path) -> list[Path]:
    """All checkpoints of a run in the order to try them: `latest` first, then from the newest to the oldest."""
    link = run / "checkpoints" / "latest"
    steps = sorted(link.parent.glob("step-*"), key=_number, reverse=True)
    first = [link.resolve()] if link.exists() else []
    return first + [path for path in steps if path.resolve() not in first]


def newest_good(
    run: Path, report: Callable[[str], None] | None = None, ranks: Ranks | None = None
) -> Checkpoint | None:
    """The first candidate without damage, or None if the run has no checkpoint; each rank verifies some of the files.

    Raises:
        ValueError: all checkpoints are damaged; a run started from step 1 would overwrite them.
    """
    ranks = ranks or Ranks()
    problems: list[str] = []
    for folder in ranks.gather_objects(candidates(run))[0]:
        state: TrainerState | None = None
        problem = ""
        try:
            state = read_trainer(folder, ranks.rank, ranks.world)
        except ValueError as error:
            problem = str(error)
        damage = [text for text in ranks.gather_objects(problem) if text]
        if state is not None and not damage:
            return Checkpoint(folder, state)
        problems.append(damage[0])
        (report or ranks.print)(f"{damage[0]}; trying an older one")
    if problems:
        raise ValueError(
            f"all checkpoints of {run} are damaged: {problems[0]}. Choose another run.dir to start a new run"
        )
    return None


def clean(run: Path) -> None:
    """Remove temporary files that a killed save left."""
    for path in (run / "checkpoints").glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_trainer(folder: Path, rank: int = 0, world: int = 1) -> TrainerState:
    """Verify the files of a checkpoint against its manifest, and read trainer.json.

    With several ranks, each verifies every `world`-th file.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except OSError as error:
        inside = folder / "checkpoints" / "latest"
        hint = f": give {inside}" if inside.exists() else ""
        raise ValueError(f"{folder} is not a checkpoint of mmgen: no manifest.json ({error.strerror}){hint}") from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder} is not a checkpoint of mmgen: its manifest.json is damaged")
    for name, digest in sorted(manifest.items())[rank::world]:
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"checkpoint file {folder / name} is missing or damaged")
    return _trainer_state(folder / "trainer.json")


def _trainer_state(path: Path) -> TrainerState:
    try:
        return TrainerState.from_json(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, item["loc"])) or "all" for item in error.errors())
        raise ValueError(f"{path} is damaged: these keys are wrong or missing: {keys}") from None
    except ValueError:
        raise ValueError(f"{path} is damaged: it is not JSON") from None


def check_same_run(stored: Checkpoint, config: Config, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer, or a setting that affects weights or data order, has changed."""

    def shape(settings: Config) -> dict[str, object]:
        return {
            "run": {"seed": settings.run.seed},
            "data": settings.data.model_dump(mode="json", exclude={"workers", "max_bad_fraction", "val"}),
            **_model_shape(settings),
            "train": {"batch_rows": settings.train.batch_rows, "optimizer": settings.train.optimizer},
        }

    _refuse(differences(shape(config), shape(_settings(stored))), stored.folder)
    check_same_model(stored, config)
    path = stored.folder / "tokenizer.json"
    if Tokenizer.load(path, config.model.patcher.grids) != tokenizer:
        raise ValueError(
            f"{config.data.tokenizer} is not the tokenizer of the checkpoint {stored.folder}: the same ids mean other "
            f"words. Set data.tokenizer to {path}, or choose another run.dir to start a new run"
        )


def check_same_data(stored: Checkpoint, fingerprint: str) -> None:
    """Raise ValueError if the training shards, which determine the order of documents, differ from the checkpoint's."""
    if stored.state.data not in ("", fingerprint):
        raise ValueError(
            f"the training shards are not those of the checkpoint {stored.folder}: names or contents have changed, and "
            "so has the order of documents. Restore the shards, or start a new run from its weights (train.init_from)"
        )


def check_same_model(stored: Checkpoint, config: Config) -> None:
    """Raise ValueError if the settings of the model or the objective differ from the checkpoint's."""
    _refuse(differences(_model_shape(config), _model_shape(_settings(stored))), stored.folder)
    if config.model.positions not in (None, stored.state.positions):
        changed = f"model.positions ({config.model.positions!r} here, {stored.state.positions!r} there)"
        _refuse([changed], stored.folder)
    facts, vae = stored.state.autoencoder, config.model.patcher.vae
    for name in ("mean", "std"):
        value = getattr(vae, name)
        if facts is not None and value is not None and value != getattr(facts, name):
            changed = f"model.patcher.vae.{name} ({value} here, {getattr(facts, name)} there)"
            _refuse([changed], stored.folder)


def describe_finished(stored: Checkpoint, config: Config) -> str:
    """Lines for a run that has all its steps: settings that differ from the stored ones, and how to train longer."""
    state = stored.state
    lines = [
        f"{config.run.dir} is trained: it is finished at step {state.step}, and train.steps is {config.train.steps}."
    ]
    here, there = (
        {**settings.model_dump(mode="json", exclude={"eval"}), "run": {"seed": settings.run.seed}}
        for settings in (config, _settings(stored))
    )
    if changed := differences(here, there):
        lines.append(f"These settings differ from those of the run, and have no effect: {'; '.join(changed)}.")
    lines.append(f"To continue this run, set train.steps above {state.step}. To train a new run, set another run.dir.")
    return "\n".join(lines)


def describe_changes(stored: Checkpoint, config: Config) -> list[str]:
    """A line about the settings with which a run continues and that differ from those of its checkpoint."""
    names = ("data", "objective", "train", "sample")
    here, there = (
        {name: values for name, values in settings.model_dump(mode="json").items() if name in names}
        for settings in (config, _settings(stored))
    )
    changed = differences(here, there)
    return [f"continuing from step {stored.state.step} with changed settings: {'; '.join(changed)}"] if changed else []


def _model_shape(settings: Config) -> dict[str, object]:
    """Settings that affect the model, without the sections of objectives that are not chosen.

    Positions and statistics of latents are left out: they are facts of the run, and `check_same_model` compares them.
    """
    model = settings.model.model_dump(mode="json", exclude={"positions"})
    for name in ("mean", "std"):
        del model["patcher"]["vae"][name]
    objective = settings.objective
    shared = objective.model_dump(mode="json", exclude={*OBJECTIVE_SETTINGS, "others"})
    return {"model": model, "objective": {**shared, objective.kind: objective.section.model_dump(mode="json")}}


def known_facts(config: Config) -> AutoencoderFacts | None:
    """Facts of the autoencoder from the run's newest checkpoint; None without a checkpoint, and for pixels."""
    folder = latest(config.run.dir)
    return stored_facts(folder) if folder else None


def stored_facts(folder: Path) -> AutoencoderFacts | None:
    """Facts of the autoencoder in a checkpoint's trainer.json, the only file that is read; raises ValueError."""
    return _trainer_state(folder / "trainer.json").autoencoder


def settings_of(folder: Path) -> Config:
    """The settings that are stored with a checkpoint; raises ValueError if a file is damaged."""
    return _settings(Checkpoint(folder, _trainer_state(folder / "trainer.json")))


def _settings(stored: Checkpoint) -> Config:
    """The settings stored with a checkpoint; settings that were added later have their defaults."""
    try:
        return Config.model_validate(stored.state.config)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise ValueError(
            f"the checkpoint {stored.folder} has settings that this version of mmgen does not have: {fields}. "
            "Use the version that wrote it"
        ) from None


def _refuse(changed: list[str], folder: Path) -> None:
    if changed:
        raise ValueError(
            f"the checkpoint {folder} belongs to another configuration: {'; '.join(changed)}. "
            "Restore these settings, or choose another run.dir to start a new run"
        )


def restore(stored: Checkpoint, engine: Engine) -> None:
    """Load weights, moments, averaged weights and buffers into an engine.

    Each rank reads the stored fragments that overlap its own. The checkpoint may come from another number of processes
    and another ZeRO stage.

    Raises:
        ValueError: the checkpoint lacks some of the weights.
    """
    store = Store(stored.folder)
    kinds = store.kinds()
    if "exp_avg" in kinds:
        engine.create_state(stored.state.optimizer_steps)
    states = engine.optimizer.state
    with torch.no_grad():
        for fragment in engine.fragments:
            moments = {kind: t for kind, t in states.get(fragment.flat, {}).items() if kind in kinds}
            for kind, tensor in {**moments, "weight": fragment.flat}.items():
                if kind == "weight" or store.numel(kind, fragment.name):
                    read = store.read(kind, fragment.name, fragment.start, fragment.numel)
                    fragment.of(tensor).copy_(read)
        for name, buffer in engine.model.named_buffers():
            if name in store.names("buffer"):
                buffer.copy_(store.whole("buffer", name))
    engine.refresh()


def restore_random(folder: Path, ranks: Ranks, step: int) -> None:
    """Restore this rank's random state; if the number of ranks has changed, seed it with the step and the rank."""
    store = Store(folder)
    if len(store.names("rng")) == ranks.world:
        torch.set_rng_state(store.whole("rng", str(ranks.rank)))
        if torch.cuda.is_available() and store.names("rng_cuda"):
            torch.cuda.set_rng_state(store.whole("rng_cuda", str(ranks.rank)))
    else:
        torch.manual_seed(hash((step, ranks.rank)) % 2**63)


def load_model(folder: Path, weights: bool | str = True) -> tuple[MMGenModel, Tokenizer]:
    """The model, in evaluation mode, and the tokenizer of a checkpoint.

    `weights` is True for the EMA, False for plain weights, or the name of weights in the checkpoint.

    Raises:
        ValueError: a file is damaged, or the checkpoint has no weights of that name.
    """
    read_trainer(folder)
    store = Store(folder)
    kind = weights if isinstance(weights, str) else EMA if weights else "weight"
    if kind not in store.kinds() and kind != EMA:
        known = ", ".join(sorted(k for k in store.kinds() if k.startswith((EMA, "power", "weight"))))
        raise ValueError(f"checkpoint {folder} has no weights '{kind}' (sample.weights); it has {known}")
    model = MMGenModel(MMGenConfig.from_pretrained(folder))
    store.fill(model, kind)
    return model.eval(), Tokenizer.load(folder / "tokenizer.json", model.patcher.grids)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def differences(one: object, other: object, prefix: str = "") -> list[str]:
    """Descriptions `name (value here, value there)` of all dotted names under which two nested mappings differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names: list[str] = []
        for key in sorted({*one, *other}):
            names += differences(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else str(key))
        return names
    return [] if one == other else [f"{prefix} ({one!r} here, {other!r} there)"]
