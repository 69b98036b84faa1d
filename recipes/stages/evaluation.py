"""One base model and its adapters, measured one after the other on the same examples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from peft_svdinit.factors import kind_of
from peft_svdinit.files import is_local, split_revision
from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    builtin_of_folder,
    load_model,
    refusals_in_one_line,
    resolve_model,
)
from stages.answers import greedy_answers
from stages.attached import BASE, SavedAdapter, attached, check_adapters, find_adapter
from stages.evaluation_options import AdaptedModelOptions, EvaluationOptions, ExactMatchOptions
from stages.evaluation_sets import EvaluationSets
from stages.held_out import held_out_note
from stages.metric_modules import metric
from stages.token_losses import agreement, example_losses

Row = dict[str, Any]


def base_options(given: AdaptedModelOptions, adapters: Sequence[SavedAdapter]) -> ModelOptions:
    """The base that was given, or else what the first adapter calls its own; so its revision.

    Raises:
        ValueError: if it says nothing, or names a folder that is not there, or if the adapters are
            of different revisions.
    """
    name, adapter = given.model_name_or_path, adapters[0]
    if name is None:
        name = adapter.base
        if not name:
            raise ValueError(f"{adapter.place} names no base model; set model_name_or_path")
        name = builtin_of_folder(name) or name
        if is_local(name) and not Path(name).is_dir():
            raise ValueError(
                f"{adapter.place} says that its base model is {name!r}, which is not on this "
                "disk; set model_name_or_path"
            )
    revision = given.model_revision
    if revision is None and _is_of_hub(name):
        revision = _revision(given.model_name_or_path or adapter.base, adapters)
    own = {"model_name_or_path": name, "model_revision": revision or "main"}
    return ModelOptions(**{**vars(given), **own})


def _is_of_hub(name: str) -> bool:
    return not is_local(resolve_model(name))


def _revision(base: str | None, adapters: Sequence[SavedAdapter]) -> str:
    """The one that all adapters of the base name."""
    named = {one.base_revision or "main": one for one in adapters if one.base == base}
    if len(named) > 1:
        (first, one), (second, other) = list(named.items())[:2]
        raise ValueError(
            f"{other.place} is of revision {second!r} of {base}, and {one.source} of {first!r}: "
            "evaluate them apart, or set model_revision to put both on one base"
        )
    return next(iter(named), "main")


def device_of(options: EvaluationOptions) -> torch.device:
    """Where to evaluate.

    Raises:
        ValueError: for a device that torch does not know or this machine lacks, or several
            processes.
    """
    # Of the launcher: without GPUs, PartialState knows one process of several.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("adapters are evaluated in one process: start it without a launcher")
    try:
        device = torch.device(options.device or PartialState().device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device must be one of torch's, got {options.device!r}") from error
    try:
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device must be one of this machine, {device} is not: {error}") from error
    return device


def checked_base(
    options: ModelOptions,
    adapters: Sequence[SavedAdapter],
    device: torch.device,
    *,
    check_base: bool,
) -> Any:
    """The base model on its device, on which every adapter has been put once.

    Raises:
        ValueError: if an adapter is of another base, or PEFT cannot load it.
    """
    base = _loaded(options, device)
    names = resolve_model(options.model_name_or_path), options.model_name_or_path
    check_adapters(base, adapters, names, check_base=check_base)
    for adapter in adapters:
        with attached(base, adapter):
            pass
    return base


def positions(base: Any, adapters: Sequence[SavedAdapter]) -> int | None:
    """How many tokens of text the base can read with any of the adapters; None without a limit."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    virtual = max(adapter.config.get("num_virtual_tokens") or 0 for adapter in adapters)
    return None if limit is None else limit - virtual


@contextmanager
def teacher_model(
    options: EvaluationOptions, base: Any, base_options: ModelOptions, device: torch.device
) -> Iterator[Any]:
    """The teacher in memory, beside the base: a model, or an adapter on a base of its own.

    Raises:
        SystemExit: with one line, where it is neither, or of another base or vocabulary.
    """
    if options.teacher is None:
        yield None
        return
    adapters: list[SavedAdapter] = []
    with refusals_in_one_line([options]):
        source = resolve_model(options.teacher, "teacher")
        kind = kind_of(source, argument="teacher")
        if kind == "factors":
            raise ValueError(f"teacher must be an adapter or a model, {source} holds factors")
        if kind == "model":
            name, revision = (source, None) if is_local(source) else split_revision(source)
            own = {"model_name_or_path": name, "model_revision": revision or "main"}
            model = _loaded(replace(base_options, **own), device)
        else:
            adapters = [find_adapter(source, "teacher", "teacher")]
            if _is_of_hub(base_options.model_name_or_path):
                revision = adapters[0].base_revision or base_options.model_revision
                base_options = replace(base_options, model_revision=revision)
            model = checked_base(base_options, adapters, device, check_base=options.check_base)
        sizes = [one.config.get_text_config().vocab_size for one in (model, base)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher must have the base's vocabulary of {sizes[1]} tokens, it has {sizes[0]}"
            )
    with attached(model, adapters[0]) if adapters else nullcontext(model) as teacher:
        yield teacher


