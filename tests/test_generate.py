"""The decoder against the training forward pass, row by row, and within its grammar."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from mmgen import generate
from mmgen.backbone import RowCache, attention_mask
from mmgen.config import Config, override
from mmgen.flow.guide import classifier_free
from mmgen.flow.solve import SOLVERS
from mmgen.generate import Decoder, Request, Result
from mmgen.model import MMGenModel
from mmgen.objective import ImageSpec
from mmgen.sequence import Block, ImageSegment, TextSegment, Writer, collate
from mmgen.tokenizer import Tokenizer
from tests.conftest import awake, picture

RNG = np.random.default_rng(5)
PICTURES = [picture(RNG), picture(RNG, (6, 4))]
PROMPTS = [
    Request(["ab"], "text"),
    Request([PICTURES[0]], "text", 1),
    Request(["x", PICTURES[1], "yz", PICTURES[0]], "auto", 2),
    Request(["a picture"], "image", 3),
    Request(["longer text here"], "image", 4, (3, 2)),
    Request([PICTURES[1], "q"], "auto", 5),
]


def recorded(decoder: Decoder, requests: list[Request]) -> tuple[list[Result], list[dict]]:
    """Results, and every (document so far, logits) at which a token was chosen for row 0."""
    seen: list[dict] = []
    original = generate._Schedule._choose

    def choose(self, last_RD, feeds):
        seen.append({"logits": self.model.logits(last_RD)[0].clone(), "strip": feeds[0].strip})
        return original(self, last_RD, feeds)

    generate._Schedule._choose = choose
    try:
        return decoder.generate(requests), seen
    finally:
        generate._Schedule._choose = original


def uncached(model: MMGenModel, tokenizer: Tokenizer, document: list) -> torch.Tensor:
    """Logits [S, V] of one whole document by the training forward pass, images clean at t = 1."""
    patch, objective = model.patcher.patch_length, model.objective
    strip = Writer(tokenizer).document(document)
    nothing = objective.context(objective.settings, (0, 0), patch)
    batch = collate([[strip]], len(strip), tokenizer, nothing, patch).to("cpu", torch.float64)
    with torch.no_grad():
        inputs, _ = model.embed(batch)
        return model.logits(model.hidden(inputs, batch.position_BS, attention_mask(batch.sites)))[0]


def check_text_after_image(config: Config) -> None:
    """Draw an image inside a document, go on with text, and compare each step's logits with the whole document's."""
    config = override(config, {"sample": {"guidance_scale": 2.0, "max_new_tokens": 8}})
    model, tokenizer = awake(config)
    decoder = Decoder(model, tokenizer, config.sample)
    drawn: list[tuple[np.ndarray, tuple[int, int]]] = []
    decode = decoder.patcher.decode
    decoder.patcher.decode = lambda x_NP, grid: drawn.append((x_NP, grid)) or decode(x_NP, grid)
    with _force_image_first(tokenizer):
        results, seen = recorded(decoder, [Request(["hello"], "auto", 7)])
    (x_NP, grid), *others = drawn
    assert not others
    words = [s for s in results[0].segments if isinstance(s, str)]
    assert words, "text must follow the image"
    fed = [token for step in seen for token in step["strip"].ids if token < 256][5:]
    settings = decoder.objective.settings
    context = Block(np.arange(len(x_NP)), _clean_draws(x_NP), bidirectional=settings.bidirectional, loss=False)
    document = [TextSegment(tokenizer.encode("hello")), ImageSegment(x_NP, grid, [context]), TextSegment(fed)]
    whole = uncached(model, tokenizer, document)
    after_image = 1 + 5 + 2 + len(x_NP)  # EOI, the first position that may read the image
    steps = [step["logits"] for step in seen][-len(fed) - 1 :]
    for offset, logits in enumerate(steps):
        torch.testing.assert_close(logits, whole[after_image + offset], rtol=1e-9, atol=1e-9)


def _clean_draws(x_NP: np.ndarray) -> dict[str, np.ndarray]:
    return {"t": np.ones(len(x_NP), np.float32), "eps": np.zeros_like(x_NP)}


class _force_image_first:  # noqa: N801
    """Make the first choice BOI and the second the first size, whatever the weights say."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.original = tokenizer, Decoder._feed

    def __enter__(self) -> None:
        counts: dict[int, int] = {}
        tokenizer, original = self.tokenizer, self.original

        def feed(decoder, writer, allowed_V, rng):
            wish = original(decoder, writer, allowed_V, rng)
            n = counts[id(writer)] = counts.get(id(writer), 0) + 1
            only = {1: tokenizer.boi, 2: tokenizer.size[(2, 2)]}.get(n)
            allowed = wish.allowed_V.copy()
            if only is not None:
                allowed[:] = False
                allowed[only] = True
            else:
                allowed[tokenizer.eos] = False
            return generate._Feed(wish.strip, allowed, wish.gumbel_V)

        Decoder._feed = feed

    def __exit__(self, *_: object) -> None:
        Decoder._feed = self.original


