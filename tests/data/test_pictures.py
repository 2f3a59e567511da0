"""Decoding pictures and stored latents: modes, orientation, sizes, filters and crops."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mmgen.config import LimitsConfig
from mmgen.data.shards.pictures import image_size, open_image, open_stored
from mmgen.data.shards.samples import (
    BadSample,
    Picture,
)
from mmgen.image.resize import fit, flatten, nearest_size
from tests.conftest import png
from tests.data.common import npy


def test_modes_and_orientation() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 65536, (4, 4), dtype=np.uint16)
    deep = open_image(png(Image.fromarray(values)))
    np.testing.assert_array_equal(np.asarray(flatten(deep, 1)), np.rint(values / 257))
    clear = Image.fromarray(np.dstack([np.full((4, 4, 3), 200, np.uint8), np.array([[0, 85, 170, 255]] * 4, np.uint8)]))
    np.testing.assert_allclose(np.asarray(flatten(clear, 3))[0, :, 0], [255, 237, 218, 200], atol=1)
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert np.asarray(flatten(jpeg(cmyk), 3))[0, 0, 0] > 200, "red"
    sides = Image.fromarray(np.kron(np.array([[255, 0]], np.uint8), np.ones((32, 32), np.uint8)))  # left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = jpeg(sides, exif=exif)
    assert image_size(Picture(turned.fp_data), LimitsConfig()) == (64, 32)
    shown = np.asarray(fit(turned, 1, [(64, 32)]))
    assert shown.shape == (64, 32)
    assert shown[:32].mean() > 200 > 50 > shown[32:].mean(), "the left half is on top"


def jpeg(image: Image.Image, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95, **options)
    opened = open_image(buffer.getvalue())
    opened.fp_data = buffer.getvalue()  # type: ignore[attr-defined]
    return opened


def test_sizes_filters_and_crops() -> None:
    declared = [(16, 16), (32, 32), (16, 32), (32, 16)]
    sizes = np.array([[100, 100], [20, 20], [10, 10], [50, 100], [300, 100], [16, 32]])
    assert nearest_size(sizes, declared).tolist() == [1, 0, 0, 2, 3, 2]
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1)))  # 32 x 64
    left, middle = (np.asarray(fit(ramp, 1, [(16, 16)], "area", at)) for at in ((0.0, 0.0), (0.5, 0.5)))
    np.testing.assert_allclose(left[0], np.arange(0, 128, 4).reshape(-1, 2).mean(1), atol=1)
    np.testing.assert_allclose(middle[0].astype(int) - left[0], 64, atol=1)
    edge = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 32, axis=0).repeat(32, axis=1))
    sharp, soft = (np.asarray(fit(edge, 1, [(16, 32)], name)) for name in ("lanczos", "area"))
    assert set(np.unique(soft)) == {0, 255} != set(np.unique(sharp)), "Lanczos rings at an edge"


def test_a_large_jpeg_is_decoded_small() -> None:
    from mmgen.image.resize import draft

    buffer = io.BytesIO()
    Image.fromarray(np.tile(np.linspace(0, 255, 2048).astype(np.uint8), (2048, 1))).save(buffer, format="JPEG")
    sizes = []
    image = open_image(buffer.getvalue(), None, lambda image: (draft(image, [(64, 64)]), sizes.append(image.size)))
    assert image.size == (256, 256)
    whole = fit(open_image(buffer.getvalue()), 1, [(64, 64)])
    assert np.abs(np.asarray(fit(image, 1, [(64, 64)])).astype(int) - np.asarray(whole)).mean() < 2


def test_latents_are_read_safely() -> None:
    from safetensors.numpy import save

    latent = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float16)
    for data in (npy(latent), npy(np.asfortranarray(latent)), save({"latent": latent})):
        opened = open_stored(data)
        assert (opened.kind, opened.array.dtype) == ("latent", np.float32)
        np.testing.assert_array_equal(opened.array, latent.astype(np.float32))
    for wrong in (
        npy(latent[0]),
        npy(latent.astype(np.int32)),
        save({}),
        b"",
        b"\x93NUMPY\x09\x00",
        save({"latent": latent})[:-3],
    ):
        with pytest.raises(BadSample, match="latent|array cannot be read"):
            open_stored(wrong)
