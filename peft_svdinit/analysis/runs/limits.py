"""What the results cannot show, in one paragraph made of what applies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import wording
from .compare import Comparison
from .seed_statistics import FEWEST_SEEDS_FOR_A_TEST

TEACHERS = {
    "synthesised": "The teacher is synthesised from a trained LoRA and is no full fine-tune: the "
    "tail appended to reach its rank is random.",
    "full": "The teacher is a full fine-tune.",
    "given": "The teacher was given; if it saw the evaluation data, the comparison is void.",
}


def limits(comparison: Comparison, context: Mapping[str, Any]) -> str:
    return " ".join(
        [
            *_scale(comparison),
            "The evaluation set\u2019s own sampling error is in no interval.",
            *_tests(comparison),
            *_teachers(comparison, context),
            *_rates(comparison),
            "Only the last evaluation loss was compared.",
        ]
    )


def _scale(comparison: Comparison) -> Iterator[str]:
    own = [trial for trial in comparison.trials if not trial.sweep]
    parameters = max(trial.total_parameters or 0 for trial in own)
    tokens = max(trial.tokens or 0 for trial in own)
    length = f"{max(trial.steps for trial in own):,} steps"
    length += f" and {tokens:,} tokens" if tokens else ""
    size = f" of a model with {parameters / 1e6:,.0f} M parameters" if parameters >= 1e6 else ""
    yield (
        f"At most {length} a run{size}, on one data set, say where to look, not what holds at "
        "scale or for other tasks."
    )
    fewest = min(len(method.seeds) for method in comparison.methods)
    means = ": only large or very steady differences show" if fewest < 10 else ""
    if fewest < FEWEST_SEEDS_FOR_A_TEST:
        means = ": no difference can be tested"
    yield f"{wording.seeds(fewest)} per method{means}."


def _tests(comparison: Comparison) -> Iterator[str]:
    outcomes = {row.result.outcome for table in comparison.tables for row in table.rows}
    if outcomes - {"untested"}:
        yield "Holm\u2019s correction is in p (Holm), not in the intervals."
        if not outcomes & {"lower", "higher"}:
            yield "No difference passed it."


def _teachers(comparison: Comparison, context: Mapping[str, Any]) -> Iterator[str]:
    taught = [method for method in comparison.methods if method.teacher_kind]
    kinds = {method.teacher_kind for method in taught}
    kinds |= {trial.teacher.kind for trial in comparison.trials if trial.teacher}
    if not kinds:
        return
    if context.get("teacher_kind") == "lora":
        kinds.add("synthesised")
    yield from (text for kind, text in TEACHERS.items() if kind in kinds)
    kept = (context.get("synthesis") or {}).get("energy_kept_mean")
    kept = context.get("energy_kept_mean") if kept is None else kept
    if kept is not None:
        yield (
            "Cut to the student\u2019s rank, the teacher\u2019s delta keeps "
            f"{wording.share(kept, 1)} of its energy and loses {wording.share(1 - kept, 1)}."
        )
    elif "full" in kinds:
        yield "What its delta loses when cut to the student\u2019s rank was not stated."
    if any(not method.teacher_sunk for method in taught):
        yield "A teacher\u2019s cost counts at equal total budget and in totals alone."
    unknown = [
        wording.named(method.label)
        for method in taught
        if None in (method.teacher_steps, method.teacher_tokens, method.teacher_seconds)
    ]
    if unknown:
        yield f"What the teacher cost is unknown for {wording.listed(unknown)}."
    yield "A start at a teacher begins with an empty optimizer unless it carries the moments over."


def _rates(comparison: Comparison) -> Iterator[str]:
    if not comparison.sweeps:
        yield "Learning rates were not swept: a difference may be one of step size."
        return
    yield (
        "Learning rates were chosen on the reported evaluation loss, which flatters methods with "
        "more rates tried."
    )
    swept = {sweep.method for sweep in comparison.sweeps}
    others = [wording.named(m.label) for m in comparison.methods if m.method not in swept]
    if others:
        yield f"Not swept: {wording.listed(others)}."
