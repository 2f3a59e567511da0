"""Every setting of mmgen, typed. No other file defines one.

A run is described by one YAML file whose keys are the fields below; `load` reads it. The command line
overrides single fields with dotted names (`--train.steps 2000`).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Prediction = Literal["x", "eps", "v", "score", "v_sh"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    def check(self) -> None:
        """Raise ValueError where fields do not fit each other; every section is checked when it is made."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self.check()
        return self


class RunConfig(Settings):
    """Where a run lives and what makes it repeatable."""

    dir: Path = Path("runs/default")
    """Run folder: config, metrics, samples, checkpoints and reports."""
    seed: int = 0
    """Seed of initial weights, data order and every random draw."""


class LimitsConfig(Settings):
    """What a shard or a sample may cost before it counts as bad."""

    member_bytes: Positive = 64 * 2**20
    """Largest member of a shard that is read."""
    shard_bytes: Positive = 2**38
    """What a compressed shard may unpack to."""
    ratio: Positive = 200
    """How many times its size a compressed shard may unpack to."""
    pixels: Positive = 50_000_000
    """Largest image that is decoded, in pixels."""
    caption_chars: Positive = 100_000
    """Longest text of one sample, in characters."""


class SourceConfig(Settings):
    """One part of a mixture."""

    shards: list[str]
    """Paths, URLs, brace patterns or globs."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of documents drawn from it, relative to the other sources."""


class DataConfig(Settings):
    """What is trained on, and how documents become rows."""

    train: list[str | SourceConfig] = []
    """Training shards: paths, URLs, brace patterns or globs of tars; `{shards: ..., weight: ...}` for a mixture."""
    val: list[str] = []
    """Validation shards, never trained on."""
    limits: LimitsConfig = LimitsConfig()
    """Caps on what is read and decoded."""
    captionless: Literal["refuse", "keep"] = "refuse"
    """An image without text: a bad sample, or a document of an image alone."""
    clean_captions: bool = False
    """Unescape HTML, drop tags and links, and collapse white space in captions."""
    resize: Literal["lanczos", "area"] = "lanczos"
    """Filter that scales images of other sizes."""
    crop: Literal["center", "random"] = "center"
    """Which part of an image of another shape is kept."""
    block: Positive = 16
    """Neighbours in a shard that stay together in the order, within one window; reads stay sequential."""
    cache_dir: Path = Path("~/.cache/mmgen")
    """Where indexes go that cannot stand beside their shards, and compressed shards are unpacked."""
    cache_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    """Decoded samples that each loader process keeps."""
    tokenizer: Path = Path("tokenizer.json")
    """A `tokenizers` file; mmgen adds its own special tokens on top of it."""
    row_length: Positive = 128
    """Positions per packed row."""
    image_first: Fraction = 0.2
    """Share of captioned images whose image stands before the caption."""
    caption_drop: Fraction = 0.1
    """Share of caption-first documents that lose their caption (for classifier-free guidance)."""
    overlong: Literal["refuse", "truncate"] = "refuse"
    """A document longer than a row: stop and name it, or cut its text."""
    max_bad_fraction: Fraction = 0.01
    """Unreadable samples are skipped and logged; a larger share than this stops the run."""
    window: Positive = 4096
    """Documents shuffled and packed together; rows never mix two windows. Streams share it among themselves."""
    streams: Annotated[int, Field(ge=0)] = 0
    """0 orders `train` through indexes; V reads it forward in V streams and needs no index. A number of processes must
    divide V, and V `train.batch_rows`."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes; 0 decodes in the training process."""


def _name_to_backbone(value: object) -> object:
    return {"pretrained": value} if isinstance(value, str) else value


def _read_words(values: object) -> object:
    """Untyped values from the command line are words; read them as YAML does (`5.0`, `false`, `gelu`)."""
    if not isinstance(values, dict):
        return values
    return {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in values.items()}


