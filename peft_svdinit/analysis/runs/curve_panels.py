"""Loss over training, and over the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ..canvas import GUIDE
from . import wording
from .compare import Comparison
from .panels import LOSS, Panel, compact, method_styles
from .seed_statistics import spread
from .trials import Evaluation, Trial

Axis = Literal["steps", "budget"]


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
            axes.axhline(final.mean, color=GUIDE, linewidth=0.8, linestyle=":")
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
