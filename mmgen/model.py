"""The model: token embeddings and image inputs, the backbone, the language head, the objective and the joint loss.

Suffixes: B rows, S positions, D width, V vocabulary, J learned patches.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig, PreTrainedModel

from mmgen.backbone import add_axes, attention_mask, backbone_config, build_backbone, load_pretrained
from mmgen.config import Config, ObjectiveConfig, PatcherConfig, Positions
from mmgen.image.latent import AutoencoderFacts, build_patcher
from mmgen.image.patch import Patcher
from mmgen.objective import Embedded, build_objective
from mmgen.objective.convolution import OutputConv, PixelConv
from mmgen.objective.layers import OutputLinear
from mmgen.sequence.batch import Batch
from mmgen.sequence.tokenizer import Tokenizer


class MMGenConfig(PretrainedConfig):
    """The configuration of the model: backbone, patcher, objective, and the facts about its autoencoder."""

    model_type = "mmgen"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        patcher: dict[str, Any] | None = None,
        objective: dict[str, Any] | None = None,
        autoencoder: dict[str, Any] | None = None,
        positions: Positions = "shared",
        position_base: float = 100.0,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.positions, self.position_base = positions, position_base  # versions without the key used `shared`
        facts = AutoencoderFacts(**autoencoder) if autoencoder else AutoencoderFacts.of_settings(patcher or {})
        self.autoencoder = asdict(facts) if facts else None
        self.patcher = PatcherConfig.model_validate(patcher or {}).model_dump(mode="json")
        self.objective = ObjectiveConfig.model_validate(objective or {}).model_dump(mode="json")
        kwargs.setdefault("tie_word_embeddings", self.backbone.get("tie_word_embeddings", True))
        super().__init__(**kwargs)

    @classmethod
    def of(cls, config: Config, vocabulary: int, autoencoder: AutoencoderFacts | None = None) -> MMGenConfig:
        """The configuration of the model of a run, for a tokenizer with `vocabulary` ids."""
        return cls(
            backbone=backbone_config(config.model.backbone, vocabulary),
            patcher=config.model.patcher.model_dump(mode="json"),
            objective=config.objective.model_dump(mode="json"),
            autoencoder=asdict(autoencoder) if autoencoder else None,
            positions=config.model.chosen_positions,
            position_base=config.model.position_base,
        )


@dataclass
class Losses:
    """Loss sums over one batch, and the number of terms in each. The trainer divides by global counts."""

    text: Tensor
    """Sum of the cross-entropy over text targets, in nats."""
    image: Tensor
    """Sum of the losses of learned patches, each averaged over the values of the patch and times its weight."""
    text_count: int
    """Number of text targets."""
    image_count: int
    """Number of learned patches; with `objective.image_loss: image`, of learned images."""
    image_J: Tensor
    """Loss of each learned patch, without gradient."""
    weight_J: Tensor
    """Weight of each learned patch in `image`: 1, or its share in its image."""
    text_L: Tensor | None = None
    """Cross-entropy of each text target in nats, without gradient; None in training, which does not need it."""


def _compiled_in_training(layer: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    plain = layer.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        return compiled(layer, *arguments, **named) if layer.training else plain(*arguments, **named)

    return forward


class MMGenModel(PreTrainedModel):
    """One transformer for text and images."""

    config_class = MMGenConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: MMGenConfig) -> None:
        super().__init__(config)
        self.patcher = PatcherConfig.model_validate(config.patcher)
        settings = ObjectiveConfig.model_validate(config.objective)
        self.backbone = build_backbone(config.backbone)
        width = self.backbone.get_input_embeddings().embedding_dim
        self.objective = build_objective(settings, self.patcher, width)
        self.compiled = False
        if self.positions == "axial":
            add_axes(self.backbone.get_decoder(), config.position_base)
        self.post_init()

    def compile_backbone(self) -> None:
        """Compile the transformer for training batches, whose shapes are fixed. Generation stays eager.

        All layers share the compiled code of the first layer, so the time to compile does not grow with depth.
        """
        layers = next(part for part in self.backbone.get_decoder().modules() if isinstance(part, nn.ModuleList))
        compiled = torch.compile(type(layers[0]).forward)
        for layer in layers:
            layer.forward = _compiled_in_training(layer, compiled)
        self.compiled = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the layers of mmgen. The backbone initialises its own weights."""
        if isinstance(module, OutputLinear | OutputConv):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | PixelConv):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def positions(self) -> Positions:
        """How the patches of an image are positioned."""
        positions: Positions = self.config.positions
        return positions

    @property
    def autoencoder(self) -> AutoencoderFacts | None:
        """The facts about the autoencoder of the run; None for a model of pixels."""
        return AutoencoderFacts(**self.config.autoencoder) if self.config.autoencoder else None

    def build_patcher(self) -> Patcher:
        """A patcher for the images of the model, on its device."""
        return build_patcher(self.patcher, self.device, self.autoencoder)

    def get_input_embeddings(self) -> nn.Embedding:
        embeddings: nn.Embedding = self.backbone.get_input_embeddings()
        return embeddings

    def embed(self, batch: Batch) -> tuple[Tensor, Embedded]:
        """Backbone inputs [B, S, D], and what the objective needs for its loss."""
        tokens_BSD: Tensor = self.get_input_embeddings()(batch.ids_BS)
        embedded = self.objective.embed(batch)
        flat = tokens_BSD.flatten(0, 1) * (batch.block_BS < 0).flatten().unsqueeze(-1).to(tokens_BSD.dtype)
        flat = flat.index_add(0, embedded.at, embedded.values.to(flat.dtype))
        return flat.view_as(tokens_BSD), embedded

    def hidden(
        self,
        inputs_BSD: Tensor,
        position_BS: Tensor,
        mask: Tensor | BlockMask,
        modality_BS: Tensor,
        cache: Any = None,
    ) -> Tensor:
        """Last hidden states [B, S, D] under an explicit mask.

        `modality_BS` is 1 at patches and 0 elsewhere. Every layer of the backbone receives it as `modality`.
        """
        out: Tensor = self.backbone.get_decoder()(
            inputs_embeds=inputs_BSD,
            position_ids=position_BS,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=False,
            modality=modality_BS,
        ).last_hidden_state
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        scores: Tensor = self.backbone.get_output_embeddings()(hidden)
        return scores

    def _varying_shapes(self) -> AbstractContextManager[Any]:
        """Disable autocast on a CPU, which compiles a bf16 product for every new shape; numbers of patches vary."""
        whole = self.device.type == "cpu" and self.get_input_embeddings().weight.dtype == torch.float32
        return torch.autocast("cpu", enabled=False) if whole else nullcontext()

    def forward(self, batch: Batch) -> Losses:
        """Loss sums of a batch. Every parameter takes part, also if the batch contains no image or no text."""
        with self._varying_shapes():
            inputs_BSD, embedded = self.embed(batch)
        hidden_BSD = self.hidden(inputs_BSD, batch.position_BS, attention_mask(batch.sites), batch.modality)
        with self._varying_shapes():
            flat = hidden_BSD.flatten(0, 1).to(inputs_BSD.dtype)
            scores = self.logits(flat[batch.label_at_L])
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            label_L = batch.label_BS.flatten()[batch.label_at_L]
            text = F.cross_entropy(scores, label_L, reduction="sum")
            text_L = None if self.training else F.cross_entropy(scores.detach(), label_L, reduction="none")
            image_J = self.objective.loss(flat[embedded.read_at_J], embedded.state)
            image_loss = self.objective.settings.image_loss
            weight_J = torch.ones_like(image_J)
            if image_loss == "image":
                weight_J = weight_J / batch.image_learned
            image = (image_J * weight_J).sum()
        counts = len(batch.label_at_L), batch.image_terms(image_loss)
        return Losses(text, image, *counts, image_J.detach(), weight_J.detach(), text_L)


def build_model(config: Config, vocabulary: int, autoencoder: AutoencoderFacts | None = None) -> MMGenModel:
    """A new model for a run, with random weights or with the pretrained backbone of the settings.

    `vocabulary` is the number of token ids, and `autoencoder` has the facts about the autoencoder of the patcher.

    Raises:
        ValueError: a name in the settings is unknown, or the pretrained backbone cannot be loaded.
    """
    model = MMGenModel(MMGenConfig.of(config, vocabulary, autoencoder))
    if config.model.backbone.pretrained is not None:
        load_pretrained(model.backbone, config.model.backbone.pretrained, vocabulary, Tokenizer.of(config).added)
    return model
