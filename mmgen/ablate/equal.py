"""Makes arms equal: the shape of a model with a number of parameters, and the cost of a training step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import BaseModel

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.latents import find_facts
from mmgen.data.loader import steps
from mmgen.data.streams import training_corpus
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.flops import Arithmetic

TOLERANCE = 0.01
"""Largest relative difference in the parameters of arms of equal parameters."""
RATIO = 0.08
"""Largest relative change of the ratio of the feed-forward width to the width."""
STEPS = 8
"""Number of training steps over which the cost of a step is averaged, because their documents differ."""


@dataclass(frozen=True)
class Cost:
    """The cost of a training step: means over the first steps of a run."""

    flops: float
    """FLOPs, forward and backward."""
    documents: float


def parameters(config: Config) -> int:
    """Return the number of parameters of the model of a configuration, without allocating it."""
    return sum(p.numel() for p in _shapes_of(config, len(Tokenizer.of(config))).parameters())


def _shapes_of(config: Config, vocabulary: int) -> MMGenModel:
    with torch.device("meta"):
        return MMGenModel(MMGenConfig.of(config, vocabulary))


def step_cost(config: Config) -> Cost:
    """Return the FLOPs and documents of a training step, counted on the first steps of the run."""
    config = override(config, {"data": {"workers": 0}})
    tokenizer = Tokenizer.of(config)
    corpus = training_corpus(config, tokenizer, find_facts(config, tokenizer))
    arithmetic = Arithmetic(_shapes_of(config, len(tokenizer)))
    first = list(steps(corpus, 0, STEPS, corpus.start))
    flops = sum(arithmetic.of(step.micro) for step in first)
    return Cost(flops / STEPS, sum(step.documents for step in first) / STEPS)


def same_parameters(config: Config, wanted: int, name: str) -> Config:
    """Return the configuration with `wanted` parameters, within 1%, that keeps the proportions of the model.

    Width, feed-forward width, depth and the widths of the objective's own networks change together: the width over the
    depth stays as near to that of `config` as whole layers permit, the feed-forward width over the width within 8%.
    A configuration that has `wanted` parameters already is not changed.

    Raises:
        ValueError: no such shape exists, or the backbone is pretrained.
    """
    if config.model.backbone.pretrained is not None:
        raise ValueError(
            f"arm '{name}': a pretrained backbone has a fixed number of parameters; set `equal` to steps or flops"
        )
    family = _Family(config)
    if abs(family.count({}) - wanted) <= TOLERANCE * wanted:
        return config
    shapes = [shape for layers in family.depths(wanted) for shape in family.shapes(layers, wanted)]
    if shapes:
        return override(config, min(shapes, key=lambda shape: shape.distortion).changes)
    raise ValueError(
        f"arm '{name}' cannot have {wanted} parameters: as it is, it has {family.count({})}, and no width and depth of "
        f"the same proportions come within {TOLERANCE:.0%}. Make its model or that of the first arm larger, or set "
        "`equal` to steps or flops"
    )


class _Family:
    """The shapes of one model: its widths and depth, scaled together."""

    def __init__(self, config: Config) -> None:
        self.config, self.backbone = config, config.model.backbone
        self.vocabulary = len(Tokenizer.of(config))
        self.step = 2 * self.backbone.num_attention_heads
        """The width is a multiple of this: rotary embedding rotates pairs of each attention head."""
        self.unit = 2 ** max(0, math.floor(math.log2(self.backbone.hidden_size / 64)))
        """Other widths are multiples of this power of two, about 1/64 of the width."""

    @cached_property
    def ratio(self) -> float:
        """Feed-forward width over width."""
        return self.backbone.intermediate_size / self.backbone.hidden_size

    def count(self, changes: Mapping[str, object]) -> int:
        """Number of parameters with these settings changed."""
        return sum(p.numel() for p in _shapes_of(override(self.config, changes), self.vocabulary).parameters())

    def changes(self, layers: int, width: int, feed_forward: int | None = None) -> dict[str, object]:
        """The settings of a shape; the feed-forward width is in proportion unless it is given."""
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": feed_forward or _multiple(self.ratio * width, self.unit),
        }
        objective = self.config.objective
        inner = _scaled(objective.section, width / self.backbone.hidden_size, self.unit)
        return {"model": {"backbone": sizes}, **({"objective": {objective.kind: inner}} if inner else {})}

    def depths(self, wanted: int) -> range:
        """Numbers of layers next to the depth that is in proportion to the width."""
        depth, width = self.backbone.num_hidden_layers, self.backbone.hidden_size
        scale = 1.0
        for _ in range(3):  # parameters grow with the cube of a common factor, embeddings with less
            layers, here = max(1, round(scale * depth)), _multiple(scale * width, self.step)
            scale *= (wanted / self.count(self.changes(layers, here))) ** (1 / 3)
        return range(max(1, math.floor(scale * depth) - 1), math.ceil(scale * depth) + 2)

    def shapes(self, layers: int, wanted: int) -> Iterator[_Shape]:
        """The shapes of this depth with the wanted number of parameters."""
        width = float(self.backbone.hidden_size)
        for _ in range(4):  # parameters grow with the square of the width
            width *= (wanted / self.count(self.changes(layers, _multiple(width, self.step)))) ** 0.5
        nearest = _multiple(width, self.step)
        for here in (nearest - self.step, nearest, nearest + self.step):
            if here > 0 and (shape := self._fitted(layers, here, wanted)) is not None:
                yield shape

    def _fitted(self, layers: int, width: int, wanted: int) -> _Shape | None:
        """The shape whose feed-forward width comes nearest to the wanted number of parameters."""
        first = _multiple(self.ratio * width, self.unit)
        one, two = (self.count(self.changes(layers, width, first + self.unit * i)) for i in (0, 1))
        room = math.floor(RATIO * self.ratio * width / self.unit)
        more = min(max(round((wanted - one) / (two - one)), -room), room)
        feed_forward = first + self.unit * more
        changes = self.changes(layers, width, feed_forward)
        if abs(self.count(changes) - wanted) > TOLERANCE * wanted:
            return None
        aspect = self.backbone.hidden_size / self.backbone.num_hidden_layers
        stretch = abs(math.log(feed_forward / width / self.ratio))
        return _Shape(changes, abs(math.log(width / layers / aspect)) + stretch)


@dataclass(frozen=True)
class _Shape:
    """The settings of a shape, and how far its two proportions are from those of the model, as logarithms."""

    changes: dict[str, object]
    distortion: float


def _multiple(value: float, unit: int) -> int:
    """The multiple of `unit` nearest to a value, at least one."""
    return unit * max(1, round(value / unit))


def _scaled(section: BaseModel, factor: float, unit: int) -> dict[str, object]:
    """The changes that scale every setting `width` of a section and of the sections in it, to multiples of `unit`."""
    changes: dict[str, object] = {}
    for name, value in section:
        if isinstance(value, BaseModel):
            if inner := _scaled(value, factor, unit):
                changes[name] = inner
        elif name == "width":
            changes[name] = _multiple(value * factor, unit)
    return changes
