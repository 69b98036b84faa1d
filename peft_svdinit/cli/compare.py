"""`svdinit compare`: a report over run folders."""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import analysis, files, training
from .paths import refuse_file
from .summary import say


@dataclass(frozen=True)
class CompareOptions:
    """Compare the runs that ComparisonCallback recorded, over methods and seeds."""

    runs: list[str] = field(metadata={"help": "Run folders, each with run.json."})
    output_dir: str = field(metadata={"help": "Folder for the report, page and figures."})
    reference: str = field(
        default="random", metadata={"help": "Method (or run name) that others are compared with."}
    )
    metric: str = field(
        default="eval_loss",
        metadata={"help": "The loss compared; of several evaluation sets eval_<set>_loss."},
    )


def run(options: CompareOptions) -> None:
    refuse_file(options.output_dir, "output_dir")
    paths = analysis.write_comparison(
        [training.read_run(folder, "runs") for folder in options.runs],
        {},
        options.output_dir,
        reference=options.reference,
        metric=options.metric,
    )
    say(files.one_line(files.read_json(paths.numbers, "output_dir")["headline"]))
    say(f"Page: {paths.page}\nReport: {paths.report}")
