"""The figure of single entries: |B| of a few layers, with the mask drawn over it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..canvas import COLOURS, new_figure, panels, plain, save_figure, shortened
from ..cells import EMPTY, colour_bar

LAYERS = 6
# More rows and columns than this would be thinner than a pixel or two.
ROWS, COLUMNS = 72, 64
_COLUMNS_OF_PANELS = 3


def plot_mask_entries(
    masks: Mapping[str, Bool[Tensor, "out rank"]],
    path: str | os.PathLike,
    *,
    lora_B: Mapping[str, Float[Tensor, "out rank"]] | None = None,
    title: str = "",
) -> None:
    """Six layers from the fullest to the emptiest mask, entry by entry.

    Rows of B are sorted by how many entries they keep; of a tall matrix rows at even distances are
    drawn, of a wide one the first 64 columns. Kept entries are in colour, by |B| over the layer's
    root mean square where B is known; the others are grey by the same measure.

    Raises:
        ImportError: without matplotlib.
    """
    names = _chosen(masks)
    columns = min(_COLUMNS_OF_PANELS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(max(4.1 * columns, 6.5), 4.6 * rows + 1.0, title)
    places = panels(figure, len(names), columns)
    images = [
        _draw(axes, name, masks[name], None if lora_B is None else lora_B[name])
        for axes, name in zip(places, names, strict=True)
    ]
    image = next((image for image in images if image is not None), None)
    if image is not None:
        label = "|B| / root mean square of the layer; the kept entries in colour, others in grey"
        colour_bar(figure, image, places, label, aspect=50)
    save_figure(figure, path)


def _chosen(masks: Mapping[str, Tensor]) -> list[str]:
    """Layers at even distances in the order of their density."""
    densities = {name: float(mask.double().mean()) for name, mask in masks.items()}
    ordered = sorted(masks, key=lambda name: -densities[name])
    count = min(LAYERS, len(ordered))
    last = len(ordered) - 1
    return [ordered[round(place * last / max(1, count - 1))] for place in range(count)]


def _draw(axes: Any, name: str, mask: Tensor, lora_B: Tensor | None) -> Any:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgb

    mask = mask.cpu()
    order = mask.sum(1).argsort(descending=True, stable=True)
    count = min(ROWS, len(order))
    shown = order[torch.linspace(0, len(order) - 1, count).round().long()]
    kept = mask[shown, :COLUMNS]
    sizes = None
    if lora_B is not None:
        magnitudes = lora_B.detach().cpu().float().abs()
        mean = float(magnitudes.square().mean().sqrt())
        sizes = magnitudes[shown, :COLUMNS] / mean if mean else None
    scale = Normalize(0.0, 3.0, clip=True)
    if sizes is None:
        colour, grey = torch.tensor(to_rgb(COLOURS[0])), torch.tensor(to_rgb(EMPTY))
    else:
        colour = torch.from_numpy(colormaps["YlOrRd"](scale(sizes.numpy())))[..., :3]
        # Not to black, which would draw the eye away from what is kept.
        grey = torch.from_numpy(colormaps["Greys"](0.6 * scale(sizes.numpy())))[..., :3]
    pixels = torch.where(kept.unsqueeze(2), colour, grey)
    axes.imshow(pixels.numpy(), aspect="auto", interpolation="none")
    density = float(mask.double().mean())
    axes.set_title(f"{plain(shortened(name))}: {density:.1%} kept", fontsize=9.5)
    rows = "all rows of B" if count == len(order) else f"{count} of {len(order)} rows of B"
    axes.set_ylabel(f"{rows}, fullest first", fontsize=9)
    hidden = "" if mask.shape[1] <= COLUMNS else f", the first {COLUMNS} of {mask.shape[1]}"
    axes.set_xlabel(f"columns of B (rank){hidden}", fontsize=9)
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    axes.spines[:].set_visible(False)
    return None if sizes is None else ScalarMappable(scale, colormaps["YlOrRd"])