def _loaded(options: ModelOptions, device: torch.device) -> Any:
    model: Any = load_model(options)
    return (model if getattr(model, "is_quantized", False) else model.to(device)).eval()


@dataclass(frozen=True)
class Evaluation:
    """What is measured of every model."""

    sets: EvaluationSets
    options: EvaluationOptions
    exact_match: ExactMatchOptions
    teacher: Any
    data: DataOptions

    def row(self, model: Any, name: str) -> Row:
        """Its figures, with those of each example beside them."""
        sets, size, found = self.sets, self.options.eval_batch_size, Row(name=name)
        if sets.held_out is not None and "loss" in self.options.metrics:
            losses = asdict(example_losses(model, sets.held_out, size, f"{name}: loss"))
            found["loss"] = {**metric("perplexity").compute(**losses), "per_example": losses}
        if sets.held_out is not None and self.teacher is not None:
            found["agreement"] = self._agreement(model, name)
        if sets.general is not None:
            losses = asdict(example_losses(model, sets.general, size, f"{name}: general text"))
            found["forgetting"] = {"per_example": losses}
        if sets.questions is not None:
            found["exact_match"] = self._exact_match(model, name)
        return found

    def about(self, adapter: SavedAdapter) -> Row:
        """What the adapter is, and what is to be said of its figures."""
        found = adapter.describe()
        notes = [found["note"]] if "note" in found else []
        held_out = held_out_note(adapter.folder, self.data) if self.sets.held_out else None
        notes += [held_out] if held_out else []
        return {**found, "note": "; ".join(notes)} if notes else found

    def _agreement(self, model: Any, name: str) -> Row:
        examples = agreement(
            self.teacher, model, self.sets.held_out, self.options.eval_batch_size,  # pyright: ignore
            f"{name}: agreement",
        )  # fmt: skip
        ratio = metric("perplexity").compute
        kl = ratio(nll=examples.kl, tokens=examples.tokens)
        top = ratio(nll=[float(count) for count in examples.agreeing], tokens=examples.tokens)
        return {
            "kl": kl["loss"],
            "kl_interval": kl["loss_interval"],
            "top_1": top["loss"],
            "top_1_interval": _of_share(top["loss"], top["loss_interval"]),
            "per_example": asdict(examples),
        }

    def _exact_match(self, model: Any, name: str) -> Row:
        asked, options = self.sets.questions, self.exact_match
        assert asked is not None
        answers = greedy_answers(
            model,
            asked,
            self.sets.tokenizer,
            batch_size=options.generation_batch_size,
            max_new_tokens=options.max_new_tokens,
            stop=options.exact_match_stop,
            title=f"{name}: answers",
        )
        pairs = {"predictions": answers, "references": asked.references}
        kind = {"answers": options.exact_match_answers}
        right = metric("exact_match").matches(*pairs.values(), **kind)
        shown = range(min(options.shown_answers, len(answers)))
        return {
            **metric("exact_match").compute(**pairs, **kind),
            "per_example": {"right": right},
            "shown": [
                {
                    "question": self.sets.tokenizer.decode(asked.prompts[number]),
                    "reference": asked.references[number],
                    "answer": answers[number],
                    "right": right[number],
                }
                for number in shown
            ],
        }


def _of_share(share: float, interval: list[float] | None) -> list[float] | None:
    """Clipped; none where all examples agree or none, of which the ratio estimator says nothing."""
    if interval is None or share in (0, 1):
        return None
    return [max(interval[0], 0.0), min(interval[1], 1.0)]


def measured(
    base: Any, adapters: Sequence[SavedAdapter], evaluation: Evaluation
) -> Iterator[list[Row]]:
    """A row of the base and of each adapter, with their differences: all so far, after each.

    Raises:
        ValueError: naming the model, if a figure is NaN or infinite.
    """
    with _named(BASE):
        rows = [{**evaluation.row(base, BASE), "parameters": 0}]
    yield rows
    for adapter in adapters:
        with _named(adapter.name):
            with attached(base, adapter) as model:
                rows.append({**evaluation.row(model, adapter.name), **evaluation.about(adapter)})
            _compare_(rows[-1], *rows[:2])
        yield rows


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name} cannot be measured: {error}") from error


def _compare_(row: Row, base: Row, first: Row) -> None:
    """Add how it differs from the base's row, and from the first adapter's.

    The examples are pairs, and a difference of losses has the interval of an increase.
    """
    if "forgetting" in row:
        row["forgetting"] |= _increase(base, row, "forgetting")
    for title, other in (("against_base", base), ("against_first", first)):
        if "loss" in row and row is not other:
            found = _increase(other, row, "loss")
            row["loss"][title] = {
                "difference": found["forgetting"],
                "difference_interval": found["forgetting_interval"],
            }


def _increase(before: Row, after: Row, name: str) -> Row:
    first, second = before[name]["per_example"], after[name]["per_example"]
    return metric("forgetting").compute(
        before=first["nll"], after=second["nll"], tokens=first["tokens"]
    )
