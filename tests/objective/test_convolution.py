"""Convolutions in packed batches, and the projections `conv` and `unet`, against torch and diffusers on single images."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from mmgen.config import Config, PatcherConfig
from mmgen.config_io import override
from mmgen.generate.decoder import Decoder, Request
from mmgen.image.patch import cut, join, raster
from mmgen.model import MMGenModel, build_model
from mmgen.objective import build_objective
from mmgen.objective.convolution import ImageMap, PixelConv, ResidualBlock, enlarged, prime_factors
from mmgen.objective.layers import PROJECTIONS, build_projection
from mmgen.parity import check_parity
from mmgen.sequence.batch import Cells
from mmgen.sequence.document import TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import awake, packed
from tests.objective.test_mar import first_batch

GRIDS = [(2, 3), (4, 1), (2, 3), (3, 2)]
NEW = ("conv", "unet")


def shuffled(grids: list[tuple[int, int]], seed: int = 0) -> Cells:
    """Cells of several images whose patches are mixed with each other."""
    image_I = torch.cat([torch.full((rows * columns,), i) for i, (rows, columns) in enumerate(grids)])
    cell_I2 = torch.cat([torch.from_numpy(raster(grid)) for grid in grids])
    order = torch.randperm(len(image_I), generator=torch.Generator().manual_seed(seed))
    return Cells(image_I[order], cell_I2[order], grids)


def alone(cells: Cells, number: int) -> tuple[Tensor, Cells]:
    """The indices of the patches of one image in raster order, and their cells as those of the only image."""
    mine = torch.nonzero(cells.image_I == number).flatten()
    columns = cells.grids[number][1]
    mine = mine[(cells.cell_I2[mine] * torch.tensor([columns, 1])).sum(1).argsort()]
    return mine, Cells(torch.zeros(len(mine), dtype=torch.long), cells.cell_I2[mine], [cells.grids[number]])


def whole(patches_NssC: Tensor, grid: tuple[int, int]) -> Tensor:
    """The image [1, C, H, W] of patches in raster order, put together by `mmgen.image.patch.join`."""
    joined = join(patches_NssC.detach().flatten(1).numpy(), grid, patches_NssC.shape[1])
    return torch.from_numpy(joined).permute(2, 0, 1).unsqueeze(0)


def in_patches(image_1CHW: Tensor, side: int) -> Tensor:
    """The inverse of `whole`."""
    patches, _ = cut(image_1CHW[0].permute(1, 2, 0).detach().numpy(), side)
    return torch.from_numpy(patches).view(len(patches), side, side, -1)


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (2, 1), (2, 2), (6, 2), (3, 3), (5, 5)])
def test_a_convolution_is_that_of_each_image_alone(side: int, stride: int) -> None:
    """Torch's convolution of every image by itself, for mixed sizes and patches in any order."""
    torch.manual_seed(0)
    cells, conv = shuffled(GRIDS), PixelConv(3, 4, stride).double()
    nn.init.normal_(conv.bias)
    x = torch.randn(len(cells.image_I), side, side, 3, dtype=torch.float64)
    found = conv(x, ImageMap(cells))
    for number, grid in enumerate(GRIDS):
        mine, _ = alone(cells, number)
        image = F.conv2d(whole(x[mine], grid), conv.weight, conv.bias, stride, 1 if stride < 3 else 0)
        torch.testing.assert_close(found[mine], in_patches(image, side // stride), rtol=1e-12, atol=1e-12)


def test_a_subset_of_the_images_and_missing_patches() -> None:
    torch.manual_seed(0)
    cells, conv = shuffled(GRIDS), PixelConv(3, 4).double()
    x = torch.randn(len(cells.image_I), 2, 2, 3, dtype=torch.float64)
    some = torch.nonzero((cells.image_I == 1) | (cells.image_I == 3)).flatten()
    subset = Cells(cells.image_I[some], cells.cell_I2[some], [None, (4, 1), None, (3, 2)])
    found, every = conv(x[some], ImageMap(subset)), conv(x, ImageMap(cells))
    torch.testing.assert_close(found, every[some], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="pass all patches of each image"):
        ImageMap(Cells(cells.image_I[some][1:], cells.cell_I2[some][1:], subset.grids))


class ChannelNorm(nn.Module):
    """A layer norm over the channels of [M, C, H, W] with the weights of a norm over the last axis."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], self.norm.weight, self.norm.bias).movedim(-1, 1)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 6), (8, 4)])
def test_the_residual_block_is_that_of_diffusers(inputs: int, outputs: int) -> None:
    """`ResnetBlock2D` with its group norms replaced by layer norms, as Transfusion replaces its norms."""
    torch.manual_seed(0)
    ours = ResidualBlock(inputs, outputs, 10).double()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    theirs = ResnetBlock2D(in_channels=inputs, out_channels=outputs, temb_channels=10, groups=2).double()
    theirs.norm1, theirs.norm2 = ChannelNorm(ours.norm), ChannelNorm(ours.second_norm)
    pairs = [(theirs.conv1, ours.conv), (theirs.conv2, ours.second_conv), (theirs.time_emb_proj, ours.time)]
    pairs += [(theirs.conv_shortcut, ours.skip)] if inputs != outputs else []
    with torch.no_grad():
        for their, our in pairs:
            their.weight.copy_(our.weight.view_as(their.weight))
            their.bias.copy_(our.bias)
    cells = shuffled([(3, 2)])
    mine, _ = alone(cells, 0)
    x, time = torch.randn(6, 2, 2, inputs, dtype=torch.float64), torch.randn(1, 10, dtype=torch.float64)
    found = ours(x, time.expand(6, 10), ImageMap(cells))[mine]
    expected = in_patches(theirs(whole(x[mine], (3, 2)), time), 2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_resolutions_change_as_in_diffusers() -> None:
    torch.manual_seed(0)
    cells = shuffled([(3, 2)])
    mine, _ = alone(cells, 0)
    x = torch.randn(6, 2, 2, 4)
    down, theirs = PixelConv(4, 4, 2), Downsample2D(4, use_conv=True, padding=1)
    theirs.conv.load_state_dict(down.state_dict())
    torch.testing.assert_close(down(x, ImageMap(cells))[mine], in_patches(theirs(whole(x[mine], (3, 2))), 1))
    up, theirs = PixelConv(4, 4), Upsample2D(4, use_conv=True)
    theirs.conv.load_state_dict(up.state_dict())
    torch.testing.assert_close(up(enlarged(x, 2), ImageMap(cells))[mine], in_patches(theirs(whole(x[mine], (3, 2))), 4))


def test_prime_factors() -> None:
    assert [prime_factors(n) for n in (1, 2, 12, 7, 16)] == [[], [2], [2, 2, 3], [7], [2, 2, 2, 2]]


def projected(name: str, patch_size: int) -> nn.ModuleList:
    """Entry and exit of a projection in float64 whose weights are all random."""
    torch.manual_seed(0)
    size = 12 * patch_size
    settings = PatcherConfig(
        projection=name, patch_size=patch_size, image_sizes=[(size, size)], conv_channels=4, conv_depth=2
    )
    projection = build_projection(settings, 16)
    parts = nn.ModuleList([projection.entry(), projection.exit()]).double()
    for p in parts.parameters():
        nn.init.normal_(p, std=0.3)
    return parts


def check_each_alone(name: str, patch_size: int) -> None:
    """Each image of a mixed batch has the inputs, memory and outputs that it has alone, with its own time."""
    entry, leave = projected(name, patch_size)
    cells, length = shuffled(GRIDS), 3 * patch_size**2
    x = torch.randn(len(cells.image_I), length, dtype=torch.float64)
    t = torch.tensor([0.1, 0.9, 0.4, 0.6], dtype=torch.float64)[cells.image_I]
    hidden = torch.randn(len(x), 16, dtype=torch.float64)
    with torch.no_grad():
        entered, memory = entry.enter(x, t, cells)
        out = leave.leave(hidden, memory, t, cells)
        for number in range(len(GRIDS)):
            mine, only = alone(cells, number)
            found, own = entry.enter(x[mine], t[mine], only)
            torch.testing.assert_close(entered[mine], found, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(out[mine], leave.leave(hidden[mine], own, t[mine], only), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("patch_size", [1, 2, 6])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_an_image_in_a_batch_is_computed_as_alone(name: str, patch_size: int) -> None:
    check_each_alone(name, patch_size)


class TestTheCheckAbove:
    """It fails if a convolution leaks, if a skip comes from another image, or if the time does."""

    @pytest.mark.parametrize("name", NEW)
    def test_one_tall_image(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """Images of one grid below each other in one image: the convolution sees across their border."""
        plain = ImageMap.apply

        def leaking(self, layer, x):
            def tall(pixels: Tensor) -> Tensor:
                m, c, h, w = pixels.shape
                out = layer(pixels.transpose(0, 1).reshape(1, c, m * h, w))
                return out.reshape(out.shape[1], m, -1, out.shape[-1]).transpose(0, 1)

            return plain(self, tall, x)

        monkeypatch.setattr(ImageMap, "apply", leaking)
        with pytest.raises(AssertionError, match="not close"):
            check_each_alone(name, 2)

    @pytest.mark.parametrize("name", NEW)
    def test_patches_in_the_wrong_cells(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        plain = ImageMap.__init__

        def unsorted(self, cells):
            plain(self, cells)
            self.at_I = torch.arange(len(self.at_I))

        monkeypatch.setattr(ImageMap, "__init__", unsorted)
        with pytest.raises(AssertionError, match="not close"):
            check_each_alone(name, 2)

    @pytest.mark.parametrize("what", ["skip", "time"])
    def test_a_skip_or_a_time_of_another_image(self, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        from mmgen.objective.layers import UNetUp

        plain = UNetUp.leave

        def wrong(self, hidden, memory, t, cells):
            return plain(self, hidden, memory.roll(1, 0) if what == "skip" else memory, t.roll(1, 0), cells)

        monkeypatch.setattr(UNetUp, "leave", wrong)
        with pytest.raises(AssertionError, match="not close"):
            check_each_alone("unet", 2)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_only_convolutions_cross_the_edge_of_a_patch(name: str) -> None:
    """The output of a patch depends on its neighbours, and a patch beyond the reach of the convolutions has no part."""
    entry, leave = projected(name, 2)
    cells = Cells(torch.zeros(144, dtype=torch.long), torch.from_numpy(raster((12, 12))), [(12, 12)])
    x, t = torch.randn(144, 12, dtype=torch.float64), torch.full((144,), 0.5, dtype=torch.float64)
    hidden = torch.randn(144, 16, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        memory = entry.enter(x, t, cells)[1]
    leave.leave(hidden, memory, t, cells)[65].sum().backward()
    reached = hidden.grad.abs().amax(1).view(12, 12) > 1e-12
    assert reached[5, 5]
    assert reached[5, 6] == reached[4, 4] == (name in NEW)
    if name == "conv":
        assert reached.sum() == 9, "two convolutions of 3 x 3 reach one patch of 2 x 2 pixels"


def projection(config: Config, name: str, objective: str = "transfusion", **patcher: object) -> Config:
    """A configuration with a projection of few channels, and with rows that hold images of 24 patches twice."""
    small = {"projection": name, "conv_channels": 4, **patcher}
    return override(config, {"objective": {"kind": objective}, "model": {"patcher": small}, "data": {"row_length": 72}})


@pytest.mark.parametrize(("name", "kind"), [("unet", "transfusion"), ("conv", "transfusion"), ("conv", "mar")])
def test_every_parameter_takes_part_and_every_layer_is_called_once(config: Config, name: str, kind: str) -> None:
    """For any number of images and sizes: under ZeRO-3, a rank that calls a layer more often than others hangs."""
    model, tokenizer = awake(projection(config, name, kind, patch_size=1), torch.float32)
    model.train()
    words = TextSegment(tokenizer.encode("words"))
    strip = Writer(tokenizer, "shared").document([words])
    nothing = model.objective.layout.context((0, 0))
    without = packed([[strip]], len(strip), tokenizer, nothing, 3, torch.float32, model.objective.layout.noise_draws)
    mixed = first_batch(projection(config, name, kind, patch_size=1), tokenizer).to("cpu", torch.float32)
    assert len({copy.grid for copy in mixed.copies}) == 2
    calls: list[str] = []
    layers = [(name, part) for name, part in model.objective.named_modules() if isinstance(part, PixelConv)]
    for part_name, part in layers:
        part.register_forward_hook(lambda *_, part_name=part_name: calls.append(part_name))
    for batch in (without, mixed):
        losses = model(batch)
        (losses.text + losses.image).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        assert sorted(calls) == sorted(part_name for part_name, _ in layers)
        calls.clear()
        model.zero_grad()


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_fresh_projection_predicts_zero(config: Config, name: str) -> None:
    torch.manual_seed(0)
    config = projection(config, name)
    tokenizer = Tokenizer.of(config)
    model = build_model(config, len(tokenizer)).double()
    batch = first_batch(config, tokenizer)
    expected = (batch.x_IP[batch.loss_at_J] - batch.eps_JKP[:, 0]).square().mean(-1).sum()
    torch.testing.assert_close(model(batch).image, expected)


@pytest.mark.parametrize(("name", "kind"), [("unet", "transfusion"), ("conv", "transfusion"), ("conv", "mar")])
def test_it_learns_draws_and_is_saved(config: Config, tmp_path: Path, name: str, kind: str) -> None:
    """The loss falls; a saved model draws the same pictures, of both sizes; in bf16 it draws too."""
    config = projection(config, name, kind)
    tokenizer = Tokenizer.of(config)
    torch.manual_seed(0)
    model = build_model(config, len(tokenizer))
    batch = first_batch(config, tokenizer).to("cpu", torch.float32)
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(25):
        losses = model(batch)
        image = losses.image / losses.image_count
        (losses.text / losses.text_count + image).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(image.item())
    assert history[-1] < 0.9 * history[0]
    model.save_pretrained(tmp_path / "out")
    again = MMGenModel.from_pretrained(tmp_path / "out")
    assert again.patcher == config.model.patcher
    requests = [Request(["picture 1"], "image", 1), Request(["picture 2"], "image", 2, (3, 2))]
    models = (model, again, deepcopy(again).bfloat16())
    drawn = [Decoder(one, tokenizer, config.sample).generate(requests) for one in models]
    assert [result.images[0].size for result in drawn[0]] == [(4, 4), (4, 6)]
    pictures = [[np.asarray(result.images[0], dtype=int) for result in results] for results in drawn]
    assert all((a == b).all() for a, b in zip(*pictures[:2], strict=True))
    assert all(np.abs(a - b).mean() < 20 for a, b in zip(pictures[0], pictures[2], strict=True))


def test_objectives_that_have_no_use_for_a_projection_refuse_it(config: Config) -> None:
    objective = override(config, {"objective": {"kind": "mar"}}).objective
    with pytest.raises(ValueError, match=r"no up blocks: set model.patcher.projection to conv .* or linear"):
        build_objective(objective, config.model.patcher.model_copy(update={"projection": "unet"}), 8)
    causal = override(config, {"objective": {"kind": "mar", "mar": {"order": "raster"}}}).objective
    with pytest.raises(ValueError, match=r"'conv' mixes the patches .* set objective.mar.order to masked"):
        build_objective(causal, config.model.patcher.model_copy(update={"projection": "conv"}), 8)
    with pytest.raises(ValueError, match="no up blocks"):
        check_parity(projection(config, "unet", "mar"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_sampling_equals_training(config: Config, name: str) -> None:
    reports = check_parity(projection(config, name, conv_depth=2))
    names = ["transfusion, noisy", "transfusion, capped", "transfusion, clean copy"]
    assert [report.variant for report in reports] == names + ["mar, masked"] * (name == "conv")
    for report in reports:
        assert report.holds, report


@pytest.mark.slow
def test_parity_sees_a_decoder_that_convolves_otherwise(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's own convolution, of an image alone, is mirrored."""
    assert not any(report.holds for report in check_parity(projection(config, "unet"), "shifted-t"))
    plain = ImageMap.apply

    def mirrored(self, layer, x):
        drawing = self.groups == [(1, (3, 2))]
        return plain(self, (lambda pixels: layer(pixels.flip(-1))) if drawing else layer, x)

    monkeypatch.setattr(ImageMap, "apply", mirrored)
    assert not any(report.holds for report in check_parity(projection(config, "unet")))
