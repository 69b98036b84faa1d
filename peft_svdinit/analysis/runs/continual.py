"""What two stages of training on two tasks leave of the first: numbers, a table and a figure."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...files import publishing, write_json, write_text
from ..canvas import COLOURS, MARKERS, legend_outside, new_figure, save_figure, tidy
from .document import Document, Section
from .figures import FigureFile
from .markdown_report import markdown_report
from .panels import short_label
from .seed_statistics import PairedDifference, paired_difference, spread
from .setting_tables import settings_table
from .tables import TextTable, text_table
from .wording import count, interval, mean_and_std, share, signed

STAGES = ("base", "one", "two")
_STAGE_NAMES = ("base model", "after stage one", "after stage two")
_TASKS = {"first": "task one", "second": "task two"}
_REFERENCE = "lora"
_SHARED = (
    "The shared schemes see both tasks in turn in stage one, and in stage two half as many steps "
    "of one of them: under its own part a task was seen as often as in the other schemes, the "
    "other one half as often. The row of the part of task two says what task one loses under it; "
    "with its own part, task one has the loss of the row of that part."
)


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
    schemes = _by_scheme(runs)
    numbers = [{**asdict(run), "forgetting": run.forgetting} for run in runs]
    with publishing(folder) as written:
        write_json(written / "continual.json", {"context": dict(context), "runs": numbers})
        save_figure(_figure(schemes), written / "continual.png")
        write_text(written / "continual.md", markdown_report(_document(schemes, context)))
    return Path(folder) / "continual.md"


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


def _document(schemes: Mapping[str, Sequence[Stages]], context: Mapping[str, Any]) -> Document:
    seeds = len({run.seed for runs in schemes.values() for run in runs})
    spreads = (
        f"mean \u00b1 sample standard deviation over {seeds} seeds"
        if seeds > 1
        else "of one seed, which says nothing about their spread"
    )
    figure = FigureFile("continual", "Losses by stage", ())
    return Document(
        "A second task on top of a first",
        headline="",
        subtitle=f"Evaluation losses in nats per token, {spreads}.",
        sections=(
            Section("Losses", table=_losses(schemes), figures=(figure,)),
            Section("What it took", table=_costs(schemes)),
            Section("Settings", table=settings_table(context)),
        ),
    )


def _losses(schemes: Mapping[str, Sequence[Stages]]) -> TextTable:
    columns: dict[str, Callable[[Sequence[Stages]], str]] = {
        "scheme": lambda runs: runs[0].label,
        "forgetting": lambda runs: _mean([run.forgetting for run in runs]),
    }
    for task, title in _TASKS.items():
        for stage, when in zip(STAGES, _STAGE_NAMES, strict=True):
            columns[f"{title}, {when}"] = lambda runs, stage=stage, task=task: _mean(
                [run.losses[stage][task] for run in runs]
            )
    return text_table(
        schemes.values(),
        columns,
        "Forgetting is the loss on task one after stage two minus after stage one: above 0, task "
        "one got worse.",
    )


def _costs(schemes: Mapping[str, Sequence[Stages]]) -> TextTable:
    untested = PairedDifference(0, None)
    against = forgetting_against_lora(schemes)
    difference = {name: against.get(name, untested) for name in schemes}
    shared = _SHARED if any(name.startswith("shared") for name in schemes) else ""
    return text_table(
        schemes.values(),
        {
            "scheme": lambda runs: runs[0].label,
            "steps": lambda runs: count(runs[0].steps),
            "calibration steps": lambda runs: count(runs[0].calibration_steps),
            "trained in stage one": lambda runs: count(runs[0].trained[0]),
            "trained in stage two": lambda runs: count(runs[0].trained[1]),
            "changed": lambda runs: share(sum(run.changed for run in runs) / len(runs), 2),
            "forgetting minus LoRA\u2019s": lambda runs: signed(difference[runs[0].scheme].mean),
            "95 % interval": lambda runs: interval(difference[runs[0].scheme]),
        },
        "Steps of both stages; those of the calibrations, which masks come from, come on top. "
        "Changed is the share of the entries trained in stage one that stage two left otherwise. "
        "Forgetting is compared seed by seed; the t interval, from 3 seeds on, is not corrected "
        f"for the number of schemes. {shared}",
    )


def _mean(values: Sequence[float]) -> str:
    return mean_and_std(spread(values))


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
                    label=short_label(runs[0].label),
                )
            )
        axes.set_xticks(range(len(STAGES)), _STAGE_NAMES)
        axes.set_title(name, loc="left")
        axes.set_ylabel("evaluation loss (nats per token)")
    legend_outside(figure, handles, [handle.get_label() for handle in handles])
    return figure
