"""The table of `method_comparison.py`: every experiment over its seeds, with what it cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from peft_svdinit.analysis import facts, markdown_table
from peft_svdinit.files import publishing, write_json, write_text
from stages.method_plan import TOTAL_BUDGET
from stages.method_runs import OURS

TABLE, NUMBERS = "method_comparison.md", "method_comparison.json"
Result = Mapping[str, Any]
_READING = """\
Accuracy is of greedy answers to {questions} test questions, and means are over {seeds}. Brackets \
hold 95 % intervals. Those of a mean are over the seeds (Student's t): they leave out that other \
questions might have been asked, and are absent where no seed changes anything. Those of \
differences to another row are over the questions, each answered by all seeds of both rows. One \
run's accuracy has a binomial standard error of about {error:.1f} points, so that a difference \
whose bracket holds 0 says nothing. Test loss is nats per token of the test questions' own \
answers, forgetting the increase of the loss of general text over the base's. At step 0 is the \
start before any step. Tokens are those trained on by the run, those that its start took before, \
and both; a start that is a teacher's delta has been trained already, and is to be compared with \
the row of the total budget."""


@dataclass(frozen=True)
class Row:
    """The results of one experiment, one for each seed."""

    results: list[Result]

    @property
    def name(self) -> str:
        return self.results[0]["run_info"]["experiment_name"]

    @property
    def rate(self) -> float:
        return self.results[0]["run_info"]["train_config"]["optimizer_kwargs"]["lr"]

    @property
    def trainable(self) -> int:
        return self.results[0]["train_info"]["num_trainable_params"]

    def last(self, key: str) -> list[float]:
        """Of each seed, a figure of PEFT's last row of metrics."""
        return [result["train_info"]["metrics"][-1][key] for result in self.results]

    def ours(self, key: str) -> list[Any]:
        """Of each seed, a figure that PEFT's results do not have."""
        return [result[OURS][key] for result in self.results]

    @property
    def start_tokens(self) -> float:
        """Tokens that the start took before the run, the mean over seeds."""
        return statistics.fmean((cost or {}).get("tokens", 0) for cost in self.ours("start"))

    @property
    def seconds(self) -> float:
        """Of training, the start's included, the mean over seeds."""
        started = [(cost or {}).get("seconds", 0.0) for cost in self.ours("start")]
        own = [result["train_info"]["train_time"] for result in self.results]
        return statistics.fmean(map(sum, zip(own, started, strict=True)))

    @property
    def summary(self) -> dict[str, Any]:
        """What the record keeps of it."""
        return {
            "experiment": self.name,
            "learning_rate": self.rate,
            "trainable": self.trainable,
            "seeds": [result["run_info"]["train_config"]["seed"] for result in self.results],
            "test_accuracy": self.last("test accuracy"),
            "test_loss": self.ours("test loss"),
            "train_loss": self.last("train loss"),
            "forgetting": self.last("forgetting"),
            "forgetting_interval": [f["forgetting_interval"] for f in self.ours("forgetting")],
            "step_0": self.ours("step_0"),
            "tokens": self.last("train total tokens"),
            "start": self.ours("start"),
            "seconds": self.seconds,
            "cpu_seconds": self.ours("cpu_seconds"),
            "right": self.ours("right"),
        }


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and half of its 95 % t interval; None of fewer than two values."""
    count = len(values)
    if count < 2:
        return values[0], None
    reach = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    return statistics.fmean(values), reach


def question_differences(row: Row, reference: Row) -> list[float]:
    """Of each question, how much oftener it is answered rightly than by the reference."""
    shares = [
        [statistics.fmean(answers) for answers in zip(*each.ours("right"), strict=True)]
        for each in (row, reference)
    ]
    return [ours - theirs for ours, theirs in zip(*shares, strict=True)]


def write_report(results: Sequence[Result], context: Mapping[str, Any], folder: Path) -> str:
    """Write `method_comparison.md` and `method_comparison.json`.

    Args:
        results: of all runs, those of the reference first.
        context: what they were made of, by name.
        folder: where to.

    Returns:
        The report.
    """
    names = dict.fromkeys(result["run_info"]["experiment_name"] for result in results)
    rows = [
        Row([result for result in results if result["run_info"]["experiment_name"] == name])
        for name in names
    ]
    base, questions = rows[0].ours("base")[0], len(rows[0].ours("right")[0])
    accuracy = statistics.fmean(rows[0].last("test accuracy"))
    reading = _READING.format(
        questions=questions,
        seeds=f"{len(rows[0].results)} seeds" if len(rows[0].results) > 1 else "one seed",
        error=100 * math.sqrt(accuracy * (1 - accuracy) / questions),
    )
    columns = _columns(rows)
    table = markdown_table(list(columns), [[of(row) for of in columns.values()] for row in rows])
    bare = (
        f"The base without an adapter: accuracy {base['test accuracy']:.1%}, test loss "
        f"{base['test loss']:.4f}."
    )
    report = f"# Method comparison\n\n{table}\n\n{bare}\n\n{reading}\n\n{facts(context)}\n"
    numbers = {"context": dict(context), "base": base, "rows": [row.summary for row in rows]}
    with publishing(folder) as written:
        write_text(written / TABLE, report)
        write_json(written / NUMBERS, numbers)
    return report


def _columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    reference = rows[0]
    longer = next((row for row in rows if row.name == reference.name + TOTAL_BUDGET), None)

    def against(row: Row, other: Row) -> str:
        mean, reach = mean_interval(question_differences(row, other))
        return _bracketed(100 * mean, 100 * (reach or 0.0), "+.1f")

    def against_longer(row: Row) -> str:
        return against(row, longer) if longer and row.start_tokens else ""

    def step_0(row: Row) -> str:
        starts = row.ours("step_0")
        share, loss = (statistics.fmean(s[key] for s in starts) for key in starts[0])
        return f"{share:.1%}, {loss:.3f}"

    def tokens(row: Row) -> str:
        own = statistics.fmean(row.last("train total tokens"))
        return f"{own:,.0f} + {row.start_tokens:,.0f} = {own + row.start_tokens:,.0f}"

    return {
        "experiment": lambda row: row.name,
        "rate": lambda row: f"{row.rate:g}",
        "trained parameters": lambda row: f"{row.trainable:,}",
        "test accuracy, %": lambda row: _over_seeds(row.last("test accuracy"), 100, ".1f"),
        "against the first, points": lambda row: (
            "" if row is reference else against(row, reference)
        ),
        **({"against the total budget, points": against_longer} if longer else {}),
        "test loss": lambda row: _over_seeds(row.ours("test loss"), 1, ".4f"),
        "forgetting": lambda row: _over_seeds(row.last("forgetting"), 1, "+.4f"),
        "at step 0: accuracy, loss": step_0,
        "tokens: run + start": tokens,
        "seconds in all": lambda row: f"{row.seconds:,.0f}",
    }


def _over_seeds(values: Sequence[float], scale: float, style: str) -> str:
    mean, reach = mean_interval([scale * value for value in values])
    return format(mean, style) if not reach else _bracketed(mean, reach, style)


def _bracketed(mean: float, reach: float, style: str) -> str:
    return f"{mean:{style}} ({mean - reach:{style}} to {mean + reach:{style}})"
