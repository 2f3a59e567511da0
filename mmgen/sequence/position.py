"""Positions of the patches of an image, as the rotary embedding of the backbone sees them (`model.positions`).

`shared`: all patches of an image have one position. `raster`: patches count up line by line. `axial`: all patches share
one position in the sequence, and each also has its row and column. The three numbers of `axial` are packed into one
integer, so that positions are one tensor [B, S] everywhere; tokens have row 0 and column 0.

Suffixes: N patches of one image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmgen.config import Positions
from mmgen.image.patch import Grid, raster

BITS = 20
"""Bits of the position in the sequence, and of the row, in a packed position."""
MASK = (1 << BITS) - 1


def offsets(positions: Positions, grid: Grid, lead: int = 0) -> NDArray[np.int64]:
    """What is added to the position of an image for each of its patches, in raster order: [lead + N].

    The first `lead` entries are those of positions in front of the patches, which count up like text.
    """
    rows, columns = grid
    offset_N = np.zeros(rows * columns, dtype=np.int64)
    if positions == "raster":
        offset_N = np.arange(rows * columns)
    elif positions == "axial":
        row, column = raster(grid).T
        offset_N = (row << BITS) + (column << 2 * BITS)
    return np.concatenate([np.arange(lead), lead + offset_N])


def taken(positions: Positions, grid: Grid) -> int:
    """Number of positions in the sequence that an image takes."""
    return grid[0] * grid[1] if positions == "raster" else 1
