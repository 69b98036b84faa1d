"""The prose around the numbers: motivation, method, analysis and limits, chosen by the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import wording
from .compare import Comparison, MethodSummary
from .seed_statistics import FEWEST_SEEDS_FOR_A_TEST
from .sweeps import Sweep
from .tables import TABLE_TITLES

# Below these a result is called one of a small model, or of a small data budget (in tokens).
SMALL_MODEL = 10**9
SMALL_DATA = 10**8

STARTS = {
    "random": "PEFT's default: A random, B zero.",
    "random_total": "PEFT's default, trained for the teacher's and the student's steps together.",
    "svd_delta": "A and B from the rank-r SVD of the teacher's weight delta, so that the adapter "
    "begins at the teacher; the optimizer begins empty.",
    "svd_delta_moments": "As the SVD delta start, with the teacher's Adam moments rotated into "
    "the new basis and carried over.",
    "svd_subspace": "A from the leading right singular vectors of the delta, B zero: the "
    "teacher's directions without its progress.",
    "svd_reference": "A and B from the SVD, their initial product subtracted in the forward "
    "pass, so that training begins at the base model's function.",
    "pissa": "PiSSA (arXiv:2404.02948): the principal part of the base weight.",
    "eva": "EVA (arXiv:2410.07170): directions of the layer's input activations.",
    "lora_ga": "LoRA-GA (arXiv:2407.05000): directions of the first gradients.",
    "olora": "OLoRA (arXiv:2406.01775): a QR factorisation of the base weight.",
}


def motivation() -> str:
    return (
        "LoRA usually starts at a random A and a zero B. If a teacher's weight delta is at hand, "
        "its truncated SVD is another start. Whether that is better depends on what is held "
        "equal: a student that begins at a trained delta has had the teacher's training. The "
        "starts are therefore compared at equal student steps, at equal total budget with the "
        "teacher's cost counted, and, where the teacher exists already, with its cost stated as "
        "sunk."
    )


def method_paragraphs(context: Mapping[str, Any]) -> list[str]:
    """How the runs were made and compared, as far as runs and context say."""
    paragraphs = []
    model, dataset = context.get("model"), context.get("dataset")
    if model and dataset:
        rank = f" with adapters of rank {context['lora_r']}" if context.get("lora_r") else ""
        where = f" on {context['machine']}" if context.get("machine") else ""
        paragraphs.append(f"The model {model} was fine-tuned on {dataset}{rank}{where}.")
    paragraphs.append(
        "Runs are paired by seed. A difference is the method's final evaluation loss minus the "
        f"reference's at the same seed; from {FEWEST_SEEDS_FOR_A_TEST} common seeds on it gets a "
        "95 % t interval and a two-sided paired t-test, with Holm's correction over the methods "
        "of its table. "
        "A start is called lower or higher only if the interval excludes 0 and the corrected p "
        "is below 0.05. The intervals themselves are not corrected."
    )
    return paragraphs


def starts(comparison: Comparison) -> list[tuple[str, str]]:
    """Label and one-sentence description of every method whose id is known."""
    described = []
    for method in comparison.methods:
        family = "pissa" if method.method.startswith("pissa") else method.method
        if family in STARTS:
            described.append((method.label, STARTS[family]))
    return described


def teacher_paragraphs(comparison: Comparison, context: Mapping[str, Any]) -> list[str]:
    """What the teacher is, and what it is not; empty if no method had one."""
    kinds = {method.teacher_kind for method in comparison.methods} - {None}
    kinds |= {trial.teacher.kind for trial in comparison.trials if trial.teacher}
    kept = (context.get("synthesis") or {}).get("energy_kept_mean")
    kept = context.get("energy_kept_mean") if kept is None else kept
    paragraphs = []
    if "synthesised" in kinds or (kinds and context.get("teacher_kind") == "lora"):
        paragraphs.append(
            "The teacher is synthesised from a trained LoRA, and is no full fine-tune nor an "
            "imitation of one: its leading part is the LoRA's own delta, and the tail appended to "
            "reach its rank is random, with decaying singular values. A truncation that drops the "
            "tail gives the LoRA back. What is measured is what a restart from a trained LoRA is "
            "worth, not what a full fine-tune would teach."
        )
    if "full" in kinds:
        paragraphs.append(
            "The teacher is a full fine-tune; its delta is truncated to the student's rank, "
            "and what that leaves out is lost to the start."
        )
    if "given" in kinds:
        paragraphs.append(
            "The teacher was given. What its training cost, and on what data, is the user's to "
            "state; if it saw the evaluation data, the comparison is void."
        )
    if kinds and kept is not None:
        paragraphs.append(
            f"Truncation to the student's rank keeps {wording.share(kept, 1)} of the energy of the "
            f"teacher's delta and loses {wording.share(1 - kept, 1)} (squared singular values, "
            "mean over layers)."
        )
    elif "full" in kinds:
        paragraphs.append("The energy lost by truncation was not stated.")
    return paragraphs


def verdicts(comparison: Comparison) -> list[str]:
    """One statement for each table of paired differences."""
    return [
        f"{TABLE_TITLES[table.name]}: {wording.table_sentence(table)}"
        for table in comparison.tables
    ]


def observations(comparison: Comparison) -> list[str]:
    """What each start held before training, and when it met the reference; not tested."""
    reference = comparison.method(comparison.reference)
    statements = []
    for method in comparison.methods:
        if method.method not in (comparison.reference, comparison.total_reference):
            statements += _step0(method, reference) + _reach(method, reference)
    return statements


def _step0(method: MethodSummary, reference: MethodSummary) -> list[str]:
    """The share of the reference's progress that a start holds before it trains."""
    if not (method.step0 and reference.step0 and reference.final):
        return []
    progress = reference.step0.mean - reference.final.mean
    head_start = reference.step0.mean - method.step0.mean
    if progress <= 0 or abs(head_start) < 0.001 * progress:
        return []
    name, other = wording.named(method.label), wording.named(reference.label)
    return [
        f"{name} begins at {wording.loss(method.step0.mean)} where {other} begins at "
        f"{wording.loss(reference.step0.mean)}: before any step it holds "
        f"{wording.share(head_start / progress)} of what {other} gains in its run."
    ]


