"""Losses of each example under a model, and how near two models are on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from peft_svdinit.adapters import divergence
from peft_svdinit.training import IGNORED_LABEL


@dataclass(frozen=True)
class Losses:
    """Of each example: the summed negative log likelihood in nats, of how many tokens."""

    nll: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class Agreement:
    """Of each example: Σ KL(teacher ‖ model) in nats, how often both would say the same token."""

    kl: list[float]
    agreeing: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class _Batch:
    numbers: list[int]
    input_ids: Int[Tensor, "batch length"]
    attention_mask: Int[Tensor, "batch length"]
    labels: Int[Tensor, "batch length"]


def example_losses(model: Any, examples: Dataset, batch_size: int, title: str = "loss") -> Losses:
    """The loss of each example's labels, as transformers computes it, not averaged.

    Args:
        model: a causal language model, or one with an adapter.
        examples: of `tokenize_examples`: `input_ids`, and `labels` that are -100 without loss.
        batch_size: examples at a time; one has its logits in float32 at a time.
        title: of the progress bar.

    Raises:
        ValueError: if the model's logits are NaN or infinite.
    """
    nll, tokens = [0.0] * len(examples), [0] * len(examples)
    for batch in _batches(examples, batch_size, title):
        for number, (logits, targets) in zip(batch.numbers, _predicted(model, batch), strict=True):
            losses = cross_entropy(logits.float(), targets, reduction="none")
            nll[number], tokens[number] = losses.double().sum().item(), len(targets)
    return Losses(nll, tokens)


def agreement(
    teacher: Any, model: Any, examples: Dataset, batch_size: int, title: str = "agreement"
) -> Agreement:
    """How near a model's predictions of the labels are to a teacher's.

    Of both, the logits of one batch are held. The arguments and errors are those of
    `example_losses`.
    """
    count = len(examples)
    found = Agreement([0.0] * count, [0] * count, [0] * count)
    for batch in _batches(examples, batch_size, title):
        pairs = zip(
            _predicted(teacher, batch, "the teacher"), _predicted(model, batch), strict=True
        )
        for number, ((wanted, targets), (given, _)) in zip(batch.numbers, pairs, strict=True):
            log_p, log_q = (each.float().log_softmax(dim=-1) for each in (wanted, given))
            found.kl[number] = divergence(log_p, log_q)
            found.agreeing[number] = int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
            found.tokens[number] = len(targets)
    return found


def padded(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Rows of one length, with `value` where they were shorter."""
    return pad_sequence([torch.tensor(row) for row in rows], True, value, padding_side=side)


def longest_first(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of rows, `size` at a time: like lengths together, and the most memory at first."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _batches(examples: Dataset, size: int, title: str) -> Iterator[_Batch]:
    ids, labels = examples["input_ids"], examples["labels"]
    # disable=None: no bar where standard error is not a terminal.
    for numbers in tqdm(longest_first([len(row) for row in ids], size), title, disable=None):
        rows = [ids[number] for number in numbers]
        yield _Batch(
            numbers,
            padded(rows, 0),
            padded([[1] * len(row) for row in rows], 0),
            padded([labels[number] for number in numbers], IGNORED_LABEL),
        )


@torch.inference_mode()
def _predicted(
    model: Any, batch: _Batch, whose: str = "the model"
) -> list[tuple[Float[Tensor, "labels vocabulary"], Int[Tensor, " labels"]]]:
    """Of each example, the logits by which its labels are predicted, and these labels."""
    device = next(model.parameters()).device
    logits = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        use_cache=False,
    ).logits
    # Virtual tokens of an adapter come before the text.
    logits = logits[:, -batch.input_ids.shape[1] :]
    found = []
    for row, labels in zip(logits, batch.labels.to(device), strict=True):
        places = (labels[1:] != IGNORED_LABEL).nonzero()[:, 0]
        # -inf is a token that is ruled out; this is false of NaN.
        if not (row[places] < torch.inf).all():
            raise ValueError(
                f"{whose} gives logits that are NaN or infinite: damaged weights, or a dtype that "
                "is too narrow for them"
            )
        found.append((row[places], labels[places + 1]))
    return found
