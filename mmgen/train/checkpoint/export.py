"""Exports a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

from mmgen.sequence.tokenizer import BOS, EOS, PAD
from mmgen.train.checkpoint import posthoc
from mmgen.train.checkpoint.read import load_model, read_trainer


def export(run: Path, folder: Path, out: Path, weights: str) -> None:
    """Write config.json, model.safetensors and the tokenizer, for `MMGenModel.from_pretrained` and `AutoTokenizer`.

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
    model.save_pretrained(out)
    tokenizer.save(out / "tokenizer.json")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (out / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    state = read_trainer(folder)
    (out / "mmgen.json").write_text(json.dumps({"step": state.step, "weights": weights, "config": state.config}))
