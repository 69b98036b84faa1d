"""The loss curve of one run: raw and smoothed training loss, and the evaluations."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..canvas import COLOURS, new_figure, plain, save_figure, shortened, tidy

LONGEST_TITLE = 80


def smoothed(values: Sequence[float], *, decay: float = 0.9) -> list[float]:
    """Exponential moving average, bias-corrected like Adam's moments (arXiv:1412.6980, section 3).

    The first value is therefore kept as it is. A non-finite value leaves the average unchanged, so
    that one overflow does not erase the rest of the curve.
    """
    average, weight, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average = decay * average + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        result.append(average / weight if weight else math.nan)
    return result


def plot_loss_curve(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, title: str | None = None
) -> None:
    """Draw the losses of a training log over its steps, as a PNG at `path` (written atomically).

    Args:
        rows: as `peft_svdinit.training.read_training_log` returns them. Every column that starts
            with `eval_` and ends with `loss` becomes one series of points.
        path: where the picture goes.
        title: a heading, such as the run's name.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    if train:
        steps, losses = zip(*train, strict=True)
        few = "." if len(steps) < 30 else ""
        axes.plot(steps, losses, few + "-", color=COLOURS[5], linewidth=1, label="training loss")
        axes.plot(steps, smoothed(losses), color=COLOURS[0], linewidth=2, label="smoothed")
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    evaluations = [name for name in names if name.startswith("eval_") and name.endswith("loss")]
    for index, name in enumerate(evaluations):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axes.plot(
            *zip(*points, strict=True),
            "o--",
            color=COLOURS[(3, 2, 4, 1)[index % 4]],
            markersize=5,
            linewidth=1,
            label=plain(shortened(name)),
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    tidy(axes)
    if title is not None:
        axes.set_title(plain(shortened(title, LONGEST_TITLE)), loc="left")
    if train or evaluations:
        axes.legend(frameon=False)
    save_figure(figure, path)
