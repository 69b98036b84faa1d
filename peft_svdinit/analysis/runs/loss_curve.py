"""The loss curve of one run: raw and smoothed training loss, and the evaluations."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ...files import replacing


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
    figure = figure_class()(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    if train:
        steps, losses = zip(*train, strict=True)
        few = "." if len(steps) < 30 else ""
        axes.plot(steps, losses, few + "-", color="#9db8d9", linewidth=1, label="training loss")
        axes.plot(steps, smoothed(losses), color="#1f4e8c", linewidth=2, label="smoothed")
    columns = dict.fromkeys(column for row in rows for column in row)
    evaluations = [name for name in columns if name.startswith("eval_") and name.endswith("loss")]
    for index, name in enumerate(evaluations):
        measured = [row for row in rows if row.get(name) is not None]
        axes.plot(
            [row["step"] for row in measured],
            [row[name] for row in measured],
            "o--",
            color=("#c8501e", "#3a7d44", "#7b4fa3", "#8a6d1d")[index % 4],
            markersize=5,
            linewidth=1,
            label=name,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if title is not None:
        axes.set_title(title, loc="left")
    if train or evaluations:
        axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def figure_class() -> Any:
    """matplotlib's `Figure`, which draws without a display and without global state.

    Raises:
        ImportError: naming the extra, if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing the loss curve needs matplotlib: pip install 'peft-svdinit[report]', or pass "
            "plot=False to ComparisonCallback"
        ) from error
    return Figure
