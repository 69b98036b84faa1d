"""The training loop of PEFT's method comparison, and what it measures of a model."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from peft_svdinit.training import ModelOptions, Unfinished, load_model
from stages.answers import Questions, greedy_answers
from stages.method_data import MethodData
from stages.method_protocol import Protocol
from stages.metric_modules import metric
from stages.token_losses import Losses, example_losses

WARMUP = 0.1  # share of the steps
# What PEFT looks for; a number that nothing announces is no answer to it.
_ANNOUNCED = re.compile(r"(?:the (?:final )?answer is\b|####).*", re.IGNORECASE | re.DOTALL)


def loaded_base(protocol: Protocol, device: torch.device) -> Any:
    """The base model of the protocol, ready to be adapted."""
    model: Any = load_model(
        ModelOptions(
            model_name_or_path=protocol.model_id,
            dtype=protocol.dtype,  # pyright: ignore[reportArgumentType]
            attn_implementation=protocol.attn_implementation,
        )
    )
    if protocol.use_gc:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    return model.to(device).eval()


@dataclass
class Trained:
    """What a training took.

    Attributes:
        losses, durations, tokens, reserved, allocated: of each step; seconds, tokens with the end
            tokens that are learnt, and bytes of the accelerator.
        metrics: rows of PEFT's results.
        examples: how many were seen.
        seconds: all of it, without the validations.
    """

    losses: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    examples: int = 0
    seconds: float = 0.0

    def latest(self, of: str, steps: int) -> float:
        """The mean of the last so many steps, or of all where there are fewer."""
        values = getattr(self, of)[-steps:]
        return sum(values) / len(values)


def train(
    model: nn.Module,
    protocol: Protocol,
    batches: Iterable[dict[str, Tensor]],
    steps: int,
    *,
    validate: Callable[[], float] | None = None,
    title: str = "training",
) -> Trained:
    """Train what requires a gradient; the loss is the mean over all tokens of a batch.

    Args:
        model: on its device.
        protocol: its optimizer, schedule and clipping.
        batches: one a step.
        steps: how many there are, which the schedule spans.
        validate: gives the accuracy of the model, every `eval_steps` steps.
        title: of the progress bar.

    Raises:
        Unfinished: if the loss is no longer finite.
    """
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = getattr(torch.optim, protocol.optimizer_type)
    optimizer: Any = kind(trainable, **protocol.optimizer_kwargs)
    warmup = int(WARMUP * steps)
    schedule = protocol.lr_scheduler and get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    done, began, validating = Trained(), time.perf_counter(), 0.0
    model.train()
    progress = tqdm(batches, title, steps, disable=None)
    for step, batch in enumerate(progress, 1):
        started = time.perf_counter()
        attended = int(batch["attention_mask"].sum())
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        optimizer.zero_grad()
        loss = model(**on_device, num_items_in_batch=attended).loss
        loss.backward()
        if protocol.grad_norm_clip:
            torch.nn.utils.clip_grad_norm_(trainable, protocol.grad_norm_clip)
        optimizer.step()
        if schedule:
            schedule.step()
        done.losses.append(loss.item())
        if not torch.isfinite(loss):
            raise Unfinished(f"{title}: the loss of step {step} is {loss.item()}; lower the rate")
        done.durations.append(time.perf_counter() - started)
        done.tokens.append(attended + len(batch["input_ids"]))
        done.examples += len(batch["input_ids"])
        on_cuda = device.type == "cuda"
        done.reserved.append(torch.cuda.memory_reserved(device) if on_cuda else 0)
        done.allocated.append(torch.cuda.memory_allocated(device) if on_cuda else 0)
        if validate and step % protocol.eval_steps == 0:
            paused = time.perf_counter()
            accuracy = validate()
            model.train()
            validating += time.perf_counter() - paused
            row = _metrics(done, step, protocol.eval_steps)
            done.metrics.append(
                {
                    **row,
                    "valid accuracy": accuracy,
                    "eval time": time.perf_counter() - paused,
                    "elapsed time": time.perf_counter() - began,
                }
            )
    model.eval()
    done.seconds = time.perf_counter() - began - validating
    return done


def _metrics(done: Trained, step: int, interval: int) -> dict[str, Any]:
    seconds = sum(done.durations[-interval:])
    return {
        "step": step,
        "train loss": done.latest("losses", interval),
        "train samples": done.examples,
        "train time": seconds,
        "tokens / sec": sum(done.tokens[-interval:]) / seconds,
        "mem allocated avg": done.latest("allocated", interval),
        "mem reserved avg": done.latest("reserved", interval),
    }


def answered_rightly(
    model: Any, questions: Questions, data: MethodData, protocol: Protocol, title: str = "answers"
) -> list[bool]:
    """Whether the model's greedy answer to each question announces the right number."""
    limits = protocol.generation_kwargs
    longest = max(len(prompt) for prompt in questions.prompts)
    room = [
        *([limits["max_new_tokens"]] if "max_new_tokens" in limits else []),
        *([limits["max_length"] - longest] if "max_length" in limits else []),
    ]
    said = greedy_answers(
        model.eval(),
        questions,
        data.tokenizer,
        batch_size=protocol.batch_size_eval,
        max_new_tokens=max(1, min(room, default=300)),
        title=title,
    )
    announced = [found[0] if (found := _ANNOUNCED.search(text)) else "" for text in said]
    return metric("exact_match").matches(announced, questions.references, "numeric")


@dataclass(frozen=True)
class Measured:
    """What a model can do: the test questions one by one, and its losses of texts one by one."""

    right: list[bool]
    answers: Losses
    general: Losses

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def loss(self) -> float:
        """Nats per token of the test questions' own answers."""
        return sum(self.answers.nll) / sum(self.answers.tokens)


def measured(model: Any, data: MethodData, protocol: Protocol) -> Measured:
    """Answer the test questions and read the test answers and the general text."""
    return Measured(
        answered_rightly(model, data.test, data, protocol, "test questions"),
        example_losses(model.eval(), data.answered, protocol.batch_size, "test answers"),
        example_losses(model, data.general, protocol.batch_size, "general text"),
    )
