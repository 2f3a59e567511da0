"""`mmgen caption`: the note about a picture that does not have a declared size or the colours of the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mmgen.cli import caption as command
from mmgen.cli import pictures
from mmgen.config import Config, PatcherConfig
from mmgen.image.patch import PixelPatcher
from tests.conftest import awake, run


@pytest.mark.parametrize(
    ("size", "mode", "channels", "changes"),
    [
        ((100, 60), "RGB", 3, "is 100x60; it was scaled and cropped to 16x16"),
        ((64, 64), "RGB", 3, "is 64x64; it was scaled to 16x16"),
        ((16, 16), "RGB", 1, "is 16x16; it was converted to grey"),
        ((8, 9), "RGBA", 1, "is 8x9; it was scaled and cropped to 16x16 and converted to grey"),
        ((16, 16), "RGB", 3, ""),
        ((16, 16), "L", 1, ""),
        ((16, 16), "L", 3, ""),
    ],
)
def test_changes_of_a_picture(size: tuple[int, int], mode: str, channels: int, changes: str) -> None:
    patcher = PixelPatcher(PatcherConfig(channels=channels, patch_size=4, image_sizes=[(16, 16)]))
    assert pictures.describe_changes(Image.new(mode, size), patcher) == changes


def test_a_turned_picture_is_described_upright() -> None:
    picture = Image.new("RGB", (100, 60))
    picture.getexif()[0x0112] = 6
    patcher = PixelPatcher(PatcherConfig(channels=3, patch_size=4, image_sizes=[(16, 16)]))
    assert pictures.describe_changes(picture, patcher) == "is 60x100; it was scaled and cropped to 16x16"


def test_the_note_is_one_line_on_standard_error(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A picture of a declared size (4x4) has no note; captions are on standard output, whatever the notes."""
    model, tokenizer = awake(config)
    monkeypatch.setattr(command, "load_run", lambda config: SimpleNamespace(model=model, tokenizer=tokenizer))
    paths = [tmp_path / "large.png", tmp_path / "small.png"]
    for path, size in zip(paths, ((100, 60), (4, 4)), strict=True):
        Image.new("RGB", size).save(path)
    code, out, err = run(capsys, "caption", *paths, "--json")
    assert code == 0
    assert out.startswith('{"captions": ')
    note, speed = err.splitlines()
    assert note == f"{paths[0]} is 100x60; it was scaled and cropped to 4x4"
    assert speed.startswith("2 of 2 pictures captioned, ")