class BackboneConfig(Settings):
    """A Hugging Face decoder: the name of a pretrained one, or a fresh one of any size."""

    pretrained: str | None = None
    """Hub name or local folder for `AutoModel.from_pretrained`; the fields below are then ignored."""
    model_type: str = "qwen3"
    """Architecture name that `AutoConfig.for_model` knows."""
    hidden_size: Positive = 128
    """Width D."""
    num_hidden_layers: Positive = 4
    """Depth."""
    num_attention_heads: Positive = 4
    """Query heads."""
    num_key_value_heads: Positive = 4
    """Key and value heads (fewer than query heads: grouped-query attention)."""
    intermediate_size: Positive = 256
    """Width of the feed-forward layers."""
    extra: Annotated[dict[str, Any], BeforeValidator(_read_words)] = {}
    """Any further field of that architecture's configuration."""


def _name_to_vae(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class VAEConfig(Settings):
    """The autoencoder of `model.patcher.kind: vae`: frozen, and no part of the model's weights."""

    name: str = ""
    """Hub name or local folder of diffusers' `AutoencoderKL`."""
    subfolder: str = ""
    """Where it lies in that place, such as `vae` in a pipeline's repository."""
    channels: Positive = 4
    """Channels of a latent."""
    factor: Positive = 8
    """Pixels along the side of one latent cell."""
    batch: Positive = 32
    """Images that are encoded or decoded together."""
    mean: list[float] | None = None
    """Subtracted per channel from a latent; absent: as its configuration says, else measured when a run starts."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """What a latent is divided by, per channel; absent: as for `mean`."""

    @model_validator(mode="before")
    @classmethod
    def _without_facts(cls, raw: object) -> object:
        """Earlier versions wrote what a run found of its autoencoder into its settings (see `AutoencoderFacts`)."""
        if isinstance(raw, dict) and "fingerprint" in raw:
            return {name: value for name, value in raw.items() if name not in ("fingerprint", "mean", "std")}
        return raw


class PatcherConfig(Settings):
    """How an image becomes rows of patches, and how those enter and leave the backbone."""

    kind: str = "pixels"
    """What a patch is made of: pixels, or cells of the latent that an autoencoder makes of an image (`vae`)."""
    vae: Annotated[VAEConfig, BeforeValidator(_name_to_vae)] = VAEConfig()
    """The autoencoder of the kind `vae`. A bare name means `name`."""
    channels: int = 3
    """Of images: 1 for grey, 3 for RGB."""
    patch_size: Positive = 4
    """Side of a square patch, in pixels or in cells of the latent."""
    image_sizes: list[tuple[Positive, Positive]] = [(16, 16)]
    """Every (height, width) in pixels that the model may see or draw."""
    projection: str = "linear"
    """How patches enter the backbone's width; `bottleneck` goes through a layer of `bottleneck` channels."""
    bottleneck: Positive = 32
    """Width of the bottleneck projection."""

    @property
    def latent(self) -> bool:
        """Patches are cut out of what an autoencoder makes of an image."""
        return self.kind != "pixels"

    @property
    def side(self) -> int:
        """Side of a patch in pixels of the image."""
        return self.patch_size * (self.vae.factor if self.latent else 1)

    @property
    def pixel_length(self) -> int:
        """Numbers in one patch of the image itself."""
        return self.channels * self.side**2

    @property
    def patch_length(self) -> int:
        """Numbers in one patch row, P."""
        return (self.vae.channels if self.latent else self.channels) * self.patch_size**2

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The patch grid (rows, columns) of each image size."""
        return [(height // self.side, width // self.side) for height, width in self.image_sizes]

    def check(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"model.patcher.channels is {self.channels}, must be 1 (grey) or 3 (RGB)")
        cells = f" of {self.vae.factor} pixels each (model.patcher.vae.factor)" if self.latent else ""
        for height, width in self.image_sizes:
            if height % self.side or width % self.side:
                raise ValueError(
                    f"image size {height}x{width} is not divisible by patch_size {self.patch_size}{cells}: "
                    "change model.patcher.image_sizes or model.patcher.patch_size"
                )
        if self.kind == "vae":
            self._check_vae()
        if not self.image_sizes or len(set(self.image_sizes)) != len(self.image_sizes):
            raise ValueError("model.patcher.image_sizes must name at least one size, each once")

    def _check_vae(self) -> None:
        if not self.vae.name:
            raise ValueError(
                "model.patcher.kind is vae, but no autoencoder is named: set model.patcher.vae.name to a hub name or "
                "to a folder that `python -m data_prep.train_vae` wrote"
            )
        for name, values in (("mean", self.vae.mean), ("std", self.vae.std)):
            if values is not None and len(values) != self.vae.channels:
                raise ValueError(
                    f"model.patcher.vae.{name} has {len(values)} numbers for {self.vae.channels} channels "
                    "(model.patcher.vae.channels)"
                )


class ModelConfig(Settings):
    """Backbone and patcher."""

    backbone: Annotated[BackboneConfig, BeforeValidator(_name_to_backbone)] = BackboneConfig()
    """The transformer. A bare name means `pretrained`."""
    patcher: PatcherConfig = PatcherConfig()
    """The image side."""


class TimeConfig(Settings):
    """How flow time t is drawn in training (t = 0 is noise, t = 1 is data)."""

    distribution: str = "uniform"
    """Distribution of t, before `stratified` spreads the draws."""
    mu: float = 0.0
    """Mean of the logit of t (`logit_normal`)."""
    sigma: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the logit of t (`logit_normal`)."""
    stratified: bool = True
    """Spread the draws of one global step evenly over the quantiles."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, raw: object) -> object:
        """Read `sampler`, the name that `distribution` had in earlier versions."""
        if isinstance(raw, dict) and "sampler" in raw:
            return {**{key: value for key, value in raw.items() if key != "sampler"}, "distribution": raw["sampler"]}
        return raw


class HeadConfig(Settings):
    """MAR's small network that draws one patch given the backbone's hidden state."""

    kind: Literal["flow", "mse"] = "flow"
    """`flow`: a denoiser. `mse`: regression on the clean patch, an ablation that collapses to the mean."""
    depth: Positive = 3
    """Residual blocks."""
    width: Positive = 128
    """Width of the blocks."""


class MaskRatioConfig(Settings):
    """Share of an image's patches that MAR's `masked` order hides: a normal distribution cut to [low, 1]."""

    mean: float = 1.0
    """Mean before the cut."""
    std: Annotated[float, Field(gt=0)] = 0.25
    """Standard deviation before the cut."""
    low: Fraction = 0.7
    """Smallest share."""


class TransfusionConfig(Settings):
    """What only Transfusion has."""

    context: Literal["noisy", "capped", "clean_copy"] = "capped"
    """What later positions see of an image in training: `noisy` (any t), `capped` (t in [cap, 1] where only later text
    describes it) or `clean_copy` (a second, clean copy)."""
    cap: Fraction = 0.5
    """Lower end of t for an image that only later text describes (`capped`)."""


class MARConfig(Settings):
    """What only MAR has. Later positions always see clean images: of the order `masked` a second, clean copy."""

    order: Literal["masked", "random", "raster"] = "masked"
    """How MAR goes through an image: `masked` (bidirectional, several patches a step), or one patch after another."""
    head: HeadConfig = HeadConfig()
    """The denoiser of single patches."""
    draws_per_patch: Positive = 4
    """Times at which each patch is learned in one step."""
    mask_ratio: MaskRatioConfig = MaskRatioConfig()
    """How much of an image the order `masked` hides."""

    @property
    def causal(self) -> bool:
        """One patch is predicted after another."""
        return self.order != "masked"


OBJECTIVE_SETTINGS: dict[str, type[Settings]] = {"transfusion": TransfusionConfig, "mar": MARConfig}
"""Name of an objective to its own settings, which stand in the section `objective.NAME`."""
FLAT = {
    "context": "transfusion", "cap": "transfusion",
    "order": "mar", "head": "mar", "draws_per_patch": "mar", "mask_ratio": "mar",
}  # fmt: skip
"""Keys that earlier versions kept in `objective` itself, and the section that holds each now."""
RENAMED = {"objective.time.sampler": "objective.time.distribution"}
"""Keys that had another name in earlier versions, and their present names."""


class ObjectiveConfig(Settings):
    """How images are learned. `kind` is the one line that an ablation changes: the sections of the kinds that are not
    chosen are checked and ignored."""

    kind: str = "transfusion"
    """Transfusion: the backbone denoises. MAR: the backbone conditions a small denoiser."""
    transfusion: TransfusionConfig = TransfusionConfig()
    """What only Transfusion has."""
    mar: MARConfig = MARConfig()
    """What only MAR has."""
    others: dict[str, dict[str, Any]] = {}
    """Sections of objectives that other code has added to `OBJECTIVE_SETTINGS`; `objective.NAME` is read too."""
    prediction: Prediction = "v"
    """What the network outputs (`v_sh` is Salimans and Ho's alpha eps - sigma x)."""
    loss_space: Prediction = "v"
    """Where the error is measured."""
    path: str = "linear"
    """How data and noise are mixed: alpha and sigma as functions of t."""
    path_options: Annotated[dict[str, Any], BeforeValidator(_read_words)] = {}
    """Arguments of the path, as `{log_snr_min: -10}`."""
    noise_scale: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the noise; large images need more (JiT: image side / 256)."""
    weight: str | None = None
    """Factor of the squared error; `min_snr` is made for the loss space x, `sigmoid` for eps, `sigma_squared` for
    score."""
    lambda_image: Annotated[float, Field(ge=0)] = 5.0
    """Weight of the image loss against the text loss."""
    time: TimeConfig = TimeConfig()
    """Distribution of t."""
    bidirectional: bool | None = None
    """Patches of an image see each other both ways: so by default, except in MAR's causal orders."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Smallest denominator in a training-time conversion between x, eps and v."""

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, raw: object) -> object:
        """Move flat keys of earlier versions, and sections of added objectives, to where they belong."""
        if not isinstance(raw, dict):
            return raw
        raw = in_sections(raw)
        added = {name: raw.pop(name) for name in [*raw] if name in OBJECTIVE_SETTINGS and name not in cls.model_fields}
        others = raw.get("others", {})
        return {**raw, "others": {**others, **added}} if added and isinstance(others, dict) else raw

    @property
    def section(self) -> Settings:
        """The settings of the chosen kind alone."""
        if self.kind in type(self).model_fields:
            chosen: Settings = getattr(self, self.kind)
            return chosen
        return OBJECTIVE_SETTINGS.get(self.kind, Settings).model_validate(self.others.get(self.kind, {}))

    def check(self) -> None:
        """Raise ValueError where fields do not fit each other."""
        for name, values in self.others.items():
            if name not in OBJECTIVE_SETTINGS:
                raise ValueError(f"objective.others.{name}: no such objective ({', '.join(OBJECTIVE_SETTINGS)})")
            try:
                OBJECTIVE_SETTINGS[name].model_validate(values)
            except ValidationError as error:
                wrong = ("objective." + ".".join([name, *map(str, item["loc"])]) for item in error.errors())
                told = (f"{key}: {item['msg']}" for key, item in zip(wrong, error.errors(), strict=True))
                raise ValueError("; ".join(told)) from None
        if self.kind == "mar" and self.mar.causal and self.bidirectional:
            raise ValueError(
                f"objective.bidirectional is true, but in the order '{self.mar.order}' a patch would see itself before "
                "it is predicted: leave it out, or set objective.mar.order to masked"
            )


def in_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """The section `objective` with keys of earlier versions moved into `transfusion` and `mar`.

    Raises:
        ValueError: a flat key belongs to a kind that is not chosen.
    """
    flat = [name for name in FLAT if name in raw]
    if not flat:
        return dict(raw)
    kind = raw.get("kind", "transfusion")
    moved = {name: value for name, value in raw.items() if name not in FLAT}
    for name in flat:
        section = FLAT[name]
        # Earlier versions stored all six, those of the kind that was not chosen too.
        stored = len(flat) == len(FLAT) or kind not in set(FLAT.values())
        if section != kind and not stored and raw[name] is not None:
            raise ValueError(
                f"objective.{name} is a setting of '{section}', but objective.kind is '{kind}': "
                f"write it as objective.{section}.{name}, or leave it out"
            )
        if name == "context" and (raw[name] is None or section != kind):
            continue  # absent means the default; MAR has no choice of context
        own = moved.get(section, {})
        own = own.model_dump() if isinstance(own, Settings) else own
        if not isinstance(own, dict):
            continue  # the section itself is refused later
        value = raw[name]
        if isinstance(value, dict) and isinstance(own.get(name), dict):
            value = {**own[name], **value}
        moved[section] = {**own, name: value}
    return moved


class TrainConfig(Settings):
    """Optimisation."""

    steps: Positive = 1000
    """Optimiser steps of the whole run."""
    batch_rows: Positive = 24
    """Rows of one step, over all processes and micro-steps."""
    micro_rows: Positive | None = None
    """Rows of one forward pass; absent: all rows of this process at once."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    min_lr_ratio: Fraction = 0.05
    """End of the cosine, as a share of `lr`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of linear warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's averaging constants."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's decay, on matrices only."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    ema_decay: Fraction = 0.999
    """Decay of the averaged weights that sampling and evaluation use."""
    ema_more: tuple[Fraction, ...] = ()
    """Decays of further averages, kept as `ema_DECAY`."""
    ema_power: tuple[Annotated[float, Field(gt=0, lt=0.28)], ...] = ()
    """Relative widths of power-function averages (EDM2's sigma_rel), kept as `power_WIDTH`."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: what processes share of optimiser state (1), gradients (2) and weights (3)."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where optimiser state lives between steps (stages 1 to 3; `nvme` needs stage 3 and a GPU)."""
    offload_weights: Literal["none", "cpu", "nvme"] = "none"
    """Where sharded weights live between uses (stage 3; `nvme` needs a GPU)."""
    nvme_path: Path | None = None
    """Folder on a local NVMe disk for `nvme`."""
    deepspeed: Annotated[dict[str, Any], BeforeValidator(_read_words)] = {}
    """Any further field of DeepSpeed's own configuration, merged over ours last."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    timeout: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds after which a phase of a step, or a message between processes, counts as hung."""
    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """At a loss or gradient that is not finite: stop, leave the step out, or go back a checkpoint and leave it out."""
    max_skips: Annotated[int, Field(ge=0)] = 10
    """Steps that a run may leave out before it stops."""
    spike_factor: Annotated[float, Field(gt=1)] = 2.0
    """A loss above this multiple of its recent median is written to spikes.jsonl with the data range of the step."""
    init_from: Path | None = None
    """Checkpoint whose weights a new run starts from; parameters of other shape or name start fresh."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; auto takes bf16 on CUDA and on processors with AMX."""
    compile: bool = False
    """`torch.compile` the backbone's layers (needs a C++ compiler on a CPU)."""
    log_every: Positive = 20
    """Steps between lines of metrics.jsonl."""
    save_every: Positive = 500
    """Steps between checkpoints."""
    save_async: bool = True
    """Write checkpoints while training goes on; needs one more copy of this process's share of the state in memory."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints at multiples of so many steps are kept for good (and make any `power:WIDTH` later); 0 keeps none."""
    val_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations; 0 validates only at the end."""
    sample_every: Annotated[int, Field(ge=0)] = 500
    """Steps between sample grids; 0 draws none."""
    first_sample: Annotated[int, Field(ge=0)] = 0
    """Step of one early sample grid; 0 draws none."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    """Further places for metrics; each needs its package."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak arithmetic of one device for MFU; absent: measured at start."""


class SampleConfig(Settings):
    """How images and text are generated."""

    weights: str = "ema"
    """Which weights of a checkpoint: `ema`, `weight` (not averaged), or a further average such as `ema_0.9999`."""

    steps: Positive = 50
    """Solver steps per image."""
    solver: str = "euler"
    """How the flow is integrated."""
    solver_options: Annotated[dict[str, Any], BeforeValidator(_read_words)] = {}
    """Arguments of the solver, as `{eta: 0.5}` for `ddim`."""
    time_shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1: more of the steps at high noise, as large images need."""
    guidance_scale: float = 2.0
    """Classifier-free guidance: 0 unconditional, 1 conditional, above 1 sharper."""
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Guidance acts only for t inside this range; elsewhere it is 1."""
    guidance_rescale: Fraction = 0.0
    """Share in which a guided velocity takes the standard deviation of the conditional one."""
    guidance_renorm: bool = False
    """Shorten a guided velocity to the norm of the conditional one where it is longer."""
    clean_range: tuple[float, float] | None = None
    """Clip the clean estimate to this range at every step."""
    noise_temperature: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the noise that stochastic solvers add; below 1 images vary less."""
    unmask_steps: Positive = 16
    """Backbone calls per image in MAR's order `masked`; each reveals some patches."""
    guidance_ramp: Literal["linear", "constant"] = "linear"
    """How MAR's guidance grows from 1 to `guidance_scale` with the share of patches that are drawn."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of text; 0 is greedy."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample text among the k likeliest tokens; 0 among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample text among the likeliest tokens that together have this probability."""
    min_p: Fraction = 0.0
    """Sample text among tokens at least this likely, relative to the likeliest."""
    max_new_tokens: Positive = 64
    """Text tokens generated per prompt."""
    max_images: Annotated[int, Field(ge=0)] = 1
    """Images generated per prompt."""

    def check(self) -> None:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"sample.guidance_interval must rise, as in [0.1, 1], got [{low}, {high}]")
        if self.clean_range is not None and not self.clean_range[0] < self.clean_range[1]:
            raise ValueError(f"sample.clean_range must rise, as in [-1, 1], got {list(self.clean_range)}")


