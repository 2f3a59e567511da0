"""Pictures of the lab, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def canvas(
    rows: int,
    columns: int,
    side: float = 2.6,
    aspect: float = 1.0,
    layout: Literal["constrained"] | None = "constrained",
) -> tuple[Figure, Any]:
    """A figure and its axes [rows, columns]."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the lab needs matplotlib for its pictures (extra `lab`): pip install matplotlib") from None
    figure = Figure(figsize=(columns * side * aspect, rows * side), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False)


def lines(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    log: Literal["", "y", "xy"] = "",
) -> Figure:
    """Curves over one axis; `log` names the logarithmic axes."""
    figure, axes = canvas(1, 1, 3.6, 1.6)
    (ax,) = axes[0]
    for k, (name, y) in enumerate(curves.items()):  # every other curve is dashed, so that coinciding curves show
        ax.plot(x, y, "-" if k % 2 == 0 else "--", marker="o" if len(x) < 15 else None, markersize=3, label=name)
    if "x" in log:
        ax.set_xscale("log")
    if "y" in log:
        ax.set_yscale("log")
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    return figure


def histograms(sets: Mapping[str, Tensor], x_label: str) -> Figure:
    """One histogram per set, side by side with a common range."""
    figure, axes = canvas(1, len(sets))
    low, high = min(float(x.min()) for x in sets.values()), max(float(x.max()) for x in sets.values())
    for ax, (name, x) in zip(axes[0], sets.items(), strict=True):
        ax.hist(x.numpy(), bins=60, range=(low, high), density=True)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel(x_label)
    return figure


def bars(values: Mapping[str, float], y_label: str, log: bool = True) -> Figure:
    """One bar per name."""
    figure, axes = canvas(1, 1, 3.6, max(1.4, 0.2 * len(values)))
    (ax,) = axes[0]
    ax.bar(list(values), list(values.values()))
    ax.set_ylabel(y_label)
    ax.tick_params(axis="x", rotation=60, labelsize=7)
    if log:
        ax.set_yscale("log")
    return figure


def scatters(panels: Mapping[str, tuple[Tensor, Tensor]], columns: int = 4) -> Figure:
    """One panel per name with data (grey) and samples (blue), [n, 2] each, on axes that fit the data.

    A panel with more than 5 % of its samples outside the axes shows their share.
    """
    rows = -(-len(panels) // columns)
    figure, axes = canvas(rows, min(columns, len(panels)))
    flat = axes.flatten()
    for ax, (name, (data, made)) in zip(flat, panels.items(), strict=False):
        limit = 1.3 * float(data.abs().max())
        ax.scatter(*data.T, s=1, c="0.75", label="data")
        ax.scatter(*made.T, s=1, c="C0", label="samples")
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        ax.set_title(name, fontsize=8)
        outside = float((made.abs() > limit).any(1).double().mean())
        if outside > 0.05:
            ax.text(0.03, 0.03, f"{outside:.0%} of the samples lie outside", transform=ax.transAxes, fontsize=6)
    for ax in flat[len(panels) :]:
        ax.axis("off")
    flat[0].legend(fontsize=6, markerscale=4, loc="upper right")
    return figure


def bar_grid(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Panels of bars on log axes, one line per quantity and one column per case; empty cases are blank."""
    figure, axes = canvas(len(rows), max(len(cases) for cases in rows.values()), 2.6, 1.4)
    for line, (quantity, cases) in zip(axes, rows.items(), strict=True):
        for ax, (case, values) in zip(line, cases.items(), strict=True):
            if not values:
                ax.axis("off")
                continue
            ax.bar(list(values), list(values.values()), color=[f"C{i // 3}" for i in range(len(values))])
            ax.tick_params(axis="x", rotation=60, labelsize=7)
            ax.set_yscale("log")
            ax.set_title(case, fontsize=9)
            ax.grid(axis="y", alpha=0.3)
            ax.set_ylabel(quantity, fontsize=8)
    return figure


def velocity_maps(
    fields: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    times: Sequence[float],
    data: Tensor,
    made: Mapping[str, Tensor],
) -> Figure:
    """One line of panels per field: its samples over the data, then v_x and v_y on a grid at each t.

    Red is positive and blue negative, on one scale per field and t. Black lines show where the component is zero, black
    points the data and green points the samples.
    """
    limit, side, inch = 1.3 * float(data.abs().max()), 48, 1.4
    line = torch.linspace(-limit, limit, side)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    figure, axes = canvas(len(fields), 1 + 2 * len(times), inch, layout=None)
    figure.subplots_adjust(
        left=0.08, right=0.995, bottom=0.01, top=1 - 0.6 / (inch * len(fields)), wspace=0.04, hspace=0.04
    )
    for row, (name, field) in zip(axes, fields.items(), strict=True):
        row[0].scatter(*data.T, s=0.3, c="0.75")
        row[0].scatter(*made[name].T, s=0.3, c="C0")
        row[0].set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
        for column, t in enumerate(times):
            v = field(grid, torch.tensor(t)).view(side, side, 2)
            scale = float(v.abs().quantile(0.95)) + 1e-9
            for part in range(2):
                ax, values = row[1 + part * len(times) + column], v[:, :, part].numpy()
                ax.imshow(values, origin="lower", extent=(-limit, limit) * 2, cmap="RdBu_r", vmin=-scale, vmax=scale)
                ax.contour(line, line, values, levels=[0.0], colors="k", linewidths=0.7)
                ax.scatter(*data[:400].T, s=0.2, c="k")
                ax.scatter(*made[name][:200].T, s=0.3, c="lime")
        for ax in row:
            ax.set(xticks=[], yticks=[], xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    heads = ["samples", *(f"$v_{part}$, t = {t:g}" for part in "xy" for t in times)]
    for ax, head in zip(axes[0], heads, strict=True):
        ax.set_title(head, fontsize=8)
    return figure


def images(rows: Tensor, labels: Sequence[str]) -> Figure:
    """Grey images [lines, columns, H, W] in [-1, 1] with a label per line."""
    figure, axes = canvas(len(rows), rows.shape[1], 0.9)
    for line, label, row in zip(axes, labels, rows, strict=True):
        for ax, image in zip(line, row, strict=True):
            ax.imshow(image.clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    return figure


def animate(frames: Sequence[tuple[float, Tensor, Tensor, Tensor]], path: Path, names: Sequence[str] = ()) -> None:
    """Write a GIF of particles and arrows; a frame is (t, particles [K, n, 2], grid [K, g, 2], arrows [K, g, 2])."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    pictures = []
    for t, particles, grid, arrows in frames:
        figure, axes = canvas(1, len(particles), 2.4)
        for k, ax in enumerate(axes[0]):
            ax.quiver(*grid[k].T, *arrows[k].T, color="0.6", angles="xy", scale=60, width=0.003)
            ax.scatter(*particles[k].T, s=1, c="C0")
            ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
            ax.set_title(f"{names[k] if names else ''}  t = {t:.2f}", fontsize=8)
        drawn = FigureCanvasAgg(figure)
        drawn.draw()
        pictures.append(Image.fromarray(np.asarray(drawn.buffer_rgba())[:, :, :3]).quantize(64))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, loop=0)
