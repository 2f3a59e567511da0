"""A checkpoint as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

from mmgen.sequence.tokenizer import BOS, EOS, PAD
from mmgen.train.checkpoint import posthoc
from mmgen.train.checkpoint.read import load_model, read_trainer


def export(run: Path, folder: Path, out: Path, weights: str) -> None:
    """Write config.json, model.safetensors and the tokenizer; `MMGenModel.from_pretrained` and `AutoTokenizer` read it.

    `weights` names what the checkpoint has (`ema`, `weight`, ...), or `power:WIDTH` for a power-function average of any
    relative width, made from all kept checkpoints.

    Raises:
        ValueError: a file is damaged, or the weights are not there.
    """
    wanted = weights.partition(":")
    model, tokenizer = load_model(folder, "weight" if wanted[1] else weights)
    if wanted[1]:
        if wanted[0] != "power":
            raise ValueError(f"weights '{weights}' are unknown: say ema, weight, a stored average, or power:WIDTH")
        posthoc.fill(model, run, folder, float(wanted[2]))
    model.save_pretrained(out)
    tokenizer.save(out / "tokenizer.json")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (out / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    state = read_trainer(folder)
    (out / "mmgen.json").write_text(json.dumps({"step": state.step, "weights": weights, "config": state.config}))