class EvalConfig(Settings):
    """How a trained model is scored."""

    task: str = "digits"
    """What the images show, and how they are judged."""
    judge: list[str] = []
    """Shards of single digits that train the judge; disjoint from the generator's data."""
    test: list[str] = []
    """Shards of real images and captions, never trained on."""
    heldout: list[str] = []
    """Shards whose captions combine attributes that training never combined."""
    samples: Positive = 500
    """Captions drawn; all test images are captioned."""
    batch: Positive = 128
    """Prompts decoded together."""


class Config(Settings):
    """One run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()

    def check(self) -> None:
        streams, rows = self.data.streams, self.train.batch_rows
        if streams and rows % streams:
            raise ValueError(
                f"train.batch_rows is {rows} and data.streams {streams}, but every stream gives a step equally many "
                f"rows: set train.batch_rows to {-(-rows // streams) * streams}, or data.streams to a divisor of {rows}"
            )
        weights = {source.weight if isinstance(source, SourceConfig) else 1.0 for source in self.data.train}
        if streams and len(weights) > 1:
            raise ValueError(
                "data.streams reads all shards alike, but data.train has sources of different weight: "
                "set data.streams to 0, or leave the weights out"
            )

    def check_processes(self, world: int) -> None:
        """Raise ValueError where a run of `world` processes cannot have these settings."""
        streams = self.data.streams
        if streams % world:
            fitting = [n for n in range(1, streams + 1) if streams % n == 0]
            raise ValueError(
                f"data.streams is {streams}, which {world} processes cannot share evenly, and a stream has one reader: "
                f"start {' or '.join(map(str, fitting[-4:]))} processes, or begin a new run with "
                f"data.streams {-(-streams // world) * world}"
            )


def nearest(name: str, known: list[str]) -> str | None:
    """The known name most like `name`, or None where nothing comes close."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def choose(registry: dict[str, Any], name: str, what: str) -> Any:
    """Look `name` up in a registry; a wrong name raises a ValueError that lists the right ones."""
    if name not in registry:
        near = nearest(name, list(registry))
        hint = f", did you mean '{near}'?" if near else ""
        raise ValueError(f"unknown {what} '{name}'{hint} (one of: {', '.join(registry)})")
    return registry[name]
