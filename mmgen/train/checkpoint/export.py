"""Exports a checkpoint as a Hugging Face folder, and reads such a folder."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmgen.config import Config
from mmgen.data.order import Position
from mmgen.model import MMGenModel
from mmgen.sequence.tokenizer import BOS, EOS, PAD, Tokenizer
from mmgen.train.checkpoint import posthoc
from mmgen.train.checkpoint.read import load_model, read_trainer
from mmgen.train.state import TrainerState

INDEX = "model_index.json"
"""The file by which tools of diffusers recognise the folder of a pipeline."""
FACTS = "mmgen.json"
"""The file of an exported folder with step, kind of weights and settings of the run."""


def export(run: Path, folder: Path, out: Path, weights: str, text_only: bool = False) -> None:
    """Write config.json, model.safetensors and the tokenizer, for `MMGenModel.from_pretrained` and `AutoTokenizer`.

    With `text_only`, the model is the backbone alone, for `AutoModelForCausalLM.from_pretrained`; it computes the same
    logits of text, and keeps the ids of image tokens.

    `weights` is a kind of weights in the checkpoint `folder` (`ema`, `weight`, ...), or `power:WIDTH` for a
    power-function EMA of any relative width, computed from all kept checkpoints of `run`.

    Raises:
        ValueError: a file is damaged, or the checkpoint has no such weights.
    """
    kind, separator, width = weights.partition(":")
    model, tokenizer = load_model(folder, "weight" if separator else weights)
    if separator:
        if kind != "power":
            raise ValueError(
                f"unknown weights '{weights}': set sample.weights to ema, weight, another stored EMA, or power:WIDTH"
            )
        posthoc.fill(model, run, folder, float(width))
    for name in (FACTS, INDEX):  # a folder is read only if it has the first, which is written last
        (out / name).unlink(missing_ok=True)
    (model.backbone if text_only else model).save_pretrained(out)
    tokenizer.save(out / "tokenizer.json")
    if tokenizer.roles.described is None:
        special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
        (out / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    if text_only:
        return
    state = read_trainer(folder)
    index = {"_class_name": "MMGenPipeline", "_library_name": "mmgen", "_mmgen_version": version("mmgen")}
    (out / INDEX).write_text(json.dumps(index, indent=1))
    facts = {"step": state.step, "weights": weights, "train_seconds": state.train_seconds, "config": state.config}
    (out / FACTS).write_text(json.dumps(facts))


def is_export(folder: Path) -> bool:
    """Whether `export` wrote this folder."""
    return (folder / FACTS).is_file()


def read_settings(folder: Path) -> Config:
    """The settings of the run that was exported, with the exported kind of weights; raises ValueError as `_facts`."""
    facts = _facts(folder)
    config = Config.model_validate(facts["config"])
    return config.model_copy(update={"sample": config.sample.model_copy(update={"weights": facts["weights"]})})


def read_export(folder: Path, weights: str) -> tuple[MMGenModel, Tokenizer, TrainerState]:
    """The model, in evaluation mode, the tokenizer and the step of an exported folder.

    Raises:
        ValueError: the folder holds other weights than `weights`, or a file is missing or damaged.
    """
    facts = _facts(folder)
    if facts["weights"] != weights:
        raise ValueError(
            f"{folder} holds the weights '{facts['weights']}', but sample.weights is '{weights}': leave the setting "
            "out, or export the run again"
        )
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} is incomplete: it needs config.json and model.safetensors. Export the run again")
    model = MMGenModel.from_pretrained(folder).eval()
    state = TrainerState(
        step=facts["step"],
        config=facts["config"],
        position=Position(),
        optimizer_steps=facts["step"],
        train_seconds=facts.get("train_seconds", 0.0),
    )
    return model, Tokenizer.load(folder / "tokenizer.json", model.patcher.grids), state


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{folder} was not written by `mmgen export`: no {FACTS} ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{path} is damaged: it is not JSON. Export the run again") from None
    if missing := {"step", "weights", "config"} - set(facts):
        raise ValueError(f"{path} is damaged: {', '.join(sorted(missing))} is missing. Export the run again")
    return facts
