"""Text to token ids and labels, with the loss on completions only."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .refusal import refused_as

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100


def tokenize_examples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Token ids and labels, with the loss on completions only.

    Prompt and completion are tokenised apart, so the labels are exactly the completion's tokens
    and the end token. The prompt of a conversation is the chat template of all that comes before
    the last assistant message, which is the completion. A plain text is a completion of nothing.

    An example beyond `max_length` loses the start of its prompt, down to a quarter of
    `max_length`, then the end of its completion. Examples without a completion or text are
    dropped and counted in the log.

    Args:
        dataset: of `load_examples`.
        tokenizer: with an end-of-sequence token. A start token is put first, and kept there, if
            the tokenizer does so itself and the prompt has none.
        max_length: tokens per example, at least 2.

    Returns:
        A data set of `input_ids`, `attention_mask` and `labels` (-100 where there is no loss).

    Raises:
        ValueError: if no example is left, or the tokenizer lacks what the data needs.
    """
    check_length(max_length)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-sequence token; set tokenizer.eos_token")
    tokenized = dataset.map(
        _encode_batch,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
        batched=True,
        remove_columns=dataset.column_names,
        desc="Tokenizing",
    )
    if not len(tokenized):
        raise ValueError(
            f"none of the {len(dataset)} examples has anything to learn from: each completion, "
            "reply or text is empty"
        )
    if dropped := len(dataset) - len(tokenized):
        logger.warning("dropped %d of %d examples, which have no completion", dropped, len(dataset))
    return tokenized


def completion_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads a batch to its longest example: ids with the padding token, labels with -100."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL)


def prompts_and_completions(
    batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """The texts of `load_examples` that have a completion; a plain text completes nothing.

    Raises:
        ValueError: of conversations, if the tokenizer has no chat template.
    """
    if "messages" in batch:
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, which data with messages needs; use the "
                "tokenizer of a chat model, or data with a prompt and a completion"
            )
        pairs = [_prompt_and_reply(messages, tokenizer) for messages in batch["messages"]]
    elif "completion" in batch:
        pairs = list(zip(batch["prompt"], batch["completion"], strict=True))
    else:
        pairs = [("", text) for text in batch["text"]]
    return [(prompt or "", completion) for prompt, completion in pairs if completion]


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The whole prompts as `tokenize_examples` reads them, before it cuts any."""
    return [start + prompt for start, prompt in _started(prompts, tokenizer)]


def _encode_batch(
    batch: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[list[int]]]:
    pairs = prompts_and_completions(batch, tokenizer)
    encoded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    if not pairs:
        return encoded
    end: Any = tokenizer.eos_token_id
    prompts, completions = zip(*pairs, strict=True)
    for (start, prompt), completion in zip(
        _started(prompts, tokenizer), _encode(completions, tokenizer), strict=True
    ):
        context, labels = _fit(start, prompt, [*completion, end], max_length)
        encoded["input_ids"].append(context + labels)
        encoded["attention_mask"].append([1] * (len(context) + len(labels)))
        encoded["labels"].append([IGNORED_LABEL] * len(context) + labels)
    return encoded


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _started(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Of each prompt, the start token where it has none of its own, and its tokens."""
    start, own = _start_tokens(tokenizer), str(tokenizer.bos_token)
    encoded = _encode(prompts, tokenizer) if prompts else []
    return [
        ([] if start and text.startswith(own) else start, ids)
        for text, ids in zip(prompts, encoded, strict=True)
    ]


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token, if this tokenizer puts one before every text."""
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]


def _prompt_and_reply(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """What comes before the last assistant message, as the model is asked, and that message."""
    if not all(isinstance(message, dict) for message in messages or []):
        raise ValueError(
            "messages_column must hold lists of messages, mappings such as "
            f'{{"role": "user", "content": "…"}}, got {messages!r}'
        )
    # Rows of one column have the same keys, filled up with None.
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages or []]
    replies = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not replies or replies[-1] == 0:
        return "", ""
    before = messages[: replies[-1]]
    with refused_as(f"messages_column: the tokenizer's chat template does not take {before!r}"):
        prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    reply = messages[replies[-1]].get("content", "")
    if not isinstance(reply, str):
        raise ValueError(f"messages_column: what the assistant says must be text, got {reply!r}")
    return str(prompt), reply


def _fit(
    start: list[int], prompt: list[int], labels: list[int], max_length: int
) -> tuple[list[int], list[int]]:
    """Cut the prompt's beginning, then the labels' end, until both fit into `max_length`."""
    room = max(max_length - len(labels), max_length // 4, 1) - len(start)
    context = start + prompt[max(0, len(prompt) - room) :]
    return context, labels[: max_length - len(context)]


def check_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(
            f"max_length must be at least 2, one token to predict from another, got {max_length}"
        )
