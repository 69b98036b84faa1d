"""Greedy answers to questions, and which of them are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from peft_svdinit.training import encode_prompts, prompts_and_completions
from stages.token_losses import longest_first, padded


@dataclass(frozen=True)
class Questions:
    """What a model is asked, in tokens, and the text that it should answer."""

    prompts: list[list[int]]
    references: list[str]

    @classmethod
    def of(cls, examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> Questions:
        """Of `load_examples`: the prompts, whole, and the completions as they are written.

        Raises:
            ValueError: if an example has no question, or none has an answer.
        """
        pairs = prompts_and_completions(examples[:], tokenizer)
        if not pairs:
            raise ValueError("exact_match_dataset must have questions and answers, and has none")
        if not all(question for question, _ in pairs):
            raise ValueError(
                "exact_match_dataset must have questions and answers, and it has texts alone"
            )
        prompts = encode_prompts([question for question, _ in pairs], tokenizer)
        return cls(prompts, [answer for _, answer in pairs])

    def check_room(self, positions: int | None, max_new_tokens: int) -> None:
        """Refuse questions that leave a model no room for the answer.

        Args:
            positions: that the model has for both, None where it has no limit.
            max_new_tokens: of an answer.

        Raises:
            ValueError: with the number of such questions.
        """
        if positions is None:
            return
        lengths = [len(prompt) for prompt in self.prompts]
        beyond = sum(length + max_new_tokens > positions for length in lengths)
        if beyond:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} and a question must fit into the {positions} "
                f"positions of the model: {beyond} of {len(lengths)} questions are too long, the "
                f"longest has {max(lengths)} tokens; ask for shorter answers, or leave these "
                "questions out of exact_match_dataset"
            )


def greedy_answers(
    model: Any,
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    title: str = "answers",
) -> list[str]:
    """What the model says to each question, the likeliest token each time, up to its end token.

    Questions of a batch are padded on the left, so that each answer follows its question. Of the
    model's own generation settings only its special tokens count.

    Args:
        model: a causal language model, or one with an adapter.
        questions: to be asked.
        tokenizer: the model's.
        batch_size: questions at a time.
        max_new_tokens: of an answer.
        stop: texts, at the first of which an answer ends.
        title: of the progress bar.

    Raises:
        ValueError: if the model's logits are NaN or infinite.
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
        with torch.inference_mode(), _without_own_settings(model):
            said = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=[_checked],
            )
        texts = tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)
        for number, text in zip(numbers, texts, strict=True):
            ends_at = [text.index(word) for word in stop if word in text]
            answers[number] = text[: min(ends_at, default=len(text))]
    return answers


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """`generate` fills what its configuration leaves out from the model's, penalties and all."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        inner.generation_config = own


def _checked(ids: Tensor, scores: Tensor) -> Tensor:
    """The scores as they are; the likeliest token of NaN would be one like any other."""
    if not (scores < torch.inf).all():
        raise ValueError("the model gives logits that are NaN or infinite: damaged weights?")
    return scores
