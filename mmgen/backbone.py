"""The backbone, any decoder of Hugging Face: construction, attention and the key-value cache.

Suffixes: B rows, S positions, Q queries, K keys, H attention heads, L lanes, d width of an attention head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache

from mmgen.config import BackboneConfig, nearest
from mmgen.sequence.attention import Sites, dense_visible, flex_rule
from mmgen.sequence.position import BITS, MASK

ATTENTION = "mmgen"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | BlockMask,
    scaling: float,
    dropout: float = 0.0,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention in the interface of transformers: [B, H, Q, d] to [B, Q, H, d], with an additive mask or a BlockMask.

    `dropout` is the share of attention weights that are set to zero; the layers of transformers pass 0 in evaluation.

    Raises:
        ValueError: the backbone needs soft caps or attention sinks, or dropout with a BlockMask.
    """
    if other.get("softcap") is not None or other.get("s_aux") is not None:
        raise ValueError(
            "this backbone needs soft caps or attention sinks, which mmgen does not support: choose another backbone"
        )
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        if dropout:
            raise ValueError(
                f"attention_dropout is {dropout}, but FlexAttention on CUDA has no dropout: set attention_dropout to 0 "
                "in model.backbone.extra"
            )
        attend = _compiled_flex if query.is_cuda else flex_attention
        # Under autocast, norms leave queries and keys in fp32, but the kernel needs one type.
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2), None
    half_on_cpu = query.device.type == "cpu" and value.dtype in (torch.bfloat16, torch.float16)
    if half_on_cpu and torch.compiler.is_compiling():
        return _matmul_attention(query, key, value, mask, scaling, dropout).transpose(1, 2), None
    # On a CPU the backward pass of the fused kernel ran 6 times slower in bf16 than in fp32.
    dtype = torch.float32 if half_on_cpu else query.dtype
    with torch.autocast(query.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            query.to(dtype), key.to(dtype), value.to(dtype),
            attn_mask=mask.to(dtype), dropout_p=dropout, scale=scaling, enable_gqa=grouped,
        )  # fmt: skip
    return out.to(value.dtype).transpose(1, 2), None


