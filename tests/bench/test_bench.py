"""The benchmarks: the floor has the matrix products of a step, and reports have their keys."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from mmgen.backbone import RowCache
from mmgen.bench import pictures
from mmgen.bench import step as bench
from mmgen.bench.data import POSITIONS, bench_data, decoder, webdataset_pipeline
from mmgen.bench.generation import as_json, bench_generation
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import DecodedImage
from mmgen.data.loader import Corpus
from mmgen.generate.parts import Parts
from mmgen.image.patch import cut
from mmgen.model import build_model
from mmgen.sequence.batch import RawBatch
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.flops import Arithmetic
from tests.conftest import ready


def test_the_floor_has_the_same_matrix_products(config: Config) -> None:
    """By torch's count of FLOPs, a training step adds only the embeddings of time and cell to the floor."""
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


def test_the_report_of_bench_step(config: Config) -> None:
    lines: list[str] = []
    report = bench.bench_step(config, 2, lines.append, compiled=False).as_dict()
    assert report["ratio_to_floor"] > 0
    assert report["peak_memory_bytes"] > 10**6
    assert report["rounds"] == 2
    assert report["positions"] == 4 * 48
    tokenizer = Tokenizer.of(config)
    batches = Corpus(config.data.val, tokenizer, config).first_step().micro
    assert report["gflop_per_step"] == Arithmetic(build_model(config, len(tokenizer))).of(batches) / 1e9
    assert torch.get_num_threads() == report["threads"]
    assert any("first call" in line for line in lines)


def test_recomputation_draws_the_same_images(config: Config) -> None:
    times = bench_generation(config, 1, sides=(2, 4))
    assert set(times) == {f"{name}_{n}" for name in ("transfusion", "masked", "raster") for n in (4, 16)}
    for cell in times.values():
        assert cell.largest_difference < 1e-4
        assert cell.recomputed_over_cached > 0
    assert set(as_json(times)["masked_4"]) == {
        "seconds", "seconds_recomputed", "recomputed_over_cached", "largest_difference",
    }  # fmt: skip


class LosesASlot(RowCache):
    """A broken cache that returns zeros for the keys of the second slot."""

    def update(self, *args: object, **kwargs: object):
        keys, values = super().update(*args, **kwargs)
        keys = keys.clone()
        keys[:, :, 1] = 0
        return keys, values


def test_a_broken_cache_changes_the_images(config: Config) -> None:
    times = bench_generation(config, 1, sides=(2,), parts=Parts(cache=LosesASlot))
    assert max(cell.largest_difference for cell in times.values()) > 1e-4


@pytest.mark.slow
def test_the_report_of_bench_data(config: Config) -> None:
    """A small run reads all samples, and each figure is in its range."""
    lines: list[str] = []
    times = bench_data(config, 2, 30, lines.append).as_dict()
    assert {"cold_vs_webdataset", "warm_vs_webdataset", "webdataset_samples_per_second"} <= set(times)
    assert times["cold_samples_per_second"] > 0
    assert times["samples"] == 30
    assert times["lost"] == 0
    assert 0 < times["wait_fraction"] < 1
    assert all(0 < times[f"packing_fill{name}"] <= 1 for name in ("", "_greedy", "_padded", "_long_rows"))
    assert set(times["resume_seconds"]) == {str(at) for at in POSITIONS}
    assert [line.split(":")[0] for line in lines[:2]] == ["round 1 of 2", "round 2 of 2"]
    for key in ("over_bare_decode", "images_per_s_per_core", "megabytes_per_image"):
        assert set(times[key]) == {"transfusion", "mar"}
    for name in ("transfusion", "mar"):
        speeds = times["images_per_s_per_core"][name] / times["bare_images_per_s_per_core"]
        assert times["over_bare_decode"][name] == pytest.approx(speeds, rel=0.3)
        # The pixels once, and t and masks in a few kilobytes.
        assert 256 * 256 * 3 < 1e6 * times["megabytes_per_image"][name] < 256 * 256 * 3 + 6000


def test_the_photographs_have_the_spectrum_of_photographs() -> None:
    """The amplitude of brightness falls with one over the frequency; the files are equal in every call."""
    files = list(pictures.photographs(2))
    assert files == list(pictures.photographs(2))
    grey = np.asarray(Image.open(io.BytesIO(files[0])).convert("L"), dtype=float)
    assert grey.shape == (512, 512)
    amplitude = np.abs(np.fft.fft2(grey - grey.mean()))
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.fftfreq(512)) * 512
    bands = [amplitude[(frequency >= low) & (frequency < 2 * low)].mean() for low in (4, 8, 16, 32, 64)]
    slopes = np.diff(np.log2(bands))
    assert np.all(np.abs(slopes + 1) < 0.3), slopes
    assert 60_000 < len(files[0]) < 200_000


def test_the_loader_and_the_bare_decoder_give_the_same_pixels(config: Config, tmp_path: Path) -> None:
    """So the comparison is between equal results; the loader sends every image once, whatever its copies."""
    files = list(pictures.photographs(3))
    pictures.write_shard(tmp_path / "photographs.tar", files)
    for kind in pictures.OBJECTIVES:
        chosen = pictures.settings_of(config, kind, tmp_path / "photographs.tar")
        corpus = Corpus(chosen.data.train, Tokenizer.of(chosen), chosen)
        decode = pictures.bare_decoder(chosen)
        for index, file in enumerate(files):
            (image,) = [s for s in corpus.decoded(0, index).segments if isinstance(s, DecodedImage)]
            assert np.array_equal(image.x_NP, cut(decode(file), 16)[0])
        step = next(pictures.steps_without_end(corpus))
        assert sum(len(batch.patches_UP) for batch in step.micro) == 256 * step.images


@pytest.mark.slow
def test_images_that_are_sent_twice_are_detected(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(self: RawBatch) -> dict:
        return {**vars(self), "patches_UP": torch.cat([self.patches_UP] * 2)}

    monkeypatch.setattr(RawBatch, "__getstate__", doubled)
    sizes = pictures.bench_pictures(config, 1, print, 1).megabytes_per_image
    assert min(sizes.values()) > 0.38


def test_remote_shards_raise(config: Config) -> None:
    shard = config.data.train[0]
    remote = override(config, {"data": {"train": [f"file://{shard}"]}})
    with pytest.raises(ValueError, match="reads local shards"):
        bench_data(remote, 1, 4, print)


def test_webdataset_reads_the_same_samples_as_the_loader(config: Config) -> None:
    """Both readers return the same token ids and the same patches."""
    corpus = Corpus(config.data.train, Tokenizer.of(config), config)
    shards = corpus.dataset.shards
    seen = 0
    for index, (ids, (x_NP, grid)) in enumerate(webdataset_pipeline(shards, decoder(corpus))):
        text, image = sorted(corpus.decoded(0, index).segments, key=lambda s: isinstance(s, DecodedImage))
        assert list(ids) == list(text.ids)
        assert grid == image.grid
        assert np.array_equal(x_NP, image.x_NP)
        seen += 1
    assert seen == 40
