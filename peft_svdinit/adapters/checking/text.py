"""Base, tuned and base + adapter on a little text: how near the adapter comes to the fine-tune."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...files import resolve_folder
from ...models import task_type_of
from .sample_text import SAMPLE_TEXTS
from .stock_loading import load_stock_adapter

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_RANDOM_LENGTH = 64


@dataclass(frozen=True)
class TextCheck:
    """Means over the predicted tokens of a sample, in nats.

    Attributes:
        sample: "text", or "random tokens" where the base model has no tokenizer that works: on
            these, losses say nothing about language, and only the divergences are of use.
        tokens: how many were predicted.
        loss_base, loss_tuned, loss_adapted: cross-entropy of the sample under each model.
        kl_base: KL(tuned ‖ base), what fine-tuning changed.
        kl_adapted: KL(tuned ‖ base + adapter), what of it the adapter misses.
        never_called: adapted layers that no token went through. The model reads their weights past
            the layer, as Mamba's kernels do, or they are of experts that nothing was sent to.
    """

    sample: Literal["text", "random tokens"]
    tokens: int
    loss_base: float
    loss_tuned: float
    loss_adapted: float
    kl_base: float
    kl_adapted: float
    never_called: tuple[str, ...] = ()


def compare_on_text(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    adapter: str | os.PathLike,
    texts: Sequence[str] = SAMPLE_TEXTS,
    *,
    max_tokens: int = 384,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> TextCheck | None:
    """Run base, base + adapter (through stock PEFT) and tuned on the same tokens.

    One model is in memory at a time, in the dtype that it is stored in, and of the first two their
    log-probabilities: at most 2 * max_tokens * vocabulary numbers in float32. An adapter that is no
    nearer to the tuned model than the base is reported by a warning: one that cuts off too much
    may be so. None, and a warning, if the base does not run on token ids alone.

    Args:
        base, tuned: folders or Hub ids of causal language models.
        adapter: folder of a LoRA.
        texts: read by the base's tokenizer, or replaced by random tokens if it has none that can
            be used, of which a warning tells.
        max_tokens: length of the sample.
        seed: of the random tokens.
        device: where the models run.

    Raises:
        FileNotFoundError: if a model or the adapter is missing.
        ValueError: if `can_compare` gives a reason why not, a model is not in safetensors, a loss
            or divergence is not finite, there is nothing to predict, or the adapter cannot be
            loaded.
    """
    folder = resolve_folder(base, argument="base")
    tuned_folder = resolve_folder(tuned, argument="tuned")
    reason = can_compare(folder, tuned_folder)
    if reason is not None:
        raise ValueError(reason)
    model = _loaded(folder, device)
    samples, kind = _samples(folder, model.config, texts, max_tokens, seed)
    try:
        before = _log_probabilities(model, samples)
    except Exception as error:  # Whatever the code of some architecture raises.
        logger.warning(
            "The models are not run on text: base: %s does not run on token ids alone: %s: %s",
            folder,
            type(error).__name__,
            error,
        )
        return None
    model = load_stock_adapter(model, adapter)
    with _uncalled(model) as uncalled:
        adapted = _log_probabilities(model, samples)
    del model
    gc.collect()  # Models refer to themselves; the next one must not come on top.
    model = _loaded(tuned_folder, device)
    losses = {"base": 0.0, "tuned": 0.0, "base + adapter": 0.0}
    divergences = {"base": 0.0, "base + adapter": 0.0}
    for index, sample in enumerate(samples):
        (target,) = _log_probabilities(model, [sample])
        others = {"base": before[index], "base + adapter": adapted[index]}
        for name, log_probabilities in {"tuned": target, **others}.items():
            losses[name] -= log_probabilities.gather(1, sample[1:, None]).double().sum().item()
        for name, log_probabilities in others.items():
            divergences[name] += divergence(target, log_probabilities)
    tokens = sum(len(sample) - 1 for sample in samples)
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise ValueError(f"the loss of {name} on the sample is {loss}: a damaged model?")
    for name, value in divergences.items():
        if not math.isfinite(value):
            raise ValueError(
                f"the divergence of {name} from tuned on the sample is {value}: a damaged model?"
            )
    check = TextCheck(
        kind,
        tokens,
        loss_base=losses["base"] / tokens,
        loss_tuned=losses["tuned"] / tokens,
        loss_adapted=losses["base + adapter"] / tokens,
        kl_base=divergences["base"] / tokens,
        kl_adapted=divergences["base + adapter"] / tokens,
        never_called=tuple(uncalled),
    )
    if uncalled:
        logger.warning(
            "%d adapted layers, %s the first, were never called: where the model reads their "
            "weights directly, the adapter works only once it is merged",
            len(uncalled),
            next(iter(uncalled)),
        )
    if check.kl_adapted >= check.kl_base:
        logger.warning(
            "With the adapter the base model is no nearer to the tuned one: KL %.4g nats per token "
            "without it, %.4g with it on %d tokens. The cause may be a rank that is too low, "
            "changed tensors outside the adapter, or a configuration other than the base's",
            check.kl_base,
            check.kl_adapted,
            tokens,
        )
    return check


@contextmanager
def _uncalled(model: PeftModel) -> Iterator[dict[str, None]]:
    """Names of the adapted layers; those that are called within the context go."""
    layers: dict[str, Any] = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    names = dict.fromkeys(layers)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: names.pop(name, None))
        for name, module in layers.items()
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def can_compare(base_folder: Path, tuned_folder: Path) -> str | None:
    """Why `compare_on_text` cannot run these models, None if it can; reads configurations only."""
    vocabularies = {}
    for argument, folder in (("base", base_folder), ("tuned", tuned_folder)):
        if not (folder / "config.json").is_file():
            return f"{argument}: {folder} has no config.json"
        try:
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            return f"{argument}: transformers cannot read {folder / 'config.json'}: {error}"
        names = config.architectures or ["no class"]
        causal = task_type_of(names[0], config.is_encoder_decoder) == "CAUSAL_LM"
        if not causal or type(config) not in AutoModelForCausalLM._model_mapping:
            return f"{argument}: {folder} is of {names[0]}, which is no causal language model"
        vocabularies[argument] = config.get_text_config().vocab_size
    if vocabularies["base"] != vocabularies["tuned"]:
        return (
            f"tuned: it predicts {vocabularies['tuned']} tokens, the base {vocabularies['base']}: "
            "models of different vocabularies cannot be compared"
        )
    return None


def divergence(
    log_p: Float[Tensor, "tokens vocabulary"], log_q: Float[Tensor, "tokens vocabulary"]
) -> float:
    """Σ KL(p ‖ q) over the tokens, in nats, summed in float64; NaN where either is NaN."""
    log_p, log_q = log_p.double(), log_q.double()
    p = log_p.exp()
    # Not where p > 0, or NaN of a damaged model counts as no divergence.
    terms = torch.where((p == 0) & ~log_q.isnan(), 0.0, p * (log_p - log_q))
    return terms.sum().item()


def _loaded(folder: Path, device: str | torch.device) -> Any:
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=False, use_safetensors=True
        )
    except MemoryError:
        raise
    except Exception as error:  # Of any kind: it is made of a stranger's files.
        raise ValueError(
            f"{folder}: transformers cannot load the model ({type(error).__name__}: {error})"
        ) from error
    return model.to(device).eval()


def _samples(
    folder: Path, config: Any, texts: Sequence[str], max_tokens: int, seed: int
) -> tuple[list[Int[Tensor, " length"]], Literal["text", "random tokens"]]:
    vocabulary = config.get_text_config().vocab_size
    samples = _tokenized(folder, vocabulary, texts)
    kind: Literal["text", "random tokens"] = "text"
    if samples is None:
        generator = torch.Generator().manual_seed(seed)
        count = -(-max_tokens // _RANDOM_LENGTH)
        samples = list(torch.randint(vocabulary, (count, _RANDOM_LENGTH), generator=generator))
        kind = "random tokens"
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or max_tokens
    kept = []
    for sample in samples:
        left = max_tokens - sum(len(other) for other in kept)
        sample = sample[: min(left, longest)]
        if len(sample) >= 2:
            kept.append(sample)
    if not kept:
        raise ValueError(
            f"texts: nothing to predict in {len(texts)} texts and max_tokens={max_tokens}; give "
            "texts of at least two tokens"
        )
    return kept, kind


def _tokenized(
    folder: Path, vocabulary: int, texts: Sequence[str]
) -> list[Int[Tensor, " length"]] | None:
    """The texts in tokens, None without a tokenizer that works."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        samples = [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in texts]
    except Exception as error:  # Those of tokenizers in Rust are of no class of their own.
        reason = f"{type(error).__name__}: {error}"
    else:
        beyond = max((int(sample.max()) for sample in samples if len(sample)), default=0)
        if beyond < vocabulary:
            return samples
        reason = f"it gives the token {beyond}, and the model has {vocabulary}"
    logger.warning(
        "The tokenizer in %s cannot be used, the models run on random tokens instead: %s",
        folder,
        reason,
    )
    return None


@torch.no_grad()
def _log_probabilities(model: Any, samples: Sequence[Tensor]) -> list[Tensor]:
    device = next(model.parameters()).device
    found = []
    for sample in samples:
        logits = model(input_ids=sample[None].to(device), use_cache=False).logits[0, :-1]
        found.append(torch.log_softmax(logits.float(), dim=-1).cpu())
    return found
