"""Adapters side by side in one table: held-out loss, exact match, forgetting, agreement.

    python recipes/evaluate_adapter.py --adapters runs/random runs/svd --output_dir evaluation
    python recipes/evaluate_adapter.py --adapters lora=user/adapter@v1 ours=runs/svd \\
        --dataset_name my.jsonl --teacher runs/full --output_dir evaluation
    python recipes/evaluate_adapter.py --adapters runs/svd --exact_match_dataset openai/gsm8k \\
        --exact_match_config main --exact_match_split test --max_new_tokens 300 \\
        --exact_match_template 'Question: {question}\\nAnswer:' --exact_match_samples 1319
    python recipes/evaluate_adapter.py --adapters runs/svd --lm_eval_tasks gsm8k hellaswag

Any adapters that PEFT loads on one causal language model, those of this package and others. The
base model is loaded once and measured first; each adapter is put on it, measured, and taken off.
The folder then holds `evaluation.md`, the table, and `evaluation.json`, with the figures of each
example, so that others can be paired with them. A model that goes on asking after its answer is
stopped, as by lm-evaluation-harness: an answer ends at the first of `--exact_match_stop`.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from stages.attached import find_adapters
from stages.evaluation import (
    Evaluation,
    Row,
    base_options,
    checked_base,
    device_of,
    measured,
    positions,
    teacher_model,
)
from stages.evaluation_options import (
    AdaptedModelOptions,
    EvaluationOptions,
    ExactMatchOptions,
    ForgettingOptions,
    HarnessOptions,
    HeldOutOptions,
)
from stages.evaluation_sets import EvaluationSets
from stages.harness import check_harness, harness_results
from stages.metric_modules import metric
from stages.processes import leave_process_group

from peft_svdinit.analysis import write_evaluation
from peft_svdinit.training import (
    describe_environment,
    load_tokenizer,
    parse_options,
    refusals_in_one_line,
)

CLASSES = (
    EvaluationOptions, AdaptedModelOptions, HeldOutOptions, ExactMatchOptions, ForgettingOptions,
    HarnessOptions,
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    given = parse_options(CLASSES, argv, description=__doc__ or "", script=__file__)
    with refusals_in_one_line(given):
        evaluate(*given)


def evaluate(
    options: EvaluationOptions,
    model: AdaptedModelOptions,
    data: HeldOutOptions,
    exact_match: ExactMatchOptions,
    forgetting: ForgettingOptions,
    harness: HarnessOptions,
) -> None:
    """Measure the base and the adapters, write the table after each, and print it."""
    began = time.monotonic()
    metric("perplexity")
    check_harness(harness, model)
    device = device_of(options)
    adapters = find_adapters(options.adapters)
    base_model = base_options(model, adapters)
    tokenizer = load_tokenizer(base_model)
    sets = EvaluationSets.prepare(tokenizer, options, data, exact_match, forgetting)
    base = checked_base(base_model, adapters, device, check_base=options.check_base)
    if sets.questions is not None:
        sets.questions.check_room(positions(base, adapters), exact_match.max_new_tokens)
    record = {
        "model": asdict(base_model),
        "data": sets.about,
        "teacher": options.teacher,
        "environment": describe_environment(device),
        "command": f"python {options.invocation}",
    }

    def write(rows: list[Row]) -> Path:
        """All that is known so far: a later adapter may fail, or the harness."""
        seconds = round(time.monotonic() - began, 1)
        return write_evaluation({**record, "seconds": seconds, "results": rows}, options.output_dir)

    with teacher_model(options, base, base_model, device) as teacher:
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        evaluation = Evaluation(sets, options, exact_match, teacher, data)
        for rows in measured(base, adapters, evaluation):
            report = write(rows)
    del base  # The harness loads its own.
    if harness.lm_eval_tasks:
        for row, adapter in zip(rows, [None, *adapters], strict=True):
            row["lm_eval"] = harness_results(
                harness,
                base_model,
                adapter and adapter.folder,
                device=str(device),
                batch_size=options.eval_batch_size,
            )
            report = write(rows)
    print(report.read_text(encoding="utf-8"))
    print(f"Table and figures of each example in {options.output_dir}")


if __name__ == "__main__":
    main()
    leave_process_group()
