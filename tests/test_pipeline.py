"""`MMGenPipeline`: it draws what the command draws, from the exported folder alone, and checks its arguments."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmgen import MMGenPipeline
from mmgen.config import Config
from mmgen.generate import Decoder, Request
from mmgen.train.checkpoint.export import export
from mmgen.train.checkpoint.trained import load_folder, stored_settings


@pytest.fixture
def folder(six_steps: Config) -> Path:
    """The folder of a trained run."""
    return six_steps.run.dir


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def equal(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_it_draws_what_the_decoder_draws(folder: Path) -> None:
    pipeline = MMGenPipeline.from_pretrained(folder)
    images = pipeline(
        ["picture 1", "picture 2"], generator=seeded(5), num_images_per_prompt=2, height=4, width=4
    ).images
    trained = load_folder(folder, "ema")
    decoder = Decoder(trained.model, trained.tokenizer, stored_settings(folder).sample)
    texts = ["picture 1", "picture 1", "picture 2", "picture 2"]
    wanted = decoder.generate([Request([text], "image", 5 + i, (2, 2)) for i, text in enumerate(texts)])
    assert len(images) == 4
    for image, result in zip(images, wanted, strict=True):
        assert equal(image, result.images[0])


@pytest.mark.slow
def test_the_exported_folder_draws_alone_in_a_fresh_process(folder: Path, tmp_path: Path) -> None:
    export(folder, folder / "checkpoints" / "latest", tmp_path / "exported", "ema")
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(tmp_path / "exported", moved)
    script = (
        "import torch\nfrom mmgen import MMGenPipeline\n"
        f"pipeline = MMGenPipeline.from_pretrained({str(moved)!r})\n"
        "image = pipeline('picture 1', generator=torch.Generator().manual_seed(3)).images[0]\n"
        f"image.save({str(tmp_path / 'drawn.png')!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    here = MMGenPipeline.from_pretrained(folder)("picture 1", generator=seeded(3)).images[0]
    assert equal(Image.open(tmp_path / "drawn.png"), here)


def test_arguments_change_the_image(folder: Path) -> None:
    pipeline = MMGenPipeline.from_pretrained(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8))
    mask = Image.fromarray(np.pad(np.full((2, 2), 255, np.uint8), ((0, 2), (0, 2))))

    def drawn(**named: object) -> Image.Image:
        return pipeline("picture 1", generator=seeded(1), **named).images[0]  # type: ignore[arg-type]

    images = {
        "plain": drawn(guidance_scale=3.0),
        "steps": drawn(guidance_scale=3.0, num_inference_steps=3),
        "guidance": drawn(guidance_scale=1.0),
        "negative": drawn(guidance_scale=3.0, negative_prompt="picture 2"),
        "start": drawn(guidance_scale=3.0, image=picture, strength=0.5),
        "mask": drawn(guidance_scale=3.0, image=picture, mask_image=mask),
    }
    names = list(images)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert not equal(images[one], images[other]), (one, other)
    assert equal(images["mask"].crop((0, 2, 4, 4)), picture.crop((0, 2, 4, 4))), "black is kept"
    both = pipeline(["picture 1", "picture 2"], ["a", "b"], generator=[seeded(1), seeded(4)], guidance_scale=3.0).images
    alone = pipeline("picture 2", "b", generator=seeded(4), guidance_scale=3.0).images[0]
    assert equal(both[1], alone), "lists give each image its own seed and negative prompt"
    torch.manual_seed(0)
    unseeded = pipeline("picture 1").images[0]
    assert not equal(unseeded, pipeline("picture 1").images[0]), "without a generator, each call draws another image"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 5, "width": 5}, "no size of height 5 and width 5: give one of 4x4"),
        ({"height": 4}, "no size of height 4 and width None"),
        ({"mask_image": Image.new("L", (4, 4))}, "mask_image needs the picture"),
        ({"num_images_per_prompt": 0}, "nothing to draw"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"strength": 7.0}, "strength lies between"),
        ({"image": [Image.new("L", (4, 4))]}, "image must be one PIL image, got list"),
        ({"generator": [torch.Generator()] * 2}, "generator has 2 entries for 1 images"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts for 1 prompts"),
    ],
)
def test_wrong_arguments(folder: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMGenPipeline.from_pretrained(folder)("picture 1", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "message"), [("none", "none does not exist"), ("empty", "holds no trained model")])
def test_a_folder_without_a_model(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        MMGenPipeline.from_pretrained(tmp_path / name)
