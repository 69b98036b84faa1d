"""What a run or comparison measured, as parts of a card: tables, a plot, the command, limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from ..analysis import (
    COMPARISON_NUMBERS,
    COMPARISON_REPORT,
    EVALUATION_JSON,
    escaped,
    evaluation_table,
    markdown_table,
    read_evaluation,
)
from ..files import read_json, validated
from ..training import LOSS_CURVE, RUN_INFO, Run, launched, read_run

# Of a comparison's report; what it was made with stands in the card once, elsewhere.
_SHOWN = (
    *("Read the numbers with these reservations", "Results", "Equal student steps"),
    *("Equal total budget", "A teacher that exists already", "Learning-rate sweep", "Cost"),
)
_COMPARISON_PLOT = "loss_curves.png"


class _Extra(msgspec.Struct):
    command: str | None = None
    dataset: str | None = None


class _Context(msgspec.Struct):
    command: str | None = None
    model: str | None = None
    dataset: str | None = None
    machine: str | None = None


class _Comparison(msgspec.Struct):
    headline: str | None = None
    context: _Context | None = None


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        text: Markdown.
        plot: a picture of it.
        files: further files to publish beside the card.
        command: that repeats it.
        runs_as: of the run, what its processes were.
        facts: of how it was made, by name.
        limits: what the figures cannot show, a sentence or more each.
    """

    text: str = ""
    plot: Path | None = None
    files: tuple[Path, ...] = ()
    command: str | None = None
    runs_as: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = ()


def figures_of_run(folder: Path) -> Figures:
    """Of the run whose record lies in `folder`, none if there is no record.

    Raises:
        ValueError: if the record is damaged.
    """
    if not (folder / RUN_INFO).is_file():
        return Figures(limits=("Nothing was measured that this card could show.",))
    run = read_run(folder, "folder")
    extra = validated(run.info["extra"], _Extra, f"folder: {folder / RUN_INFO}: extra: ")
    plot, command = folder / LOSS_CURVE, extra.command
    unfinished = [] if run.completed else ["The training did not end: these are its last figures."]
    return Figures(
        text=markdown_table(["", "value"], _run_rows(run)),
        plot=plot if plot.is_file() else None,
        command=launched(command, run.info.get("runs_as") or {}) if command else None,
        runs_as=run.info.get("runs_as") or {},
        facts=_facts(run.info, extra),
        limits=(
            *unfinished,
            "One run of one seed: a loss without an interval says little about another seed.",
        ),
    )


def figures_of_comparison(folder: Path, run: Figures) -> Figures:
    """Of the comparison that was written to `folder`, in place of those of one of its runs.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if its files are damaged.
    """
    numbers, report = folder / COMPARISON_NUMBERS, folder / COMPARISON_REPORT
    for path in (numbers, report):
        if not path.is_file():
            raise FileNotFoundError(
                f"comparison: {folder} has no {path.name}; `svdinit compare` and "
                "recipes/compare_inits.py write it"
            )
    found = validated(read_json(numbers, "comparison"), _Comparison, f"comparison: {numbers}: ")
    context, headline = found.context or _Context(), escaped(found.headline or "")
    sections = _sections(report.read_text(encoding="utf-8"))
    shown = [f"### {name}\n\n{sections[name]}" for name in _SHOWN if name in sections]
    plot = folder / _COMPARISON_PLOT
    command = context.command
    facts = {"model": context.model, "dataset": context.dataset, "machine": context.machine}
    return Figures(
        text="\n\n".join([*([f"**{headline}**"] if headline else []), *shown]),
        plot=plot if plot.is_file() else None,
        files=(numbers,),
        command=launched(command, run.runs_as) if command else None,
        facts={**run.facts, **{key: value for key, value in facts.items() if value}},
        limits=(sections["Limits"],) if "Limits" in sections else (),
    )


def with_evaluation(figures: Figures, folder: Path) -> Figures:
    """These with the table that `recipes/evaluate_adapter.py` wrote to `folder`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    path = folder / EVALUATION_JSON
    if not path.is_file():
        raise FileNotFoundError(
            f"evaluation: {folder} has no {path.name}; recipes/evaluate_adapter.py writes it"
        )
    record = read_evaluation(path, "evaluation")
    table = evaluation_table(record["results"])
    sets = ", ".join(
        f"{about['dataset_name']} ({metric.replace('_', ' ')}, {about['examples']} examples)"
        for metric, about in record["data"].items()
    )
    text = "\n\n".join(filter(None, [figures.text, f"### Evaluation\n\n{table}"]))
    return replace(figures, text=text, facts={**figures.facts, "evaluated on": sets})


def _run_rows(run: Run) -> Iterator[tuple[str, str]]:
    info = run.info
    evaluated = [row for row in run.log if row.get("eval_loss") is not None]
    if evaluated:
        yield "evaluation loss at the end", f"{evaluated[-1]['eval_loss']:.4f}"
        if evaluated[0]["step"] == 0:
            yield "evaluation loss at step 0", f"{evaluated[0]['eval_loss']:.4f}"
    rates = [row["learning_rate"] for row in run.log if row.get("learning_rate")]
    if rates:
        yield "largest learning rate", f"{max(rates):g}"
    yield "steps", f"{info['steps']:,}"
    for name, key, digits in (("tokens", "tokens", 0), ("seconds of training", "seconds", 1)):
        if info[key] is not None:
            yield name, f"{info[key]:,.{digits}f}"
    teacher = (run.comparison or {}).get("teacher") or {}
    if teacher:
        spent = ", ".join(
            f"{teacher[key]:,.0f} {key}"
            for key in ("steps", "tokens", "seconds")
            if teacher.get(key)
        )
        yield "the teacher, on top of that", spent or "cost not known"
    counts = [info[f"{which}_parameters"] for which in ("trainable", "total")]
    if None not in counts:
        yield "trained parameters", f"{counts[0]:,} of {counts[1]:,}"
    yield "seed", str(run.seed)


def _facts(info: dict[str, Any], extra: _Extra) -> dict[str, str]:
    hardware, processes = info["hardware"], info["world_size"]
    machine = {"{} CPU cores": "cpu_cores", "{}": "device", "{} GiB": "memory_gb"}
    known = [words.format(hardware[k]) for words, k in machine.items() if hardware.get(k)]
    versions = {"Python": info["versions"].get("python")}
    versions |= {key: value for key, value in info["versions"].items() if key != "python"}
    found = {
        "dataset": extra.dataset or "",
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items() if value),
        "revision of the code": info["git_revision"] or "",
        "hardware": ", ".join(known),
        "processes": str(processes) if processes > 1 else "",
    }
    return {key: value for key, value in found.items() if value}


def _sections(report: str) -> dict[str, str]:
    """The sections of a report by their headings."""
    _, *parts = re.split(r"^## ", report, flags=re.MULTILINE)
    split = (part.partition("\n") for part in parts)
    return {heading.strip(): text.strip() for heading, _, text in split}
