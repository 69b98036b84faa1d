"""Methods against their reference, seed by seed, at three kinds of budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .seed_statistics import PairedDifference, holm, paired_difference
from .trials import Trial

TableName = Literal["equal_steps", "equal_budget", "sunk_teacher"]


@dataclass(frozen=True)
class PairedRow:
    """A method's final losses minus its reference's, over the seeds both finished."""

    method: str
    label: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    result: PairedDifference


@dataclass(frozen=True)
class PairedTable:
    """Methods compared with one reference at one kind of budget; Holm's correction spans it."""

    name: TableName
    reference: str
    reference_label: str
    rows: tuple[PairedRow, ...]


def paired_tables(
    groups: Mapping[str, Sequence[Trial]], reference: str, total: str | None
) -> tuple[PairedTable, ...]:
    """The tables that have rows, which are in the order of `groups`."""
    others = [group for name, group in groups.items() if name not in (reference, total)]
    students = [g for g in others if g[0].budget == "student" and not g[0].sunk]
    tables = [_paired("equal_steps", students, groups[reference])]
    if total is not None:
        spending = [group for group in others if group[0].spends_total]
        tables.append(_paired("equal_budget", spending, groups[total]))
    tables.append(_paired("sunk_teacher", [g for g in others if g[0].sunk], groups[reference]))
    return tuple(table for table in tables if table.rows)


def _paired(
    name: TableName, groups: Sequence[Sequence[Trial]], reference: Sequence[Trial]
) -> PairedTable:
    theirs = {trial.seed: trial.final_loss for trial in reference if not trial.diverged}
    rows = []
    for group in groups:
        ours = {t.seed: t.final_loss for t in group if not t.diverged and t.seed in theirs}
        result = paired_difference(list(ours.values()), [theirs[seed] for seed in ours])
        differences = tuple(ours[seed] - theirs[seed] for seed in ours)
        rows.append(PairedRow(group[0].method, group[0].label, tuple(ours), differences, result))
    adjusted = holm([row.result.p for row in rows])
    tests = sum(p is not None for p in adjusted)
    rows = [
        replace(row, result=replace(row.result, p_holm=p, tests=tests))
        for row, p in zip(rows, adjusted, strict=True)
    ]
    return PairedTable(name, reference[0].method, reference[0].label, tuple(rows))
