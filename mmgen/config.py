"""Every setting of mmgen, with its type, default and description.

One YAML file describes a run. Its keys are the fields below, and `mmgen.config_io.load` reads it. On the command line,
a flag with a dotted name overrides a single field (`--train.steps 2000`).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mmgen.expression import condition

Prediction = Literal["x", "eps", "v", "score", "v_sh"]
Positions = Literal["shared", "raster", "axial"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
ImageLoss = Literal["patch", "image"]
Count = TypeVar("Count")
"""A number of patches: a number, or a tensor of numbers."""


class Settings(BaseModel):
    """Base class of all sections. It is immutable and rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    def check(self) -> None:
        """Raise ValueError where fields contradict each other. It runs whenever a section is created."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self.check()
        return self


class BySize(Settings):
    """A value that depends on the size of an image: base * (number of its patches / patches) ** power."""

    base: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The value for an image of `patches` patches."""
    patches: Positive
    """Number of patches of an image for which the value is `base`."""
    power: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    """Power of the number of patches: 0.5 makes the value proportional to the side of the image."""


SizeRule = Annotated[float, Field(gt=0, allow_inf_nan=False)] | BySize
"""A value for every image size, or a rule that computes it from the number of patches."""


def at_size(rule: SizeRule, patches: Count) -> float | Count:
    """The value of a rule for images of this many patches; a number is its own value, whatever the size."""
    if not isinstance(rule, BySize):
        return rule
    count: Any = patches
    value: Count = rule.base * (count / rule.patches) ** rule.power
    return value


class RunConfig(Settings):
    """Folder and seed of a run."""

    dir: Path = Path("runs/default")
    """Run folder: config, metrics, samples, checkpoints and reports."""
    seed: int = 0
    """Seed of the initial weights, of the data order and of every random draw."""


class LimitsConfig(Settings):
    """Limits on the size of a shard and of a sample. A sample beyond a limit counts as bad."""

    member_bytes: Positive = 64 * 2**20
    """Largest size of one file inside a shard, in bytes."""
    shard_bytes: Positive = 2**38
    """Largest unpacked size of a compressed shard, in bytes."""
    ratio: Positive = 200
    """Largest unpacked size of a compressed shard, as a multiple of its compressed size."""
    pixels: Positive = 50_000_000
    """Largest image that is decoded, in pixels (height times width)."""
    caption_chars: Positive = 100_000
    """Longest text of one sample, in characters."""


