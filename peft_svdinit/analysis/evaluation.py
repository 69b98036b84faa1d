"""Adapters side by side: a table of what was measured, with intervals, and all figures as JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..files import Count, publishing, read_json, write_json, write_text
from ..training import for_json
from .markdown import columns_table, document, escaped, facts, fenced, section
from .runs.wording import NOT_KNOWN, count, loss, share, signed, significant

EVALUATION_JSON, EVALUATION_REPORT = "evaluation.json", "evaluation.md"
_READING = (
    "Losses are nats per token. Brackets hold 95 % intervals over the examples drawn, in which no "
    "variation of training is: those of losses and agreement are of the ratio estimator, those of "
    "differences are paired over examples, and exact match has Wilson's."
)
Row = Mapping[str, Any]
Interval = tuple[float, float] | None


class _Difference(msgspec.Struct):
    difference: float
    difference_interval: Interval


class _Loss(msgspec.Struct):
    loss: float
    loss_interval: Interval
    against_base: _Difference | None = None
    against_first: _Difference | None = None


class _ExactMatch(msgspec.Struct):
    exact_match: float
    exact_match_interval: Interval


class _Forgetting(msgspec.Struct):
    forgetting: float | None = None
    forgetting_interval: Interval = None


class _Agreement(msgspec.Struct):
    kl: float
    kl_interval: Interval
    top_1: float
    top_1_interval: Interval


class _Row(msgspec.Struct):
    name: str
    parameters: Count
    note: str | None = None
    loss: _Loss | None = None
    exact_match: _ExactMatch | None = None
    forgetting: _Forgetting | None = None
    agreement: _Agreement | None = None
    lm_eval: dict[str, dict[str, float | None]] = {}


class _Data(msgspec.Struct):
    dataset_name: str
    examples: Count


class _Evaluation(msgspec.Struct):
    results: Annotated[list[_Row], msgspec.Meta(min_length=1)]
    data: dict[str, _Data]


def read_evaluation(path: Path, argument: str) -> dict[str, Any]:
    """The record in an `evaluation.json`, as `write_evaluation` takes it.

    Args:
        path: the file.
        argument: by which the user gave it; the messages of errors begin with it.

    Raises:
        ValueError: if it is damaged.
    """
    return read_json(path, argument, _Evaluation)


def write_evaluation(record: Mapping[str, Any], folder: str | os.PathLike) -> Path:
    """Write `evaluation.json` and `evaluation.md`.

    Args:
        record: `model`, `data` (of each metric), `environment`, `command`, and `results`, one row
            for the base and one for each adapter.
        folder: where to.

    Returns:
        The path of the table.
    """
    with publishing(folder) as written:
        write_json(written / EVALUATION_JSON, for_json({"format_version": 1, **record}))
        write_text(written / EVALUATION_REPORT, evaluation_report(record))
    return Path(folder) / EVALUATION_REPORT


def evaluation_table(rows: Sequence[Row]) -> str:
    """Markdown: a row for the base and for each adapter, and how to read it."""
    notes = [escaped(f"{row['name']}: {row['note']}.") for row in rows if row.get("note")]
    return "\n\n".join([columns_table(rows, _columns(rows)), _READING, *notes])


def evaluation_report(record: Mapping[str, Any]) -> str:
    """The table and what it is of, as Markdown."""
    rows = record["results"]
    data = {
        metric.replace("_", " "): f"{about['dataset_name']}, {about['examples']} examples "
        f"(seed {about['split_seed']} of the draw)"
        for metric, about in record["data"].items()
    }
    versions = record["environment"]["versions"]
    return document(
        f"# Adapters of {escaped(record['model']['model_name_or_path'])}",
        evaluation_table(rows),
        section("Data", facts(data)),
        section("Command", fenced(record["command"])),
        section("Versions", facts({name: versions[name] for name in versions})),
    )


def _columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    columns: dict[str, Callable[[Row], str]] = {
        "adapter": lambda row: row["name"],
        "parameters": lambda row: count(row["parameters"]),
    }
    metrics = {metric for row in rows for metric in row}
    if "loss" in metrics:
        columns["loss"] = lambda row: _with_interval(row.get("loss"), "loss", loss)
        columns["against base"] = lambda row: _difference(row.get("loss"), "against_base")
        if len(rows) > 2:
            first = rows[1]["name"]
            columns[f"against {first}"] = lambda row: _difference(row.get("loss"), "against_first")
    if "exact_match" in metrics:
        columns["exact match"] = lambda row: _with_interval(
            row.get("exact_match"), "exact_match", share
        )
    if "forgetting" in metrics:
        columns["forgetting"] = lambda row: _with_interval(
            row.get("forgetting"), "forgetting", signed
        )
    if "agreement" in metrics:
        columns["KL from teacher"] = lambda row: _with_interval(row.get("agreement"), "kl", loss)
        columns["top-1 as teacher"] = lambda row: _with_interval(
            row.get("agreement"), "top_1", share
        )
    for task in rows[0].get("lm_eval", {}):
        columns[task] = lambda row, task=task: _harness_cell(row.get("lm_eval", {}).get(task, {}))
    return columns


def _with_interval(figures: Row | None, name: str, words: Callable[[float], str]) -> str:
    """Empty where it was not measured, as a difference of the model that it is from."""
    if not figures or figures.get(name) is None:
        return ""
    bounds = figures.get(f"{name}_interval")
    text = words(figures[name])
    return text if bounds is None else f"{text} ({words(bounds[0])} to {words(bounds[1])})"


def _difference(figures: Row | None, other: str) -> str:
    return _with_interval((figures or {}).get(other), "difference", signed)


def _harness_cell(figures: Row) -> str:
    """The task's first metric, with its standard error where the harness gives one."""
    names = [name for name in figures if "," in name and "_stderr" not in name]
    if not names:
        return NOT_KNOWN
    error = figures.get(names[0].replace(",", "_stderr,"))
    value = f"{names[0].partition(',')[0]} {significant(figures[names[0]], 3)}"
    return value if error is None else f"{value} \u00b1 {significant(error, 2)}"
