"""The benchmark's floor does the work it claims, and its report has what scripts read."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmgen.backbone import RowCache
from mmgen.bench import step as bench
from mmgen.bench.generation import as_json, bench_generation
from mmgen.config import Config
from mmgen.data.loader import Corpus
from mmgen.generate.parts import Parts
from mmgen.model import build_model
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import ready


def test_the_floor_has_the_same_matrix_products(config: Config) -> None:
    """Counted by torch: the model adds only the embeddings of time and place, and the floor leaves nothing out."""
    tokenizer = Tokenizer.of(config)
    model = build_model(config, len(tokenizer))
    source = Corpus(config.data.train, tokenizer, config)
    batch = ready(source, source.first_step().micro[0])
    counts = {}
    for name, step in (
        ("floor", bench.Floor(model, batch, False).step),
        ("step", bench.product_step(config, model, batch, False)),
    ):
        with FlopCounterMode(display=False) as counter:
            step()
        counts[name] = counter.get_total_flops()
    width, patches = 32, len(batch.x_IP)
    extra = 2 * patches * (64 * width + width * width + 64 * width) * 2  # forward, and weight gradients of each
    assert 0 <= counts["step"] - counts["floor"] <= 1.6 * extra


def test_report(config: Config) -> None:
    told: list[str] = []
    report = bench.bench_step(config, 2, told.append, compiled=False).as_dict()
    assert report["ratio_to_floor"] > 0
    assert report["peak_memory_bytes"] > 10**6
    assert report["rounds"] == 2
    assert report["positions"] == 4 * 48
    assert torch.get_num_threads() == report["threads"]
    assert any("first call" in line for line in told)


def test_recomputation_draws_the_same_images(config: Config) -> None:
    times = bench_generation(config, 1, sides=(2, 4))
    assert set(times) == {f"{name}_{n}" for name in ("transfusion", "masked", "raster") for n in (4, 16)}
    for cell in times.values():
        assert cell.largest_difference < 1e-4
        assert cell.recomputed_over_cached > 0
    assert set(as_json(times)["masked_4"]) == {
        "seconds", "seconds_recomputed", "recomputed_over_cached", "largest_difference",
    }  # fmt: skip


class Forgetful(RowCache):
    """Loses the keys of the second slot."""

    def update(self, *args: object, **kwargs: object):
        keys, values = super().update(*args, **kwargs)
        keys = keys.clone()
        keys[:, :, 1] = 0
        return keys, values


def test_a_cache_that_forgets_is_seen(config: Config) -> None:
    times = bench_generation(config, 1, sides=(2,), parts=Parts(cache=Forgetful))
    assert max(cell.largest_difference for cell in times.values()) > 1e-4