class SourceConfig(Settings):
    """One source of data: a part of a mixture in `data.train`, or a part with losses of its own in `data.val`."""

    shards: list[str]
    """Shards of this source: paths, URLs, brace patterns or globs."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of documents that are drawn from this source, relative to the other sources; in `data.train` only."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] | None = None
    """Name in the keys of validation losses: letters, digits, `_`, `.` and `-`."""


class DataConfig(Settings):
    """The data, and how it is read and packed into rows."""

    train: list[str | SourceConfig] = []
    """Training shards: paths, URLs, brace patterns or globs, or `{shards: ..., weight: ...}` for a mixture."""
    val: list[str | SourceConfig] = []
    """Validation shards, on which the model is not trained: paths, URLs, brace patterns or globs, or
    `{name: ..., shards: ...}` for a source with validation losses of its own."""
    limits: LimitsConfig = LimitsConfig()
    """Limits on the size of shards and samples."""
    captionless: Literal["refuse", "keep"] = "refuse"
    """How an image without text is read: as a bad sample (`refuse`), or as a document of the image alone (`keep`)."""
    where: str | None = None
    """Condition over the fields of a sample's JSON, and `width` and `height` of its image in pixels, such as
    `similarity > 0.28 and width >= 256`; only samples for which it is true are used."""
    captions: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Fields of captions and their weights, such as `{recaption: 0.8, txt: 0.2}`: each sample's key draws one of those
    that it has; `txt` is the text member, other names are fields of the JSON. If empty, `txt`, else `caption`."""
    clean_captions: bool = False
    """Clean the captions: unescape HTML, remove tags and links, and collapse white space."""
    resize: Literal["lanczos", "area"] = "lanczos"
    """Filter that scales images to a size of `model.patcher.image_sizes`."""
    crop: Literal["center", "random"] = "center"
    """Which part of an image is kept when its aspect ratio differs from the target size."""
    block: Positive = 16
    """Number of neighbouring samples that stay together when a shard is shuffled, so that it is read sequentially."""
    cache_dir: Path = Path("~/.cache/mmgen")
    """Folder for unpacked shards, and for the indexes of shards whose own folder is read-only."""
    cache_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    """Memory for decoded samples in each loader process, in bytes."""
    tokenizer: Path = Path("tokenizer.json")
    """Path of a `tokenizer.json` of the `tokenizers` library; mmgen adds its own special tokens to it."""
    row_length: Positive = 128
    """Length of a packed row, in positions."""
    image_first: Fraction = 0.2
    """Share of captioned images whose document has the image before the caption."""
    caption_drop: Fraction = 0.1
    """Share of documents with a learned image whose text is removed, as classifier-free guidance needs; documents that
    `image_first` turned keep theirs."""
    image_drop: Fraction = 0.0
    """Share of documents with several images that keep all text, and only their last learned image."""
    prompt_drop: Fraction = 0.0
    """Share of documents with a learned image that keep only the last one, without text, as
    `sample.image_guidance_scale` needs."""
    overlong: Literal["refuse", "truncate"] = "refuse"
    """What happens to a document longer than a row: `refuse` stops and names it, `truncate` cuts its text."""
    max_bad_fraction: Fraction = 0.01
    """Largest share of bad samples: they are skipped and logged, and a larger share stops the run."""
    window: Positive = 4096
    """Number of documents that are shuffled and packed into rows together; all streams together use this number."""
    streams: Annotated[int, Field(ge=0)] = 0
    """Number of streams that read the training shards forward without an index; 0 uses indexes. `train.batch_rows` must
    be a multiple of it, and it must be a multiple of the number of processes."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Number of loader processes; 0 decodes in the training process."""

    def check(self) -> None:
        if self.where is not None:
            try:
                condition(self.where)
            except ValueError as error:
                raise ValueError(f"data.where: {error}") from None
        sources = [source for source in self.val if isinstance(source, SourceConfig)]
        names = [source.name for source in sources if source.name is not None]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data.val has several sources named {', '.join(twice)}: give each its own name")
        if any(source.weight != 1 for source in sources):
            raise ValueError(
                "data.val has a source with a weight, but validation reads every document once: leave the weight out"
            )


def _name_to_backbone(value: object) -> object:
    return {"pretrained": value} if isinstance(value, str) else value


def _read_words(values: object) -> object:
    """Parse untyped values of the command line, which are strings, as YAML (`5.0`, `false`, `gelu`)."""
    if not isinstance(values, dict):
        return values
    return {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in values.items()}


class BackboneConfig(Settings):
    """The transformer: a pretrained decoder of Hugging Face, or the sizes of a new one."""

    pretrained: str | None = None
    """Hub name or local folder of a pretrained decoder; if it is set, other keys of `model.backbone` are ignored."""
    model_type: str = "qwen3"
    """Architecture of a new decoder, as a name of transformers' `AutoConfig.for_model`."""
    hidden_size: Positive = 128
    """Width of the hidden states, D."""
    num_hidden_layers: Positive = 4
    """Number of layers."""
    num_attention_heads: Positive = 4
    """Number of attention heads for queries."""
    num_key_value_heads: Positive = 4
    """Number of attention heads for keys and values; fewer than for queries means grouped-query attention."""
    intermediate_size: Positive = 256
    """Width of the feed-forward layers."""
    extra: Annotated[dict[str, Any], BeforeValidator(_read_words)] = {}
    """Further fields of the configuration of that architecture, such as `{attention_bias: true}`."""


