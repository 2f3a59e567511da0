"""Commands on a trained model: named by run folder, checkpoint or exported folder, and used in every way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mmgen.config import Config, PatcherConfig
from mmgen.generate import Inpaint
from mmgen.image.patch import PixelPatcher
from tests.conftest import run


@pytest.fixture(scope="module")
def folder(six_steps: Config) -> Path:
    """The folder of the trained run."""
    return six_steps.run.dir


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    from mmgen.train.checkpoint.export import export

    export(folder, folder / "checkpoints" / "latest", out, "ema")
    return out


def drawn(capsys: pytest.CaptureFixture, out: Path, *words: object) -> list[np.ndarray]:
    code, text, err = run(capsys, "sample", *words, "--out", out, "--json")
    assert code == 0, err
    return [np.asarray(Image.open(item["image"])) for item in json.loads(text)["samples"]]


def test_run_checkpoint_and_export_draw_the_same(
    folder: Path, exported: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sources: dict[str, list[object]] = {
        "settings": ["--config", trained, "picture 1"],
        "run": [folder, "picture 1"],
        "checkpoint": [folder / "checkpoints" / "latest", "picture 1"],
        "export": [exported, "picture 1"],
        "named": ["picture 1", "--run", exported],
        "both": [exported, "picture 1", "--config", trained],
    }
    images = {name: drawn(capsys, tmp_path / name, *words) for name, words in sources.items()}
    for name, (image,) in images.items():
        assert np.array_equal(image, images["settings"][0]), name


def test_a_setting_on_the_command_line_overrides_that_of_the_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, _, err = run(capsys, "sample", folder, "a", "--sample.guidance-interval", "0.9", "0.1", "--out", tmp_path)
    assert code == 2
    assert "sample.guidance_interval must rise" in err


def test_several_images_per_caption_and_a_file_of_captions(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = tmp_path / "captions.txt"
    lines.write_text("picture 1\n\npicture 2\npicture 1\n")
    code, text, err = run(
        capsys, "sample", folder, "a first one", "--prompts", lines, "-n", 2, "--seed", 5, "--out", tmp_path, "--json"
    )
    assert code == 0, err
    assert "captions.txt: 1 empty lines are left out" in err
    assert "8 of 8 images drawn" in err
    samples = json.loads(text)["samples"]
    wanted = [caption for caption in ("a first one", "picture 1", "picture 2", "picture 1") for _ in range(2)]
    assert [item["prompt"] for item in samples] == wanted
    assert [item["seed"] for item in samples] == list(range(5, 13))
    assert all(Path(item["image"]).is_file() for item in samples)
    again = drawn(capsys, tmp_path / "again", folder, "picture 2", "--seed", 9)
    assert np.array_equal(again[0], np.asarray(Image.open(samples[4]["image"]))), "a batch changes nothing"


def test_the_size_is_one_of_the_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = yaml.safe_load((folder / "config.yaml").read_text())["model"]["patcher"]["image_sizes"]
    for height, width in sizes:
        (image,) = drawn(capsys, tmp_path, folder, "picture 1", "--size", f"{width}x{height}")
        assert image.shape[:2] == (height, width)
    code, _, err = run(capsys, "sample", folder, "picture 1", "--size", "7x9", "--out", tmp_path)
    assert code == 2
    assert "--size 7x9 is no size of the model: give one of 4x4" in err


def test_a_negative_prompt_changes_the_image(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [folder, "picture 1", "--sample.guidance-scale", 3]
    (plain,) = drawn(capsys, tmp_path / "a", *words)
    (negative,) = drawn(capsys, tmp_path / "b", *words, "--negative", "picture 2")
    assert not np.array_equal(plain, negative)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "{run}", "{file}"], "is a file: give a file of captions as `--prompts"),
        (["sample", "{run}"], "no caption is given"),
        (["sample", "{run}", "--prompts", "{empty}"], "holds no caption: write one per line"),
        (["sample", "{run}", "--prompts", "{picture}"], "is not a text file in UTF-8"),
        (["sample", "{run}", "--prompts", "missing.txt"], "missing.txt cannot be read: No such file"),
        (["sample", "a", "--run", "{nothing}"], "holds no trained model: give a run folder, a checkpoint"),
        (["caption", "{run}", "{nothing}"], "holds no picture"),
        (["caption", "{run}"], "no image is given"),
        (["edit", "{run}", "{picture}"], "edit takes a picture file and a text, got 1"),
        (["edit", "{run}", "{file}", "a"], "is not an image"),
        (["edit", "{run}", "{picture}", "a", "--mask", "{picture}", "--strength", "0.5"], "give one of them"),
        (["edit", "{run}", "{picture}", "a", "--mask", "{wide}"], "the mask is 9x4 and the picture 4x4"),
        (["edit", "{run}", "{picture}", "a", "--mask", "{black}"], "the mask has no white pixel"),
        (["edit", "{run}", "{picture}", "a", "--strength", "2"], "strength lies between 0"),
        (["generate", "{run}"], "no part is given"),
        (["generate", "{run}", "missing.png"], "missing.png does not exist: correct the path"),
        (["generate", "{run}", ""], "a part is empty"),
        (["sample", "{nothing}", "a"], "is a folder, and it holds no trained model"),
        (["sample", "runs/missing", "a"], "the folder runs/missing does not exist: correct the path"),
        (["sample", "{run}", "a", "--run.dir", "other"], "and --run.dir are both given"),
        (["export", "{export}", "--out", "again"], "is an exported folder already"),
        (["edit", "{run}", "{numbered}", "a", "--out", "{nothing}"], "is an input and would be overwritten"),
        (["sample", "{export}", "a", "--sample.weights", "weight"], "holds the weights 'ema', but sample.weights is"),
    ],
)
def test_wrong_input_has_a_message(
    folder: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file.txt").write_text("a caption")
    (tmp_path / "empty.txt").write_text("\n \n")
    Image.new("L", (4, 4), 200).save(tmp_path / "picture.png")
    Image.new("L", (9, 4), 255).save(tmp_path / "wide.png")
    Image.new("L", (4, 4), 0).save(tmp_path / "black.png")
    names = {"run": folder, "export": exported, "nothing": tmp_path / "nothing", "file": tmp_path / "file.txt"}
    names |= {"empty": tmp_path / "empty.txt", "numbered": tmp_path / "nothing" / "0000.png"}
    if "{numbered}" in words:
        Image.new("L", (4, 4), 200).save(names["numbered"])
    names |= {name: tmp_path / f"{name}.png" for name in ("picture", "wide", "black")}
    code, _, err = run(capsys, *[word.format(**names) for word in words])
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err


def test_captions_of_folders_and_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("b.png", "a.png", "other.png"):
        Image.new("L", (4, 4), 200).save(tmp_path / name)
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("b.png", "a.png"):
        (tmp_path / name).rename(inside / name)
    (inside / "notes.txt").write_text("no picture")
    code, text, err = run(capsys, "caption", folder, inside, tmp_path / "other.png", "--json")
    assert code == 0, err
    named = [Path(item["image"]).name for item in json.loads(text)["captions"]]
    assert named == ["a.png", "b.png", "other.png"]


@pytest.mark.parametrize("options", [[], ["--strength", "0.5"], ["--mask", "{mask}"]])
def test_edits(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str]) -> None:
    values = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    mask = np.zeros((4, 4), np.uint8)
    mask[:2, :2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = [option.format(mask=tmp_path / "mask.png") for option in options]
    code, text, err = run(
        capsys, "edit", folder, tmp_path / "picture.png", "picture 2", *words, "-n", 2, "--out", tmp_path, "--json"
    )
    assert code == 0, err
    edits = [np.asarray(Image.open(item["image"])) for item in json.loads(text)["edits"]]
    assert not np.array_equal(edits[0], edits[1])
    if "--mask" in words:
        assert all(np.abs(edit[2:].astype(int) - values[2:]).max() <= 1 for edit in edits), "black is kept"
        assert not np.array_equal(edits[0][:2, :2], values[:2, :2])


def test_a_mask_keeps_the_patches_without_white() -> None:
    patcher = PixelPatcher(PatcherConfig(channels=1, patch_size=2, image_sizes=[(4, 6)]))
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 5] = 255
    found = Inpaint.of_mask(Image.new("L", (6, 4)), Image.fromarray(mask), patcher)
    assert found.keep.tolist() == [[True, True, False], [True, True, True]]


def test_generate_continues_texts_and_pictures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("L", (4, 4), 200).save(tmp_path / "picture.png")
    words = [folder, "picture 1", tmp_path / "picture.png", "picture 2", "--mode", "image", "--out", tmp_path]
    code, text, err = run(capsys, "generate", *words, "--json")
    assert code == 0, err
    (segment,) = json.loads(text)["segments"]
    assert np.asarray(Image.open(segment["image"])).shape == (4, 4, 3)
    code, text, err = run(capsys, "generate", folder, tmp_path / "picture.png", "--mode", "text", "--json")
    assert code == 0, err
    assert all("text" in segment for segment in json.loads(text)["segments"])


def test_a_damaged_newest_checkpoint_is_passed_over(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, symlinks=True)
    (copy / "checkpoints" / "latest" / "trainer.json").write_text("{")
    (image,) = drawn(capsys, tmp_path / "out", copy, "picture 1")
    (older,) = drawn(capsys, tmp_path / "older", folder / "checkpoints" / "step-3", "picture 1")
    (newest,) = drawn(capsys, tmp_path / "newest", folder, "picture 1")
    assert np.array_equal(image, older)
    assert not np.array_equal(image, newest)


def test_a_checkpoint_can_be_exported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, err = run(capsys, "export", folder / "checkpoints" / "latest", "--out", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "mmgen.json").is_file()