def _reach(method: MethodSummary, reference: MethodSummary) -> list[str]:
    name, target = wording.named(method.label), wording.named(reference.label)
    reached = wording.steps_reached(method)
    if reached == wording.NOT_KNOWN:
        return []
    if reached == "not reached":
        return [f"{name} did not reach the final loss of {target} in any seed."]
    teacher = ""
    if method.total_steps > method.steps:
        teacher = f" ({wording.steps_reached(method, total=True)} with the teacher's)"
    return [
        f"{name} reached the final loss of {target} after {reached} steps{teacher}, "
        f"of {wording.count(method.steps)}."
    ]


def sweep_remarks(comparison: Comparison) -> list[str]:
    """Where the sweep leaves doubt about the rates; empty without a sweep."""
    if not comparison.sweeps:
        return []
    remarks = [remark for sweep in comparison.sweeps for remark in _sweep_remarks(sweep)]
    swept = {sweep.method for sweep in comparison.sweeps}
    others = [
        wording.named(method.label) for method in comparison.methods if method.method not in swept
    ]
    if others:
        remarks.append(f"Not swept: {', '.join(others)}.")
    return remarks


def _sweep_remarks(sweep: Sweep) -> list[str]:
    remarks = []
    if sweep.lowest is None:
        remarks.append(f"{sweep.label} diverged at every rate.")
    elif sweep.lowest_at_edge and len(sweep.points) > 1:
        remarks.append(
            f"{sweep.label} was lowest at the edge of its grid ({wording.rate(sweep.lowest)}): a "
            "better rate may lie outside."
        )
    if None not in (sweep.lowest, sweep.chosen) and sweep.lowest != sweep.chosen:
        remarks.append(
            f"{sweep.label} was compared at {wording.rate(sweep.chosen)}, though "
            f"{wording.rate(sweep.lowest)} was lowest in the sweep."
        )
    return remarks


def limitations(comparison: Comparison, context: Mapping[str, Any]) -> list[str]:
    """What the results cannot show, one statement each."""
    fewest = min(len(method.seeds) for method in comparison.methods)
    few = (
        "with so few no difference can be tested"
        if fewest < FEWEST_SEEDS_FOR_A_TEST
        else "a paired test over so few sees only large or very steady differences"
        if fewest < 10
        else "the spread is that of these seeds"
    )
    statements = [
        _scale(comparison, context),
        f"{'One seed' if fewest == 1 else f'{fewest} seeds'} per method; {few}. The evaluation "
        "set is the same throughout, so its own sampling error is in no interval.",
        "A warm start begins with an empty optimizer, and loses some of the teacher's progress "
        "by that; a run that continued with its optimizer state would not. Starts that carry "
        "the moments over are marked as such.",
    ]
    if comparison.sweeps:
        statements.append(
            "Learning rates were chosen on the evaluation loss that is reported, which flatters "
            "methods with more rates tried."
        )
    else:
        statements.append(
            "One learning rate for each method, without a sweep: a difference may be one of "
            "effective step size."
        )
    statements.append(
        "Only the evaluation loss was compared, at the last step; no other quality of the "
        "adapters was measured."
    )
    return statements


def _scale(comparison: Comparison, context: Mapping[str, Any]) -> str:
    own = [trial for trial in comparison.trials if not trial.sweep]
    parameters = max((trial.total_parameters or 0 for trial in own), default=0)
    tokens = max((trial.tokens or 0 for trial in own), default=0)
    small = "small " if parameters < SMALL_MODEL else ""
    size = f", {parameters / 1e6:,.0f} M parameters" if parameters >= 1e6 else ""
    length = f"{max(trial.steps for trial in own):,} steps"
    length += f" and {tokens:,} tokens" if tokens else ""
    short = "a small data budget" if tokens < SMALL_DATA else "one data set"
    return (
        f"One {small}model ({context.get('model', 'not named')}{size}) and {short} "
        f"({context.get('dataset', 'not named')}, at most {length} in a run): the results say "
        "where to look, not what holds at scale or for other tasks."
    )
