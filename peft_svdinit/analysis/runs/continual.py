"""What two stages of training on two tasks leave of the first: numbers, a table and a figure."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...files import write_json, write_text
from ..canvas import COLOURS, MARKERS, legend_outside, new_figure, save_figure, tidy
from ..markdown import markdown_table
from .seed_statistics import PairedDifference, Spread, paired_difference, spread

STAGES = ("base", "one", "two")
_STAGE_NAMES = ("base model", "after stage one", "after stage two")
_TASKS = {"first": "task one", "second": "task two"}
_REFERENCE = "lora"


@dataclass(frozen=True)
class Stages:
    """One scheme with one seed.

    Attributes:
        scheme, label: its name, and what readers call it.
        seed: of its runs.
        losses: evaluation loss by stage ("base", "one", "two") and task ("first", "second"), in
            nats per token.
        steps: optimizer steps of both stages.
        calibration_steps: optimizer steps of the calibrations that its masks come from.
        trained: parameters trained in each stage.
        changed: share of the entries trained in stage one that stage two left otherwise.
    """

    scheme: str
    label: str
    seed: int
    losses: Mapping[str, Mapping[str, float]]
    steps: int
    calibration_steps: int
    trained: Sequence[int]
    changed: float

    @property
    def forgetting(self) -> float:
        """Loss on task one after stage two minus after stage one."""
        return self.losses["two"]["first"] - self.losses["one"]["first"]


def write_continual(
    runs: Sequence[Stages], context: Mapping[str, Any], folder: str | os.PathLike
) -> Path:
    """Write `continual.json`, `continual.png` and `continual.md` to `folder`.

    Args:
        runs: of any schemes and seeds.
        context: what readers need to know about model, data and options, as JSON values.

    Returns:
        The path of the report, `continual.md`.

    Raises:
        ImportError: without matplotlib or scipy.
    """
    folder = Path(folder)
    schemes = _by_scheme(runs)
    numbers = [{**asdict(run), "forgetting": run.forgetting} for run in runs]
    write_json(folder / "continual.json", {"context": dict(context), "runs": numbers})
    save_figure(_figure(schemes), folder / "continual.png")
    write_text(folder / "continual.md", _report(schemes, context))
    return folder / "continual.md"


def forgetting_against_lora(
    schemes: Mapping[str, Sequence[Stages]],
) -> dict[str, PairedDifference]:
    """Forgetting of each other scheme minus that of "lora", paired by seed; empty without it."""
    reference = {run.seed: run.forgetting for run in schemes.get(_REFERENCE, ())}
    found = {}
    for name, runs in schemes.items():
        common = [run for run in runs if run.seed in reference]
        if name != _REFERENCE and common:
            found[name] = paired_difference(
                [run.forgetting for run in common], [reference[run.seed] for run in common]
            )
    return found


def _by_scheme(runs: Sequence[Stages]) -> dict[str, list[Stages]]:
    schemes: dict[str, list[Stages]] = {}
    for run in runs:
        schemes.setdefault(run.scheme, []).append(run)
    return schemes


def _report(schemes: Mapping[str, Sequence[Stages]], context: Mapping[str, Any]) -> str:
    seeds = sorted({run.seed for runs in schemes.values() for run in runs})
    differences = forgetting_against_lora(schemes)
    losses, costs = [], []
    for name, runs in schemes.items():
        label = runs[0].label
        cells = [
            _mean(runs, lambda run, s=stage, t=task: run.losses[s][t])
            for task in _TASKS
            for stage in STAGES
        ]
        forgetting = _mean(runs, lambda run: run.forgetting, sign=True)
        losses.append([label, *cells[:3], forgetting, *cells[3:]])
        costs.append(
            [
                label,
                f"{runs[0].steps:,}",
                f"{runs[0].calibration_steps:,}",
                *(f"{count:,}" for count in runs[0].trained),
                f"{sum(run.changed for run in runs) / len(runs):.2%}",
                _difference(differences.get(name)),
            ]
        )
    spread_note = (
        f"mean ± sample standard deviation over {len(seeds)} seeds"
        if len(seeds) > 1
        else "of one seed, which says nothing about their spread"
    )
    parts = [
        "# A second task on top of a first",
        f"Evaluation losses in nats per token, {spread_note}. Forgetting is the loss on task one "
        "after stage two minus after stage one: above 0, task one got worse.",
        _losses_table(losses),
        "![losses by stage](continual.png)",
        "## What it took",
        "Steps of both stages; those of the calibrations, which masks come from, come on top. "
        "Changed is the share of the entries trained in stage one that stage two left otherwise. "
        "The last column compares forgetting seed by seed; its 95 % t interval, from 3 seeds on, "
        "is not corrected for the number of schemes.",
        markdown_table(
            [
                "scheme",
                "steps",
                "calibration steps",
                "trained in stage one",
                "trained in stage two",
                "changed",
                "forgetting minus LoRA's",
            ],
            costs,
        ),
        *_notes(schemes),
        "## Setting",
        "\n".join(f"- {key}: {value}" for key, value in context.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _losses_table(rows: Sequence[Sequence[str]]) -> str:
    first, second = (
        [f"{task}, {stage}" for stage in _STAGE_NAMES] for task in ("task one", "task two")
    )
    return markdown_table(["scheme", *first, "forgetting", *second], rows)


def _notes(schemes: Mapping[str, Sequence[Stages]]) -> list[str]:
    if not any(name.startswith("shared") for name in schemes):
        return []
    return [
        "The shared schemes see both tasks in turn in stage one, and in stage two half as many "
        "steps of one of them: under its own part a task was seen as often as in the other "
        "schemes, the other one half as often. Both parts lie on the same shared adapter, and one "
        "of them is in use at a time: the row of the part of task two says what task one loses "
        "under it; with its own part, task one has the loss of the row of that part.",
    ]


def _mean(runs: Sequence[Stages], value: Callable[[Stages], float], *, sign: bool = False) -> str:
    return _spread(spread([value(run) for run in runs]), sign=sign)


def _spread(found: Spread | None, *, sign: bool) -> str:
    assert found is not None
    mean = f"{found.mean:+.4f}" if sign else f"{found.mean:.4f}"
    return mean if found.std is None else f"{mean} ± {found.std:.4f}"


def _difference(found: PairedDifference | None) -> str:
    if found is None:
        return ""
    if found.interval is None:
        return f"{found.mean:+.4f}"
    return f"{found.mean:+.4f} [{found.interval[0]:+.4f}, {found.interval[1]:+.4f}]"


def _figure(schemes: Mapping[str, Sequence[Stages]]) -> Any:
    figure = new_figure(10, 4.2)
    handles: list[Any] = []
    for axes, (task, name) in zip(figure.subplots(1, 2), _TASKS.items(), strict=True):
        tidy(axes)
        handles = []
        for index, runs in enumerate(schemes.values()):
            points = [spread([run.losses[stage][task] for run in runs]) for stage in STAGES]
            # Beside each other, so that equal points do not hide one another.
            offset = 0.05 * (index - (len(schemes) - 1) / 2)
            handles.append(
                axes.errorbar(
                    [position + offset for position in range(len(STAGES))],
                    [point.mean for point in points if point],
                    yerr=[point.std or 0.0 for point in points if point],
                    color=COLOURS[index],
                    marker=MARKERS[index],
                    markersize=5,
                    linewidth=1.3,
                    capsize=2.5,
                    label=runs[0].label,
                )
            )
        axes.set_xticks(range(len(STAGES)), _STAGE_NAMES)
        axes.set_title(name, loc="left")
        axes.set_ylabel("evaluation loss (nats per token)")
    legend_outside(figure, handles, [handle.get_label() for handle in handles])
    return figure
