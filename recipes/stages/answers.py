"""Greedy answers to questions, and which of them are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from peft_svdinit.training import IGNORED_LABEL
from stages.token_losses import longest_first, padded


@dataclass(frozen=True)
class Questions:
    """What a model is asked, in tokens, and the text that it should answer."""

    prompts: list[list[int]]
    references: list[str]

    @classmethod
    def of(cls, examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> Questions:
        """Of `tokenize_examples`: what has no loss is the question, the rest the answer.

        Raises:
            ValueError: if an example has no question.
        """
        prompts, references = [], []
        for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True):
            start = next(place for place, label in enumerate(labels) if label != IGNORED_LABEL)
            if not start:
                raise ValueError(
                    "exact_match_dataset must have questions and answers, and it has texts alone"
                )
            prompts.append(ids[:start])
            references.append(str(tokenizer.decode(labels[start:], skip_special_tokens=True)))
        return cls(prompts, references)


def greedy_answers(
    model: Any,
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
    title: str = "answers",
) -> list[str]:
    """What the model says to each question, the likeliest token each time, up to its end token.

    Questions of a batch are padded on the left, so that each answer follows its question.
    """
    own: Any = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=[end for end in dict.fromkeys(ends) if end is not None],
        pad_token_id=tokenizer.pad_token_id,
    )
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        batch_size = 1  # PEFT puts virtual tokens before the padding, from where positions count.
    device = next(model.parameters()).device
    answers = [""] * len(questions.prompts)
    lengths = [len(prompt) for prompt in questions.prompts]
    for numbers in tqdm(longest_first(lengths, batch_size), title, disable=None):
        rows = [questions.prompts[number] for number in numbers]
        ids = padded(rows, int(tokenizer.pad_token_id or 0), "left")  # pyright: ignore
        mask = padded([[1] * len(row) for row in rows], 0, "left")
        with torch.inference_mode():
            said = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=[_checked],
            )
        texts = tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)
        for number, text in zip(numbers, texts, strict=True):
            answers[number] = text
    return answers


def _checked(ids: Tensor, scores: Tensor) -> Tensor:
    """The scores as they are; the likeliest token of NaN would be one like any other."""
    if not (scores < torch.inf).all():
        raise ValueError("the model gives logits that are NaN or infinite: damaged weights?")
    return scores