def _matmul_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, dropout: float
) -> Tensor:
    """Two products around a softmax in fp32. Compiled on a CPU, this is faster than the fused kernel in fp32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query.to(value.dtype) @ key.to(value.dtype).mT) * scaling
    weights = F.dropout(torch.softmax(scores.float() + mask, -1), dropout)
    return weights.to(value.dtype) @ value


AttentionInterface.register(ATTENTION, attention)

# Wrapped here, because torch.compile has no effect inside a traced region. Nothing is compiled before the first call.
_compiled_flex: Any = torch.compile(flex_attention, dynamic=False)


def attention_mask(sites: Sites) -> Tensor | BlockMask:
    """The attention mask of a batch: a BlockMask on CUDA, else an additive mask [B, 1, S, S] of 0 and -inf."""
    batch, length = sites.slot.shape
    if sites.slot.is_cuda:
        return create_block_mask(flex_rule(sites), batch, None, length, length, device=sites.slot.device)
    return additive(dense_visible(sites))


def additive(seen_BQK: Tensor) -> Tensor:
    """Boolean visibility [B, Q, K] to an additive mask [B, 1, Q, K]: 0 where true, -inf elsewhere."""
    return torch.zeros(seen_BQK.shape, device=seen_BQK.device).masked_fill_(~seen_BQK, -torch.inf).unsqueeze(1)


class AxialRotary(nn.Module):
    """A rotary embedding whose angles also grow with row and column, at positions packed by `sequence.position`.

    Every second frequency turns by the row and the others by the column, with frequencies base^(-2i/d) of their own.
    Tokens have row and column 0, so their angles are those of the backbone.
    """

    def __init__(self, rotary: nn.Module, base: float, neighbours: bool) -> None:
        super().__init__()
        self.rotary, self.base, self.neighbours = rotary, base, neighbours

    def forward(self, x: Tensor, position_ids: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, S, d] of the angles at packed positions [B, S]."""
        # At least fp32 until the last line, so that bf16 rounds once.
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.rotary(x.to(dtype), position_ids & MASK, *others, **named)
        half = cos.shape[-1] // 2
        exponent = torch.arange(half, device=cos.device, dtype=torch.float32) // 2 * 2 / half
        cell = torch.stack([position_ids >> BITS & MASK, position_ids >> 2 * BITS], dim=-1).float()
        pair = cell.repeat(1, 1, (half + 1) // 2)[..., :half] * self.base**-exponent
        # The two numbers that are turned together are half a head apart, or neighbours, as the backbone has them.
        angle = pair.repeat_interleave(2, dim=-1) if self.neighbours else torch.cat([pair, pair], dim=-1)
        turn_cos, turn_sin = angle.cos().to(dtype), angle.sin().to(dtype)
        turned = cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin
        return turned[0].to(x.dtype), turned[1].to(x.dtype)


def add_axes(decoder: PreTrainedModel, base: float) -> None:
    """Give the rotary embedding of a decoder the axes row and column, for `model.positions: axial`.

    Raises:
        ValueError: the decoder has no rotary embedding that returns cosine and sine.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise ValueError(
            f"model.positions is axial, but a backbone of type '{decoder.config.model_type}' has no rotary embedding: "
            "set model.positions to raster or shared, or choose another backbone"
        )
    neighbours = False
    if decoder.device.type != "meta":
        one = torch.ones(1, 1, dtype=torch.long, device=decoder.device)
        found = rotary(torch.zeros(1, device=decoder.device), one)
        if not (isinstance(found, tuple) and len(found) == 2 and found[0].is_floating_point()):
            raise ValueError(
                f"model.positions is axial, but the rotary embedding of '{decoder.config.model_type}' does not return "
                "cosine and sine: set model.positions to raster or shared"
            )
        first, second = found[1][0, 0].chunk(2)
        neighbours = not torch.equal(first, second)
    decoder.rotary_emb = AxialRotary(rotary, base, neighbours)


class RowCache(Cache):
    """Keys and values of L lanes, each with its own length. Positions that are not committed are overwritten.

    `begin` selects the lanes and slots of the next forward pass. `commit` keeps some of its positions. Keys and values
    are never copied or cropped.
    """

    def __init__(self, layers: int, lanes: int, capacity: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.length = torch.zeros(lanes, dtype=torch.long, device=device)
        self._store: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._lanes = self._slots = torch.zeros(0, dtype=torch.long, device=device)
        self._reach = 0

    def begin(self, lanes: Tensor, width: int) -> Tensor:
        """Reserve `width` positions after the committed ones of each lane, and return their slots [lanes, width].

        Raises:
            ValueError: a lane would exceed the capacity.
        """
        self._lanes, self._slots = lanes, self.length[lanes].unsqueeze(1) + torch.arange(width, device=lanes.device)
        self._reach = int(self._slots.max()) + 1
        if self._reach > self.capacity:
            raise ValueError(f"a sequence of {self._reach} positions exceeds the decoder's capacity of {self.capacity}")
        return self._slots

    @property
    def reach(self) -> int:
        """Number of slots to which the current forward pass can attend."""
        return self._reach

    def commit(self, counts: Tensor) -> None:
        """Keep the first `counts` [lanes] positions of each lane of the last forward pass."""
        self.length[self._lanes] += counts

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [L, H, width, d] and return all keys and values of these lanes up to `reach`."""
        stored = self._store[layer_idx]
        if stored is None:
            shape = (len(self.length), key_states.shape[1], self.capacity, key_states.shape[3])
            stored = (key_states.new_zeros(shape), value_states.new_zeros(shape))
            self._store[layer_idx] = stored
        for old, new in zip(stored, (key_states, value_states), strict=True):
            old[self._lanes.unsqueeze(1), :, self._slots] = new.transpose(1, 2)
        all_lanes = len(self._lanes) == len(self.length)
        keys, values = (old if all_lanes else old[self._lanes] for old in stored)
        return keys[:, :, : self._reach], values[:, :, : self._reach]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest committed length of all lanes."""
        return int(self.length.max())


def backbone_config(settings: BackboneConfig, vocabulary: int) -> dict[str, Any]:
    """The transformers configuration of `model.backbone`, for a vocabulary of `vocabulary` ids.

    Raises:
        ValueError: the architecture is unknown, sizes do not fit each other, or the pretrained model cannot be loaded.
    """
    if settings.pretrained is not None:
        try:
            config = AutoConfig.from_pretrained(settings.pretrained)
        except OSError:
            raise ValueError(
                f"model.backbone.pretrained '{settings.pretrained}' cannot be loaded: it is not a local folder of a "
                "transformers model, and no model of that name is in the cache or can be downloaded"
            ) from None
        except ValueError as error:
            raise ValueError(f"model.backbone.pretrained '{settings.pretrained}' cannot be loaded: {error}") from None
        config.vocab_size = max(vocabulary, config.vocab_size)
        return dict(config.to_dict())
    heads, kv_heads, hidden = settings.num_attention_heads, settings.num_key_value_heads, settings.hidden_size
    if heads % kv_heads or hidden % (2 * heads):
        raise ValueError(
            f"model.backbone: num_key_value_heads {kv_heads} must divide num_attention_heads {heads}, and hidden_size "
            f"{hidden} must be a multiple of {2 * heads}, twice num_attention_heads (rotary embedding rotates pairs)"
        )
    sizes = settings.model_dump(exclude={"pretrained", "model_type", "extra"})
    # The fixed 0.02 of transformers suits widths near 1,000. Small models train better with a std of 0.5 / sqrt(width).
    width = {
        "head_dim": settings.hidden_size // settings.num_attention_heads,
        "initializer_range": 0.5 * settings.hidden_size**-0.5,
    }
    sizes = {**width, **sizes, **settings.extra}
    known = settings.model_type in CONFIG_MAPPING
    if not known or CONFIG_MAPPING[settings.model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        near = nearest(settings.model_type, [decoder.model_type for decoder in MODEL_FOR_CAUSAL_LM_MAPPING])
        hint = f"did you mean '{near}'?" if near else "such as 'qwen3'"
        raise ValueError(
            f"unknown model.backbone.model_type '{settings.model_type}': give a decoder of transformers, {hint}"
        )
    try:
        fresh = AutoConfig.for_model(settings.model_type, vocab_size=vocabulary, tie_word_embeddings=True, **sizes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.backbone cannot be built with these settings: {error}") from None
    return dict(fresh.to_dict())


def build_backbone(config: dict[str, Any]) -> PreTrainedModel:
    """A decoder with random weights and mmgen's attention, from a configuration dictionary.

    Raises:
        ValueError: transformers cannot build a decoder with these fields.
    """
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model_config = AutoConfig.for_model(config["model_type"], **fields)
    refuse_windows(model_config)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config, attn_implementation=ATTENTION, dtype=torch.float32
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a decoder of type '{config['model_type']}' cannot be built: {str(error).splitlines()[0]} "
            "(check model.backbone.model_type and model.backbone.extra)"
        ) from error
    return model


def load_pretrained(model: PreTrainedModel, name: str, tokens: int, added: int) -> None:
    """Copy the weights of a pretrained decoder into `model`, which may have a larger vocabulary.

    The last `added` of `tokens` ids are new to the decoder: their rows start at the mean of the others, so that the
    model first expects them as it expects an average token.
    """
    source = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    source.resize_token_embeddings(model.config.vocab_size)
    known = tokens - added
    for table in (source.get_input_embeddings(), source.get_output_embeddings()):
        if table is not None:
            table.weight.data[known:tokens] = table.weight.data[:known].mean(0)
    model.load_state_dict(source.state_dict())


def refuse_windows(config: PretrainedConfig) -> None:
    """Raise ValueError for decoders with sliding-window layers, because the explicit mask would replace the window."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and not getattr(config, "layer_types", None):
        kinds.add("sliding_attention")
    if kinds != {"full_attention"}:
        raise ValueError(
            f"backbone '{config.model_type}' has layers of kind {sorted(kinds - {'full_attention'})}: the mask of "
            "mmgen would replace them silently. Set sliding_window to null and layer_types to full attention in "
            "model.backbone.extra, or choose another backbone"
        )
