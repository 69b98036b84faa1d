"""What adapters are evaluated on: held-out examples, general text, and questions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from peft_svdinit.training import (
    DataOptions,
    load_examples,
    refusals_in_one_line,
    tokenize_examples,
)
from stages.answers import Questions
from stages.evaluation_options import (
    AS_IT_IS,
    EvaluationOptions,
    ExactMatchOptions,
    ForgettingOptions,
)


@dataclass(frozen=True)
class EvaluationSets:
    """Tokenised examples; None of what is not measured.

    Attributes:
        about: of each of the metrics, what tells its data from others, as JSON values.
    """

    tokenizer: PreTrainedTokenizerBase
    held_out: Dataset | None
    general: Dataset | None
    questions: Questions | None
    about: dict[str, dict[str, Any]]

    @classmethod
    def prepare(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        options: EvaluationOptions,
        data: DataOptions,
        exact_match: ExactMatchOptions,
        forgetting: ForgettingOptions,
    ) -> EvaluationSets:
        """Load and tokenise them.

        Raises:
            SystemExit: with one line, where a data set, a column or a chat template is missing.
        """
        about: dict[str, dict[str, Any]] = {}

        def tokens(metric: str, data: DataOptions, examples: Dataset) -> Dataset:
            found = tokenize_examples(examples, tokenizer, data.max_length)
            about[metric] = {
                **asdict(data),
                "examples": len(found),
                "digest": _digest(found["input_ids"][:], found["labels"][:]),
            }
            return found

        held_out = general = asked = None
        if "loss" in options.metrics or options.teacher is not None:
            with refusals_in_one_line([data]):
                held_out = tokens("loss", data, load_examples(data)[1])
        if "forgetting" in options.metrics:
            with refusals_in_one_line([forgetting]):
                text = forgetting.data(data)
                general = tokens("forgetting", text, load_examples(text)[1])
        if "exact_match" in options.metrics:
            with refusals_in_one_line([exact_match]):
                chosen, examples = _questions(exact_match, data)
                examples = _in_template(examples, exact_match.exact_match_template)
                asked = Questions.of(examples, tokenizer)
                about["exact_match"] = {
                    **asdict(chosen),
                    "template": exact_match.exact_match_template,
                    "stop": exact_match.exact_match_stop,
                    "examples": len(asked.prompts),
                    "digest": _digest(asked.prompts, asked.references),
                }
        return cls(tokenizer, held_out, general, asked, about)


def _questions(exact_match: ExactMatchOptions, data: DataOptions) -> tuple[DataOptions, Dataset]:
    """By the first pair of columns that the data set has."""
    first, *others = exact_match.data(data)
    try:
        return first, load_examples(first)[1]
    except ValueError:
        for other in others:
            try:
                return other, load_examples(other)[1]
            except ValueError:
                continue
        raise


def _in_template(examples: Dataset, template: str) -> Dataset:
    if template == AS_IT_IS or "prompt" not in examples.column_names:
        if template != AS_IT_IS and "messages" in examples.column_names:
            raise ValueError(
                "exact_match_template belongs to questions in a column, and conversations have the "
                "tokenizer's chat template; leave it out"
            )
        return examples
    return examples.map(
        lambda row: {"prompt": template.replace("{question}", row["prompt"] or "")},
        desc="Questions",
    )


def _digest(*columns: list[Any]) -> str:
    """Of token ids and labels, or answers: figures may be paired where it is equal."""
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()