def _name_to_vae(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class VAEConfig(Settings):
    """The frozen autoencoder of `model.patcher.kind: vae`. Its weights are not part of the model."""

    name: str = ""
    """Hub name or local folder of a diffusers `AutoencoderKL`."""
    subfolder: str = ""
    """Subfolder of `name` that holds the autoencoder, such as `vae` in the repository of a pipeline."""
    channels: Positive = 4
    """Number of channels of a latent."""
    factor: Positive = 8
    """Downscaling factor: the number of image pixels along the side of one latent pixel."""
    batch: Positive = 32
    """Number of images that are encoded or decoded together."""
    mean: list[float] | None = None
    """Mean of each channel of latents; if null, read from the autoencoder's configuration, else measured."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """Standard deviation of each channel of latents; if null, read or measured as `mean` is."""

    @model_validator(mode="before")
    @classmethod
    def _without_facts(cls, raw: object) -> object:
        """Drop the measurements that earlier versions wrote into the settings (see `AutoencoderFacts`)."""
        if isinstance(raw, dict) and "fingerprint" in raw:
            return {name: value for name, value in raw.items() if name not in ("fingerprint", "mean", "std")}
        return raw


class PatcherConfig(Settings):
    """How an image is cut into patches, and how patches enter and leave the backbone."""

    kind: str = "pixels"
    """What patches are cut from: the pixels of the image, or the latent of an autoencoder (`vae`)."""
    vae: Annotated[VAEConfig, BeforeValidator(_name_to_vae)] = VAEConfig()
    """The autoencoder of the kind `vae`; a string is read as its `name`."""
    channels: int = 3
    """Number of channels of images: 1 for grey, 3 for RGB."""
    patch_size: Positive = 4
    """Side of a square patch, in pixels of the image or of the latent."""
    image_sizes: list[tuple[Positive, Positive]] = [(16, 16)]
    """Image sizes of the model, each as [height, width] in pixels; other images are scaled and cropped."""
    projection: str = "linear"
    """How patches are mapped to the width of the backbone and back."""
    bottleneck: Positive = 32
    """Width of the inner layer of the projection `bottleneck`."""
    conv_channels: Positive = 32
    """Channels at the resolution of pixels in the projections `conv` and `unet`; they double at each step down."""
    conv_depth: Positive = 1
    """Number of residual blocks at each resolution of the projection `unet`, in its way down and in its way up."""

    @property
    def latent(self) -> bool:
        """Whether patches are cut from the latent of an autoencoder."""
        return self.kind != "pixels"

    @property
    def side(self) -> int:
        """Side of a patch, in pixels of the image."""
        return self.patch_size * (self.vae.factor if self.latent else 1)

    @property
    def pixel_length(self) -> int:
        """Number of pixel values of the image that one patch covers."""
        return self.channels * self.side**2

    @property
    def patch_length(self) -> int:
        """Number of values of one patch, P."""
        return (self.vae.channels if self.latent else self.channels) * self.patch_size**2

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Patch grid (rows, columns) of each image size."""
        return [(height // self.side, width // self.side) for height, width in self.image_sizes]

    def check(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"model.patcher.channels is {self.channels}, must be 1 (grey) or 3 (RGB)")
        scale = f" times {self.vae.factor} (model.patcher.vae.factor)" if self.latent else ""
        for height, width in self.image_sizes:
            if height % self.side or width % self.side:
                raise ValueError(
                    f"image size {height}x{width} is not divisible by patch_size {self.patch_size}{scale}: "
                    "change model.patcher.image_sizes or model.patcher.patch_size"
                )
        if self.kind == "vae":
            self._check_vae()
        if not self.image_sizes or len(set(self.image_sizes)) != len(self.image_sizes):
            raise ValueError("model.patcher.image_sizes must list at least one size, and each size once")

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
    """The transformer, and how images enter it."""

    backbone: Annotated[BackboneConfig, BeforeValidator(_name_to_backbone)] = BackboneConfig()
    """The transformer; a string is read as `pretrained`."""
    patcher: PatcherConfig = PatcherConfig()
    """How images are cut into patches."""
    positions: Positions | None = None
    """Positions of the patches of an image: one for all (`shared`), counted line by line (`raster`), or one with row
    and column (`axial`). If null, those of the checkpoint; a new run takes `axial`, or `shared` if the backbone is
    pretrained."""
    position_base: Annotated[float, Field(gt=1)] = 100.0
    """Base of the rotary frequencies of row and column, for `axial`: the longest wavelength is 2 pi times the base."""

    @property
    def chosen_positions(self) -> Positions:
        """The positions of a new run."""
        return self.positions or ("shared" if self.backbone.pretrained else "axial")


class TimeConfig(Settings):
    """How the flow time t is drawn in training."""

    distribution: str = "uniform"
    """Distribution from which the flow time t is drawn in training (t = 0 is noise, t = 1 is data)."""
    mu: float = 0.0
    """Mean of the logit of t, for `logit_normal`; `constant` always uses this value."""
    sigma: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the logit of t, for `logit_normal`."""
    shift: SizeRule = 1.0
    """Shift of t in training; above 1, more of the draws are at high noise, as large images need. A number, or a rule
    by size `{base: 1.0, patches: 64, power: 0.5}`: base * (patches of the image / patches) ** power."""
    stratified: bool = True
    """Spread the draws of one optimiser step evenly over the quantiles, instead of drawing each t independently."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, raw: object) -> object:
        """Read `sampler`, the name that `distribution` had in earlier versions."""
        if isinstance(raw, dict) and "sampler" in raw:
            return {**{key: value for key, value in raw.items() if key != "sampler"}, "distribution": raw["sampler"]}
        return raw


class HeadConfig(Settings):
    """The small network of MAR that draws one patch, given a hidden state of the backbone."""

    kind: Literal["flow", "mse"] = "flow"
    """A denoiser (`flow`), or a regression of the clean patch (`mse`), an ablation whose samples lose variety."""
    depth: Positive = 3
    """Number of residual blocks."""
    width: Positive = 128
    """Width of the residual blocks."""
    time_features: Annotated[int, Field(gt=0, multiple_of=2)] = 64
    """Number of sine and cosine features of t (256 in MAR's own code)."""
    cell: bool = False
    """Add an embedding of the patch's cell to the hidden state that conditions the head, as MAR's own code does."""


class MaskRatioConfig(Settings):
    """Share of patches that MAR hides in the order `masked`: a normal distribution, truncated to [low, 1]."""

    mean: float = 1.0
    """Mean of the share of hidden patches, before truncation to [low, 1]."""
    std: Annotated[float, Field(gt=0)] = 0.25
    """Standard deviation of the share of hidden patches, before truncation."""
    low: Fraction = 0.7
    """Smallest share of hidden patches."""


TimeInput = Literal["addition", "token", "adaln"]


def _name_to_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class TransfusionConfig(Settings):
    """Settings that only Transfusion has."""

    context: Literal["noisy", "capped", "clean_copy"] = "capped"
    """What later positions attend to of an image in training: its noisy patches (`noisy`); the same, but with t in
    [cap, 1] where only later text describes the image (`capped`); or a second, clean copy (`clean_copy`)."""
    cap: Fraction = 0.5
    """Smallest t of an image that only later text describes, for the context `capped`."""
    time_input: Annotated[list[TimeInput], BeforeValidator(_name_to_list)] = ["addition"]
    """How the network reads t: added to each patch (`addition`), as a position of its own before the patches (`token`),
    as shift and scale of the last hidden states (`adaln`), or several of these; a string is read as a list."""

    def check(self) -> None:
        if not self.time_input or len(set(self.time_input)) != len(self.time_input):
            raise ValueError("objective.transfusion.time_input must name at least one way, and each way once")


class MARConfig(Settings):
    """Settings that only MAR has. Later positions always attend to clean patches: in `masked`, to a clean copy."""

    order: Literal["masked", "random", "raster"] = "masked"
    """Order of generation in an image: several patches at a time (`masked`), or one patch at a time."""
    head: HeadConfig = HeadConfig()
    """The head that draws single patches."""
    draws_per_patch: Positive = 4
    """Number of draws of t, and of noise, for each learned patch in one step."""
    mask_ratio: MaskRatioConfig = MaskRatioConfig()
    """Share of the patches that the order `masked` hides."""
    entry_norm: bool = False
    """Normalise the inputs of patches (LayerNorm of patch and cell embedding), as MAR's own code does."""

    @property
    def causal(self) -> bool:
        """Whether patches are predicted one at a time, under causal attention."""
        return self.order != "masked"


OBJECTIVE_SETTINGS: dict[str, type[Settings]] = {"transfusion": TransfusionConfig, "mar": MARConfig}
"""Name of an objective to the class of its own settings, the section `objective.NAME`."""
FLAT = {
    "context": "transfusion", "cap": "transfusion",
    "order": "mar", "head": "mar", "draws_per_patch": "mar", "mask_ratio": "mar",
}  # fmt: skip
"""Keys that earlier versions kept directly in `objective`, and the section that holds each of them now."""
RENAMED = {"objective.time.sampler": "objective.time.distribution"}
"""Keys that had another name in earlier versions, and their present names."""


class AddedSectionError(ValueError):
    """The errors in the section of an objective that was added to `OBJECTIVE_SETTINGS`."""

    def __init__(self, name: str, error: ValidationError) -> None:
        super().__init__(f"objective.{name}: {error}")
        self.name, self.error = name, error


class ObjectiveConfig(Settings):
    """How images are learned. An ablation can change `kind` alone: the sections of the other kinds are validated, and
    then ignored."""

    kind: str = "transfusion"
    """How images are learned: the backbone denoises (Transfusion), or it conditions a small denoiser (MAR)."""
    transfusion: TransfusionConfig = TransfusionConfig()
    """Settings that only Transfusion has."""
    mar: MARConfig = MARConfig()
    """Settings that only MAR has."""
    others: dict[str, dict[str, Any]] = {}
    """Sections of objectives that were added to `OBJECTIVE_SETTINGS`; `objective.NAME` is read into it."""
    prediction: Prediction = "v"
    """What the network outputs: x, eps, v = dz/dt, the score, or `v_sh` = alpha eps - sigma x (Salimans and Ho)."""
    loss_space: Prediction = "v"
    """Quantity in which the squared error is measured; the prediction is converted to it."""
    path: str = "linear"
    """How data and noise are mixed: alpha and sigma as functions of t in z = alpha x + sigma eps."""
    path_options: Annotated[dict[str, Any], BeforeValidator(_read_words)] = {}
    """Arguments of the path, such as `{log_snr_min: -10}`."""
    noise_scale: SizeRule = 1.0
    """Standard deviation of the noise; larger images need more (JiT uses image side / 256). A number, or a rule by size
    as in `objective.time.shift`."""
    weight: str | None = None
    """Weight of the squared error as a function of t; some weights need one loss space (`min_snr` x, `sigmoid` eps,
    `sigma_squared` score)."""
    image_loss: ImageLoss = "patch"
    """What the image loss is a mean over: all learned patches (`patch`), or learned images (`image`), where each image
    counts with the mean over its learned patches."""
    lambda_image: Annotated[float, Field(ge=0)] = 5.0
    """Weight of the image loss, relative to the text loss."""
    time: TimeConfig = TimeConfig()
    """How the flow time t is drawn."""
    bidirectional: bool | None = None
    """Whether patches of an image attend to each other in both directions; null means no for the causal orders of MAR,
    else yes."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Smallest denominator when the loss is converted between x, eps and v, so that the loss stays finite."""

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, raw: object) -> object:
        """Move flat keys of earlier versions, and sections of added objectives, to their sections."""
        if not isinstance(raw, dict):
            return raw
        raw = in_sections(raw)
        added = {name: raw.pop(name) for name in [*raw] if name in OBJECTIVE_SETTINGS and name not in cls.model_fields}
        others = raw.get("others", {})
        return {**raw, "others": {**others, **added}} if added and isinstance(others, dict) else raw

    @property
    def section(self) -> Settings:
        """The settings of the chosen kind."""
        if self.kind in type(self).model_fields:
            chosen: Settings = getattr(self, self.kind)
            return chosen
        return OBJECTIVE_SETTINGS.get(self.kind, Settings).model_validate(self.others.get(self.kind, {}))

    def check(self) -> None:
        """Raise ValueError where fields contradict each other."""
        for name, values in self.others.items():
            if name not in OBJECTIVE_SETTINGS:
                raise ValueError(f"objective.others.{name}: no such objective ({', '.join(OBJECTIVE_SETTINGS)})")
            try:
                OBJECTIVE_SETTINGS[name].model_validate(values)
            except ValidationError as error:
                raise AddedSectionError(name, error) from None
        if self.kind == "mar" and self.mar.causal and self.bidirectional:
            raise ValueError(
                f"objective.bidirectional is true, but in the order '{self.mar.order}' a patch would attend to itself "
                "before it is predicted: leave objective.bidirectional out, or set objective.mar.order to masked"
            )


def in_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """The section `objective`, with the flat keys of earlier versions moved into `transfusion` and `mar`.

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
        # Earlier versions stored all six keys, also those of the kind that was not chosen.
        stored = len(flat) == len(FLAT) or kind not in set(FLAT.values())
        if section != kind and not stored and raw[name] is not None:
            raise ValueError(
                f"objective.{name} is a setting of '{section}', but objective.kind is '{kind}': "
                f"write it as objective.{section}.{name}, or leave it out"
            )
        if name == "context" and (raw[name] is None or section != kind):
            continue  # null means the default, and MAR has no choice of context
        fields = moved.get(section, {})
        fields = fields.model_dump() if isinstance(fields, Settings) else fields
        if not isinstance(fields, dict):
            continue  # the validation of the section reports this
        value = raw[name]
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            value = {**fields[name], **value}
        moved[section] = {**fields, name: value}
    return moved


class TrainConfig(Settings):
    """How the model is optimised, saved and watched."""

    steps: Positive = 1000
    """Number of optimiser steps of the whole run."""
    batch_rows: Positive = 24
    """Number of rows in one optimiser step, over all processes and micro-steps."""
    micro_rows: Positive | None = None
    """Number of rows in one forward pass of a process; if null, all its rows of a step at once."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises updates of the hidden matrices, and AdamW steps the rest; it needs `zero_stage` 0."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate, reached after warm-up."""
    min_lr_ratio: Fraction = 0.05
    """Learning rate at the end of the cosine schedule, as a share of `lr`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Number of steps of linear warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Averaging constants (beta 1, beta 2) of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay of AdamW, applied to matrices only."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient of all parameters; larger gradients are scaled down."""
    ema_decay: Fraction = 0.999
    """Decay per step of the averaged weights (EMA) that sampling and evaluation use."""
    ema_more: tuple[Fraction, ...] = ()
    """Decays of further EMAs, each stored in checkpoints as `ema_DECAY`."""
    ema_power: tuple[Annotated[float, Field(gt=0, lt=0.28)], ...] = ()
    """Relative widths of power-function EMAs (sigma_rel of EDM2), each stored in checkpoints as `power_WIDTH`."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: processes shard the optimiser state (1), also gradients (2), also weights (3)."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimiser state is kept between steps, in stages 1 to 3; `nvme` needs stage 3 and a GPU."""
    offload_weights: Literal["none", "cpu", "nvme"] = "none"
    """Where sharded weights are kept between uses, in stage 3; `nvme` needs a GPU."""
    nvme_path: Path | None = None
    """Folder on a local NVMe disk, for the offload to `nvme`."""
    deepspeed: Annotated[dict[str, Any], BeforeValidator(_read_words)] = {}
    """Further fields of DeepSpeed's own configuration; they override the fields that mmgen sets."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them, which saves memory and costs time."""
    timeout: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds after which a phase of a step, or a message between processes, counts as hung and the run ends."""
    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do at a NaN or infinite loss or gradient: stop, skip the step, or roll back a checkpoint and skip it."""
    max_skips: Annotated[int, Field(ge=0)] = 10
    """Number of steps that a run may skip before it stops."""
    spike_factor: Annotated[float, Field(gt=1)] = 2.0
    """A loss above this multiple of its recent median is logged in spikes.jsonl, with the data of the step."""
    init_from: Path | None = None
    """Checkpoint, or run folder, whose weights a new run starts from; parameters that it lacks or has in another shape
    are new, and rows of the vocabulary are taken over by the text of their token."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number type of the forward pass; `auto` chooses bf16 on CUDA and on processors with AMX, else fp32."""
    compile: bool = False
    """Compile the layers of the backbone with `torch.compile`; a CPU needs a C++ compiler for it."""
    log_every: Positive = 20
    """Number of steps between lines of metrics.jsonl."""
    save_every: Positive = 500
    """Number of steps between checkpoints."""
    save_async: bool = True
    """Write checkpoints while training continues; this takes memory for one more copy of the state of this process."""
    keep_last: Positive = 2
    """Number of newest checkpoints that are kept."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Keep every checkpoint at a multiple of this many steps, as `power:WIDTH` needs; 0 keeps only the newest."""
    val_every: Annotated[int, Field(ge=0)] = 0
    """Number of steps between validations; 0 validates only at the end."""
    sample_every: Annotated[int, Field(ge=0)] = 500
    """Number of steps between sample grids; 0 draws none."""
    first_sample: Annotated[int, Field(ge=0)] = 0
    """Step of one additional, early sample grid; 0 draws none."""
    tensorboard: bool = True
    """Write TensorBoard events in addition to metrics.jsonl."""
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    """Experiment trackers that also receive the metrics; each needs its package."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak TFLOP/s of one device, the reference of MFU; if null, it is measured at the start."""

    def check(self) -> None:
        """Muon needs whole matrices, and ZeRO's stages 1 to 3 cut them into flat shards."""
        if self.optimizer == "muon" and self.zero_stage > 0:
            raise ValueError(
                f"optimizer muon needs zero_stage 0, because stage {self.zero_stage} shards matrices; "
                "use --train.optimizer adamw"
            )


GuidanceLane = Literal["images", "nothing"]
"""What a lane of guidance keeps of a prompt: its images without its text, or nothing."""


class SampleConfig(Settings):
    """How images and text are generated."""

    weights: str = "ema"
    """Which weights of a checkpoint are used: `ema`, `weight` (not averaged), or a further EMA such as `ema_0.9999`."""

    steps: Positive = 50
    """Number of solver steps per image; in MAR, per patch."""
    solver: str = "euler"
    """Solver that integrates the flow from noise to data."""
    solver_options: Annotated[dict[str, Any], BeforeValidator(_read_words)] = {}
    """Arguments of the solver, such as `{eta: 0.5}` for `ddim`."""
    time_shift: SizeRule | None = None
    """Shift of the time grid; above 1, more of the steps are at high noise, as large images need. A number, or a rule
    by size as in `objective.time.shift`; null takes that setting."""
    guidance_scale: float = 2.0
    """Scale of classifier-free guidance: 0 is unconditional, 1 conditional, above 1 closer to the caption."""
    image_guidance_scale: float | None = None
    """Scale of guidance by the images of the prompt, relative to no prompt; `guidance_scale` then acts relative to the
    prompt without its text. If null, `guidance_scale` acts on text and images together."""
    negative_prompt: str | None = None
    """Text that takes the place of the text which guidance removes from the prompt; null removes it."""
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Range of t in which the guidance scale applies; outside it the scale is 1."""
    guidance_rescale: Fraction = 0.0
    """How far a guided velocity is rescaled to the standard deviation of the conditional one (0 not, 1 fully)."""
    guidance_renorm: bool = False
    """Scale a guided velocity down to the norm of the conditional one where it is longer."""
    image_guidance_interval: tuple[Fraction, Fraction] | None = None
    """`guidance_interval` of the image guidance; if null, that of the text."""
    image_guidance_rescale: Fraction | None = None
    """`guidance_rescale` of the image guidance; if null, that of the text."""
    image_guidance_renorm: bool | None = None
    """`guidance_renorm` of the image guidance; if null, that of the text."""
    clean_range: tuple[float, float] | None = None
    """Range to which the clean estimate is clipped at every step; if null, it is not clipped."""
    noise_temperature: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the noise that stochastic solvers add; below 1, images vary less."""
    unmask_steps: Positive = 16
    """Number of backbone calls per image in the order `masked` of MAR; each call reveals some patches."""
    guidance_ramp: Literal["linear", "constant"] = "linear"
    """How the guidance scale of MAR depends on the share of drawn patches: it grows from 1, or is constant."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Temperature of text; 0 always takes the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample text from the k likeliest tokens; 0 samples from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample text from the likeliest tokens whose probabilities add up to this number."""
    min_p: Fraction = 0.0
    """Sample text from tokens that are at least this likely, relative to the likeliest token."""
    max_new_tokens: Positive = 64
    """Largest number of text tokens that are generated per prompt."""
    max_images: Annotated[int, Field(ge=0)] = 1
    """Largest number of images that are generated per prompt."""

    @property
    def guidance_lanes(self) -> tuple[GuidanceLane, ...]:
        """What guidance keeps of a prompt in each lane next to that of the full prompt, the fullest first."""
        if self.image_guidance_scale is None:
            return () if self.guidance_scale == 1 else ("nothing",)
        if self.image_guidance_scale == 1:  # v(none) cancels
            return () if self.guidance_scale == 1 else ("images",)
        return ("images", "nothing")

    def check(self) -> None:
        for name in ("guidance_interval", "image_guidance_interval"):
            low, high = getattr(self, name) or (0, 1)
            if low > high:
                raise ValueError(f"sample.{name} must rise, as in [0.1, 1], got [{low}, {high}]")
        if self.clean_range is not None and not self.clean_range[0] < self.clean_range[1]:
            raise ValueError(f"sample.clean_range must rise, as in [-1, 1], got {list(self.clean_range)}")


CAPTIONS = "captions"
"""The value of `eval.task` for images with captions and no labels."""


class EvalConfig(Settings):
    """How a trained model is scored."""

    task: str = CAPTIONS
    """What is scored: `captions` for any captioned images, or a task that knows what labelled images show."""
    judge: list[str] = []
    """Shards on which the judge is trained, and the model is not: of single digits for labelled tasks, of captioned
    images for `classes`; if empty, the judge of `classes` is trained on training images."""
    test: list[str] = []
    """Shards of real images and captions that training never reads; scores are computed on them."""
    heldout: list[str] = []
    """Shards whose captions combine attributes that never occur together in the training data."""
    samples: Positive = 500
    """Number of captions for which images are drawn; in labelled tasks all images of `test` are captioned."""
    batch: Positive = 128
    """Number of prompts that are decoded together."""
    classes: list[str] = []
    """Names of classes that captions contain; with them, the task `captions` also scores which class is drawn and
    named."""
    choices: Annotated[int, Field(ge=2)] = 10
    """Number of captions from which the model chooses that of an image, in the task `captions`."""
    features: str = "pixels"
    """Features in which the task `captions` compares images."""
    features_model: str = ""
    """Hub name or local folder of the model of the features `transformers`."""
    guidance_curve: list[float] = []
    """Further guidance scales at which the task `captions` draws and scores images."""


class Config(Settings):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()

    def check(self) -> None:
        dropped = self.data.caption_drop + self.data.image_drop + self.data.prompt_drop
        if dropped > 1 + 1e-9:
            raise ValueError(
                "data.caption_drop, data.image_drop and data.prompt_drop are shares of the same documents, but they "
                f"add up to {dropped:g}: lower them to 1 or less together"
            )
        streams, rows = self.data.streams, self.train.batch_rows
        if streams and rows % streams:
            raise ValueError(
                f"train.batch_rows is {rows} and data.streams {streams}, but every stream yields the same number of "
                f"rows per step: set train.batch_rows to {-(-rows // streams) * streams}, or data.streams to a "
                f"divisor of {rows}"
            )
        weights = {source.weight if isinstance(source, SourceConfig) else 1.0 for source in self.data.train}
        if streams and len(weights) > 1:
            raise ValueError(
                "data.streams reads all shards equally often, but data.train has sources of different weight: "
                "set data.streams to 0, or leave the weights out"
            )

    def with_positions(self, positions: Positions) -> Self:
        """These settings with the positions of a trained model."""
        return self.model_copy(update={"model": self.model.model_copy(update={"positions": positions})})

    def check_processes(self, world: int) -> None:
        """Raise ValueError where `world` processes cannot share the streams of these settings."""
        streams = self.data.streams
        if streams % world:
            divisors = [n for n in range(1, streams + 1) if streams % n == 0]
            raise ValueError(
                f"data.streams is {streams}, which {world} processes cannot share evenly (one process reads a stream): "
                f"start {' or '.join(map(str, divisors[-4:]))} processes, or begin a new run with "
                f"data.streams {-(-streams // world) * world}"
            )


def nearest(name: str, known: list[str]) -> str | None:
    """The known name most similar to `name`, or None if no name is similar."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def choose(registry: dict[str, Any], name: str, what: str) -> Any:
    """The entry `name` of a registry; an unknown name raises a ValueError that lists the known names."""
    if name not in registry:
        near = nearest(name, list(registry))
        hint = f", did you mean '{near}'?" if near else ""
        raise ValueError(f"unknown {what} '{name}'{hint} (one of: {', '.join(registry)})")
    return registry[name]