def test_text_after_an_image_equals_the_uncached_pass(config: Config) -> None:
    check_text_after_image(config)


def _noisy_context(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmgen.objective import TransfusionObjective

    clean = TransfusionObjective.context.__func__

    def noisy(cls, settings, grid, patch_length):
        block = clean(cls, settings, grid, patch_length)
        return Block(block.order_N, {**block.draws, "t": block.draws["t"] * 0.9}, block.bidirectional, loss=False)

    monkeypatch.setattr(TransfusionObjective, "context", classmethod(noisy))


def _stale_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that were written once keep their keys: the last, still noisy solver step stands in for the image."""
    update = RowCache.update

    def first_wins(self, key_states, value_states, layer_idx, *args, **kwargs):
        stored = self._store[layer_idx]
        if stored is not None:
            at = (self._lanes.unsqueeze(1), slice(None), self._slots)
            old = [part[at].transpose(1, 2) for part in stored]
            new = (key_states, value_states)
            key_states, value_states = (torch.where(o == 0, n, o) for o, n in zip(old, new, strict=True))
        return update(self, key_states, value_states, layer_idx)

    monkeypatch.setattr(RowCache, "update", first_wins)


def _causal_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        generate,
        "dense_visible",
        lambda q, k: (q.slot.unsqueeze(2) >= k.slot.unsqueeze(1)) & (k.document.unsqueeze(1) == 0),
    )


def _wrong_position(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Writer.close_image

    def shifted(self):
        self.position += 3
        close(self)

    monkeypatch.setattr(generate, "Writer", type("Shifted", (Writer,), {"close_image": shifted}))


@pytest.mark.parametrize("fault", [_noisy_context, _stale_cache, _causal_image, _wrong_position])
def test_the_cache_check_turns_red(config: Config, monkeypatch: pytest.MonkeyPatch, fault: Callable) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        check_text_after_image(config)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_solver_steps_equal_the_training_forward(config: Config, scale: float) -> None:
    """Redraw an image with the training forward pass alone: same noise, no cache, guidance by hand."""
    config = override(config, {"sample": {"guidance_scale": scale, "steps": 5}})
    model, tokenizer = awake(config)
    decoder = Decoder(model, tokenizer, config.sample)
    drawn = []
    monkey = decoder.patcher.decode
    decoder.patcher.decode = lambda x_NP, grid: drawn.append(x_NP) or monkey(x_NP, grid)
    decoder.generate([Request(["a cat"], "image", 11)])

    noise = np.random.Generator(np.random.Philox(key=11)).standard_normal((4, model.patcher.patch_length), np.float32)
    z = torch.from_numpy(noise).double()
    patch = model.patcher.patch_length

    def velocity(text: list[int], t: float) -> torch.Tensor:
        block = Block(np.arange(4), {"t": np.full(4, t, np.float32), "eps": np.zeros((4, patch), np.float32)})
        strip = Writer(tokenizer).document(
            [*([TextSegment(text)] if text else []), ImageSegment(noise, (2, 2), [block])]
        )
        nothing = model.objective.context(model.objective.settings, (0, 0), patch)
        batch = collate([[strip]], len(strip), tokenizer, nothing, patch).to("cpu", torch.float64)
        batch.draws["t"] = torch.full((4,), t, dtype=torch.float64)
        batch.x_IP = (z - (1 - t) * 0) / max(t, 1e-300) if t else torch.zeros_like(z)
        if not t:
            batch.draws["eps"] = z.clone()
        inputs, embedded = model.embed(batch)
        hidden = model.hidden(inputs, batch.position_BS, attention_mask(batch.sites)).flatten(0, 1)
        return model.objective.projection.decode(hidden[embedded.read_at_J], None, None, None)

    with torch.no_grad():
        for i in range(5):
            t = i / 5
            v = classifier_free(velocity(tokenizer.encode("a cat"), t), velocity([], t), torch.tensor(t), scale)
            z = z + v / 5
    np.testing.assert_allclose(drawn[0], z.float().numpy(), rtol=1e-5, atol=1e-5)


def test_a_row_is_alone_in_any_batch(config: Config) -> None:
    """Text, images of two sizes, guidance: each prompt gives what it gives alone."""
    config = override(config, {"sample": {"temperature": 0.7, "max_images": 2}})
    model, tokenizer = awake(config)
    decoder = Decoder(model, tokenizer, config.sample)
    together = decoder.generate(PROMPTS)
    backwards = decoder.generate(PROMPTS[::-1])[::-1]
    for i, request in enumerate(PROMPTS):
        alone = decoder.generate([request])[0]
        for other in (together[i], backwards[i]):
            assert [_plain(s) for s in other.segments] == [_plain(s) for s in alone.segments], i
            assert other.finished == alone.finished


def _plain(segment: str | Image.Image) -> object:
    return segment if isinstance(segment, str) else (segment.size, segment.tobytes())


def test_budgets_and_modes_hold(config: Config) -> None:
    config = override(config, {"sample": {"max_images": 1, "max_new_tokens": 3, "temperature": 5.0, "steps": 1}})
    model, tokenizer = awake(config)
    decoder = Decoder(model, tokenizer, config.sample)
    for result in decoder.generate([Request(["z"], "auto", seed) for seed in range(30)]):
        assert len(result.images) <= 1
        assert sum(len(tokenizer.encode(s)) for s in result.segments if isinstance(s, str)) <= 12
    for result in decoder.generate([Request(["z"], "text", seed) for seed in range(10)]):
        assert not result.images
    for result in decoder.generate([Request(["z"], "image", seed, (3, 2)) for seed in range(3)]):
        assert [image.size for image in result.images] == [(4, 6)]
        assert result.finished


def test_bad_requests_are_refused(config: Config) -> None:
    model, tokenizer = awake(config)
    decoder = Decoder(model, tokenizer, config.sample)
    with pytest.raises(ValueError, match="the prompt is empty"):
        decoder.generate([Request([], "auto")])
    with pytest.raises(ValueError, match="the prompt is empty"):
        decoder.generate([Request(["  "], "text")])
    with pytest.raises(ValueError, match="never declared"):
        decoder.generate([Request(["a"], "image", 0, (9, 9))])
    none = Decoder(model, tokenizer, config.sample.model_copy(update={"max_images": 0}))
    with pytest.raises(ValueError, match="max_images"):
        none.generate([Request(["a"], "image")])


def test_cache_capacity_is_checked() -> None:
    cache = RowCache(1, 2, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="capacity of 4"):
        cache.begin(torch.tensor([0, 1]), 5)


def test_training_mode_is_restored(config: Config) -> None:
    model, tokenizer = awake(config)
    model.train()
    Decoder(model, tokenizer, config.sample).generate([Request(["a"], "text")])
    assert model.training


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("langevin", "annealed_langevin")])
@pytest.mark.parametrize("prediction", ["x", "eps", "v"])
def test_every_prediction_samples_what_it_knows(config: Config, prediction: str, solver: str) -> None:
    """A network that is exact for one picture draws that picture, whatever it predicts, from any noise."""
    config = override(config, {"objective": {"prediction": prediction}, "sample": {"steps": 8, "solver": solver}})
    model, _ = awake(config)
    patch = model.patcher.patch_length
    target = torch.linspace(-1, 1, 4 * patch, dtype=torch.float64).view(1, 4, patch)
    seen: dict[str, torch.Tensor] = {}

    def enter(z_IP, t_I, places):
        seen["z"], seen["t"] = z_IP, t_I
        return torch.zeros(len(z_IP), 32, dtype=z_IP.dtype), None

    def decode(hidden, memory, t_I, places):
        z, t = seen["z"], seen["t"].unsqueeze(1)
        x = target.expand(3, -1, -1).reshape(z.shape)
        return {"x": x, "eps": (z - t * x) / (1 - t), "v": (x - z) / (1 - t)}[prediction]

    model.objective._enter = enter
    model.objective.projection.decode = decode
    noise = torch.randn(3, 4, patch, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawing = model.objective.generate(ImageSpec((2, 2), noise, config.sample, torch.zeros(1, 3, 32)))
    drawn = None
    with torch.no_grad():
        next(drawing)
        while drawn is None:
            try:
                drawing.send(torch.zeros(1, 3, 4, 32, dtype=torch.float64))
            except StopIteration as stop:
                drawn = stop.value
    torch.testing.assert_close(drawn, target.expand(3, -1, -1), rtol=1e-9, atol=1e-9)
