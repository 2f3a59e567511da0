"""Convolutions over the images of a packed batch: one call of a layer for images of all sizes, never across images.

Pixels are held by patch, [I, s, s, C] with s x s pixels of C channels per patch, so layers that act on single pixels,
and skip connections, need no other arrangement. Only a convolution puts patches into images. It computes all images of
one grid together and adds no padding, so mixed sizes cost a call of the kernel per grid, and nothing per pixel. Each
layer also copies its input and its output once.

Suffixes: I patches of a batch, s pixels along the side of a patch, C channels, E width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmgen.image.patch import Grid
from mmgen.sequence.batch import Cells


class ImageMap:
    """Where each patch of a call is in its image. `cells` has all patches of the images that it names."""

    def __init__(self, cells: Cells) -> None:
        numbers: dict[Grid, list[int]] = {}
        for number, grid in enumerate(cells.grids):
            if grid is not None:
                numbers.setdefault(grid, []).append(number)
        self.groups = [(len(images), grid) for grid, images in numbers.items()]
        self.sizes = [count * rows * columns for count, (rows, columns) in self.groups]
        if sum(self.sizes) != len(cells.image_I):
            raise ValueError(
                f"a convolution was given {len(cells.image_I)} patches of images that have {sum(self.sizes)}: "
                "pass all patches of each image, and the grids of these images"
            )
        start_C, columns_C = ([0] * len(cells.grids) for _ in range(2))
        for offset, (grid, images) in zip(accumulate(self.sizes, initial=0), numbers.items(), strict=False):
            for i, number in enumerate(images):
                start_C[number], columns_C[number] = offset + i * grid[0] * grid[1], grid[1]
        start, columns = torch.tensor([start_C, columns_C], dtype=torch.long).to(cells.image_I.device)
        row_I, column_I = cells.cell_I2.unbind(-1)
        self.at_I = start[cells.image_I] + row_I * columns[cells.image_I] + column_I
        """The place of each patch when patches are sorted by grid, image and raster index."""

    def apply(self, layer: Callable[[Tensor], Tensor], x_IssC: Tensor) -> Tensor:
        """Apply a layer from [images, C, H, W] to [images, C', H', W'] to the whole images of patches [I, s, s, C].

        H' / H must be the same for all images. Returns [I, s', s', C'].
        """
        side, channels = x_IssC.shape[1], x_IssC.shape[-1]
        groups, sizes = self.groups, self.sizes
        if groups:
            sorted_IssC = torch.empty_like(x_IssC).index_copy(0, self.at_I, x_IssC)
        else:  # Without images, one patch of zeros is computed, so that every parameter takes part.
            sorted_IssC = torch.cat([x_IssC, x_IssC.new_zeros(1, side, side, channels)])
            groups, sizes = [(1, (1, 1))], [1]
        done = []
        for part, (count, (rows, columns)) in zip(sorted_IssC.split(sizes), groups, strict=True):
            by_pixel = part.view(count, rows, columns, side, side, channels).transpose(2, 3)
            out = layer(by_pixel.reshape(count, rows * side, columns * side, channels).permute(0, 3, 1, 2))
            new = out.shape[2] // rows
            by_patch = out.permute(0, 2, 3, 1).reshape(count, rows, new, columns, new, -1).transpose(2, 3)
            done.append(by_patch.reshape(count * rows * columns, new, new, -1))
        return torch.cat(done).index_select(0, self.at_I)


class PixelConv(nn.Module):
    """A convolution over the pixels of each image, with zeros outside the image.

    `stride` divides the resolution of a patch. The kernel is 3 x 3, or `stride` x `stride` for strides above 2. The
    module is called once for images of all sizes: under ZeRO-3, the number of calls must not depend on the data of a
    rank.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        size = max(3, stride)
        self.stride, self.padding = stride, 1 if stride < 3 else 0
        self.weight = nn.Parameter(torch.empty(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x_IssC: Tensor, images: ImageMap) -> Tensor:
        """[I, s, s, C] to [I, s / stride, s / stride, C']."""
        return images.apply(lambda pixels: F.conv2d(pixels, self.weight, self.bias, self.stride, self.padding), x_IssC)


class OutputConv(PixelConv):
    """A convolution that is zero at initialisation."""


class ResidualBlock(nn.Module):
    """Two convolutions of normalised pixels, with the time embedding added between them (Ho et al. 2020, appendix B).

    Norms are layer norms over the channels of each pixel, as in Transfusion (Zhou et al. 2024, section 3), so a pixel
    does not depend on the size of its image.
    """

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(inputs), PixelConv(inputs, outputs)
        self.time = nn.Linear(time, outputs)
        self.second_norm, self.second_conv = nn.LayerNorm(outputs), OutputConv(outputs, outputs)
        self.skip = nn.Linear(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x_IssC: Tensor, time_IE: Tensor, images: ImageMap) -> Tensor:
        """[I, s, s, C] to [I, s, s, C']; `time_IE` embeds the time of each patch."""
        h = self.conv(F.silu(self.norm(x_IssC)), images)
        h = h + self.time(F.silu(time_IE)).unsqueeze(1).unsqueeze(1)
        h = self.second_conv(F.silu(self.second_norm(h)), images)
        out: Tensor = self.skip(x_IssC) + h
        return out


def enlarged(x_IssC: Tensor, factor: int) -> Tensor:
    """Every pixel repeated `factor` times along both sides: [I, s, s, C] to [I, factor s, factor s, C]."""
    return x_IssC.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def prime_factors(number: int) -> list[int]:
    """The prime factors of a number in ascending order; none for 1."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors
