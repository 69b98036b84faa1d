"""The plots of a comparison, one function each, drawn on any matplotlib axes.

Nothing here imports matplotlib: the caller brings the axes, and with them the colour of the text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import wording
from .compare import Comparison, PairedTable
from .seed_statistics import spread
from .tables import TABLE_TITLES
from .trials import Evaluation, Trial

# Okabe & Ito's colour-blind safe palette without yellow and black, which vanish on one ground.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
MUTED = "#868c95"
LONGEST_LABEL = 40
LABEL_WIDTH = 22
LOSS = "evaluation loss (nats per token)"

Axis = Literal["steps", "budget"]


@dataclass(frozen=True)
class Style:
    """How one method looks in every figure; `color` is None for the text's own colour."""

    color: str | None
    marker: str
    dash: str


@dataclass(frozen=True)
class Panel:
    """One plot: `draw(axes, ink)` fills it, `height` is in inches, at about 4 to 7 wide."""

    name: str
    title: str
    remarks: tuple[str, ...]
    draw: Callable[[Any, str], None]
    height: float = 3.4


def method_styles(comparison: Comparison) -> dict[str, Style]:
    """A style for every method: the references in the text's colour, the others coloured."""
    styles = {
        comparison.reference: Style(None, "o", "-"),
        comparison.total_reference: Style(None, "s", "--"),
    }
    names = [method.method for method in comparison.methods]
    names += [sweep.method for sweep in comparison.sweeps if sweep.method not in names]
    others = [name for name in names if name not in styles]
    for position, name in enumerate(others):
        lap, color = divmod(position, len(PALETTE))
        styles[name] = Style(
            PALETTE[color],
            MARKERS[(position + 2) % len(MARKERS)],
            DASHES[lap % len(DASHES)],
        )
    return {name: styles[name] for name in names}


def method_labels(comparison: Comparison) -> dict[str, str]:
    """Labels for a legend, those with a sunk teacher marked."""
    labels = {sweep.method: sweep.label for sweep in comparison.sweeps}
    for method in comparison.methods:
        sunk = " (teacher sunk)" if method.teacher_sunk else ""
        labels[method.method] = f"{method.label}{sunk}"
    return labels


def short_label(label: str, width: int = LONGEST_LABEL, lines: int = 1) -> str:
    """A label for matplotlib: no mathtext, no leading underscore, cut to `lines` of `width`."""
    wrapped = textwrap.wrap(label, width, max_lines=lines, placeholder="\u2026")
    text = "\n".join(wrapped).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def compact(value: float, _position: int | None = None) -> str:
    """A count for an axis: 1500 is 1.5k, 2000000 is 2M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def curves(comparison: Comparison, axis: Axis, *, late: bool = False) -> Panel:
    by_tokens = axis == "budget" and _tokens_known(comparison)
    unit = "tokens" if by_tokens else "steps"
    x_label = "student steps" if axis == "steps" else f"total {unit}, the teacher\u2019s included"
    shifted = axis == "budget" and any(trial.counted_teacher for trial in comparison.trials)
    what = "Second half of training" if late else "Evaluation loss"

    def draw(axes: Any, ink: str) -> None:
        styles = method_styles(comparison)
        for method in comparison.methods:
            style = styles[method.method]
            color = style.color or ink
            xs, means, stds = _mean_curve(comparison.finished(method.method), axis, by_tokens, late)
            axes.plot(
                xs,
                means,
                color=color,
                linestyle=style.dash,
                marker=style.marker,
                markersize=3.5,
                markevery=max(1, len(xs) // 12),
            )
            spreads = [std for std in stds if std is not None]
            if len(spreads) == len(means):
                low = [mean - std for mean, std in zip(means, spreads, strict=True)]
                high = [mean + std for mean, std in zip(means, spreads, strict=True)]
                axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
        final = comparison.method(comparison.reference).final
        if final is not None:
            axes.axhline(final.mean, color=MUTED, linewidth=0.8, linestyle=":")
        if axis == "budget":
            axes.set_xlim(left=None if late else 0)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.set_xlabel(x_label)
        axes.set_ylabel(LOSS)
        axes.xaxis.set_major_formatter(compact)

    return Panel(
        name=f"curves_{axis}{'_late' if late else ''}",
        title=f"{what}, by {'student steps' if axis == 'steps' else f'total {unit}'}",
        remarks=(
            "Mean over seeds, with a band of one sample standard deviation.",
            f"Dotted: final loss of {comparison.method(comparison.reference).label}.",
            *(["A start whose teacher counts begins after its teacher."] if shifted else []),
        ),
        draw=draw,
    )


def has_second_half(comparison: Comparison) -> bool:
    """Whether the second half of some run was evaluated often enough to draw a line."""
    return any(
        sum(2 * point.step >= trial.evaluations[-1].step for point in trial.evaluations) > 1
        for trial in comparison.trials
        if not trial.sweep
    )


def _tokens_known(comparison: Comparison) -> bool:
    return all(
        point.tokens is not None
        for method in comparison.methods
        for trial in comparison.finished(method.method)
        for point in trial.evaluations
    )


def _mean_curve(
    trials: Sequence[Trial], axis: Axis, by_tokens: bool, late: bool
) -> tuple[list[float], list[float], list[float | None]]:
    """Positions, means and deviations at the steps at which every trial was evaluated."""
    if not trials:
        return [], [], []
    curves = [{point.step: point for point in trial.evaluations} for trial in trials]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if late:
        steps = [step for step in steps if 2 * step >= steps[-1]]
    xs, means, stds = [], [], []
    for step in steps:
        summary = spread([curve[step].loss for curve in curves])
        if summary is not None:
            positions = [
                _position(trial, curve[step], axis, by_tokens)
                for trial, curve in zip(trials, curves, strict=True)
            ]
            xs.append(sum(positions) / len(positions))
            means.append(summary.mean)
            stds.append(summary.std)
    return xs, means, stds


def _position(trial: Trial, point: Evaluation, axis: Axis, by_tokens: bool) -> float:
    if axis == "steps":
        return point.step
    if by_tokens:
        return (point.tokens or 0) + trial.head_start.tokens
    return point.step + trial.head_start.steps


def final_losses(comparison: Comparison) -> Panel:
    methods = [method for method in comparison.methods if method.final is not None]

    def draw(axes: Any, ink: str) -> None:
        styles = method_styles(comparison)
        for row, method in enumerate(methods):
            style = styles[method.method]
            color = style.color or ink
            losses = [a.final_loss for a in method.attempts if a.final_loss is not None]
            _dots(axes, row, losses, style.marker, color)
            if method.final is not None:
                _mean_tick(axes, row, method.final.mean, color)
                if method.final.std is not None:
                    ends = (
                        method.final.mean - method.final.std,
                        method.final.mean + method.final.std,
                    )
                    axes.plot(ends, (row, row), color=color, linewidth=1.6)
        reference = comparison.method(comparison.reference).final
        if reference is not None:
            axes.axvline(reference.mean, color=MUTED, linewidth=0.8, linestyle=":")
        _label_rows(axes, [method.label for method in methods])
        axes.set_xlabel(f"final {LOSS}")

    return Panel(
        name="final",
        title="Final evaluation loss, every seed",
        remarks=(
            "One mark for each seed; the tick is their mean, the bar one sample standard "
            "deviation.",
            f"Dotted: {comparison.method(comparison.reference).label}.",
        ),
        draw=draw,
        height=1.1 + 0.36 * len(methods),
    )


def differences(comparison: Comparison) -> Panel:
    height = 1.1 + sum(0.45 + 0.36 * len(table.rows) for table in comparison.tables)

    def draw(axes: Any, ink: str) -> None:
        styles = method_styles(comparison)
        labels: list[str] = []
        for table in comparison.tables:
            labels.append("")
            reference = short_label(table.reference_label, LABEL_WIDTH)
            axes.annotate(
                f"{TABLE_TITLES[table.name]}, against {reference}",
                (0, len(labels) - 0.75),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                color=ink,
                style="italic",
                in_layout=False,
            )
            _draw_table(axes, table, styles, ink, labels)
        axes.axvline(0, color=ink, linewidth=0.8)
        _label_rows(axes, labels)
        axes.set_xlabel("difference in final loss (nats per token)")

    return Panel(
        name="differences",
        title="Difference from the reference at the same seed",
        remarks=(
            "Left of 0 the method ended lower. One mark for each seed; the tick is their mean, "
            "the bar the 95 % t interval of the mean, drawn from three common seeds on. A bar "
            "across 0 is no clear difference.",
        ),
        draw=draw,
        height=height,
    )


def _draw_table(
    axes: Any, table: PairedTable, styles: dict[str, Style], ink: str, labels: list[str]
) -> None:
    """One row for each method below the rows already in `labels`, which grows."""
    for row in table.rows:
        style = styles[row.method]
        color = style.color or ink
        _dots(axes, len(labels), row.differences, style.marker, color)
        if row.result.mean is not None:
            _mean_tick(axes, len(labels), row.result.mean, color)
        if row.result.interval is not None:
            axes.plot(row.result.interval, (len(labels),) * 2, color=color, linewidth=1.6)
        labels.append(row.label)


def learning_rates(comparison: Comparison) -> Panel:
    def draw(axes: Any, ink: str) -> None:
        styles = method_styles(comparison)
        for sweep in comparison.sweeps:
            style = styles[sweep.method]
            color = style.color or ink
            points = [(p.learning_rate, p.loss, p.chosen) for p in sweep.points if p.loss]
            xs = [learning_rate for learning_rate, _, _ in points]
            means = [loss.mean for _, loss, _ in points]
            errors = [loss.std or 0.0 for _, loss, _ in points]
            axes.errorbar(
                xs,
                means,
                yerr=errors if any(errors) else None,
                color=color,
                linestyle=style.dash,
                marker=style.marker,
                markersize=4,
                linewidth=1.4,
            )
            chosen = [(x, loss.mean) for x, loss, used in points if used]
            if chosen:
                axes.scatter(*zip(*chosen, strict=True), s=110, facecolors="none", edgecolors=color)
        axes.set_xscale("log")
        rates = sorted({p.learning_rate for sweep in comparison.sweeps for p in sweep.points})
        axes.set_xticks(rates, [wording.rate(rate) for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("learning rate")
        axes.set_ylabel(LOSS)

    return Panel(
        name="rates",
        title="Learning-rate sweep",
        remarks=(
            "Mean over the sweep\u2019s seeds; a ring marks the rate that the compared runs used.",
        ),
        draw=draw,
    )


def _dots(axes: Any, row: int, values: Sequence[float], marker: str, color: str) -> None:
    """One mark for each value, spread a little across the row so that ties stay visible."""
    middle = (len(values) - 1) / 2
    heights = [row + 0.09 * (place - middle) for place in range(len(values))]
    axes.scatter(values, heights, s=20, marker=marker, color=color, alpha=0.6, linewidths=0)


def _mean_tick(axes: Any, row: int, mean: float, color: str) -> None:
    axes.plot((mean, mean), (row - 0.26, row + 0.26), color=color, linewidth=2)


def _label_rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(
        range(len(labels)), [short_label(label, LABEL_WIDTH, lines=2) for label in labels]
    )
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(False, axis="y")
