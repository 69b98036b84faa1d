"""The linear layers of a model architecture, found without loading its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .model_config import MODEL_CONFIG, read_model_config
from .names import endings
from .sharding import is_split, whole_copy, whole_shape
from .weights import is_plain


@dataclass(frozen=True)
class LinearModule:
    """One linear layer, of weight (out, in), or (in, out) if `transposed` as in GPT-2's Conv1D."""

    name: str
    out_features: int
    in_features: int
    transposed: bool


def model_skeleton(
    path_or_id: str | os.PathLike,
    argument: str = "base",
    *,
    tuned: str | os.PathLike | None = None,
    architecture: str | None = None,
) -> nn.Module:
    """The model of a checkpoint folder on the meta device: names and shapes, no memory.

    Args:
        path_or_id: the folder or Hub repository.
        argument: by which the user gave it; the messages of errors begin with it.
        tuned: folder of a model fine-tuned from it. Where that is of another class of the same
            type, a classifier trained from a causal model say, or has other labels, the skeleton
            is of its class and has its labels.
        architecture: class of transformers to take in place of the one that the folder names.

    Raises:
        ValueError: if it has no configuration, or that names no architecture of transformers.
    """
    config: Any = model_configuration(path_or_id, argument)
    if architecture is not None:
        config.architectures = [architecture]
    kind = _architecture(config)
    if kind is None:
        raise ValueError(
            f"{argument}: {os.fspath(path_or_id)}: config.json names no architecture that "
            f"transformers {transformers.__version__} knows (architectures: "
            f"{list(config.architectures or ())})"
        )
    if tuned is not None and (Path(tuned) / MODEL_CONFIG).is_file():
        after: Any = model_configuration(tuned, "tuned")
        if type(after) is type(config):
            kind = _architecture(after) or kind
            if after.num_labels != config.num_labels:
                config.num_labels = after.num_labels
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # Of any kind: it is made of a stranger's sizes.
        raise ValueError(
            f"{argument}: {os.fspath(path_or_id)}: config.json describes no {kind.__name__} that "
            f"transformers {transformers.__version__} can make ({type(error).__name__}: {error})"
        ) from error


def model_configuration(path_or_id: str | os.PathLike, argument: str) -> PreTrainedConfig:
    """The configuration of a model folder or Hub repository, as transformers reads it.

    Raises:
        ValueError: if it cannot be read, is damaged, or of no architecture of transformers.
    """
    place = f"{argument}: {os.fspath(path_or_id)}"
    path = Path(path_or_id) / MODEL_CONFIG
    if path.is_file():
        read_model_config(path, argument)
    try:
        return transformers.AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"{place} has no config.json that can be read: {error}") from error
    except Exception as error:  # Of any kind: it is made of a stranger's values.
        raise ValueError(
            f"{place}: config.json is of no architecture that transformers "
            f"{transformers.__version__} has itself, and code of a checkpoint is never run "
            f"({type(error).__name__}: {error})"
        ) from error


def _architecture(config: Any) -> type[PreTrainedModel] | None:
    names = config.architectures or ()
    found = getattr(transformers, str(names[0]), None) if names else None
    # transformers has more than models by name: functions, too, which must not be called.
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def linear_modules(
    model: nn.Module, target_modules: str | Sequence[str] = "all-linear"
) -> dict[str, LinearModule]:
    """Linear layers that LoRA would adapt under `target_modules`, read as PEFT reads it.

    "all-linear" is every linear layer but the output head; another string a regular expression
    matched against the whole name; a sequence a choice of names or name endings.

    Raises:
        ValueError: if no layer matches, or the expression is broken.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    choice = target_modules if isinstance(target_modules, str) else frozenset(target_modules)
    found: dict[str, LinearModule] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _maps_rows(module):
            shape, transposed = whole_shape(module.weight), False
        elif isinstance(module, Conv1D):
            shape, transposed = whole_shape(module.weight)[::-1], True
        else:
            continue
        if _matches(name, choice, is_head=module is head):
            found[name] = LinearModule(name, shape[0], shape[1], transposed)
    if not found:
        raise ValueError(
            f"target_modules={target_modules!r} matches no linear layer of "
            f'{type(model).__name__}; use "all-linear" or names such as those in '
            "model.named_modules()"
        )
    return found


def _maps_rows(module: nn.Linear) -> bool:
    """Whether it does what nn.Linear does: a router may be one by class, and give more."""
    # A quantised layer is one, and running it may repack its weight.
    if type(module).forward is nn.Linear.forward or not is_plain(module.weight):
        return True
    weight = module.weight
    parameters = {
        f"module.{key}": whole_copy(own) for key, own in module.named_parameters() if is_split(own)
    }
    try:
        with torch.no_grad():
            given = torch.zeros(1, 1, module.in_features, dtype=weight.dtype, device=weight.device)
            found: Any = functional_call(_Unhooked(module), parameters, (given,))
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return False
    return isinstance(found, Tensor) and found.shape == (1, 1, module.out_features)


class _Unhooked(nn.Module):
    """A module without its hooks: those of `fully_shard` would look for its shards."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return type(self.module).forward(self.module, x)


def _matches(name: str, target_modules: str | Collection[str], *, is_head: bool) -> bool:
    if target_modules == "all-linear":
        return not is_head
    return is_chosen(name, target_modules)


def is_chosen(name: str, choice: str | Collection[str], argument: str = "target_modules") -> bool:
    """Whether a module is meant by a regular expression for whole names, or by one of its endings.

    `argument` is what the user gave the choice as. Of many endings make a set.

    Raises:
        ValueError: if the expression is broken.
    """
    if isinstance(choice, str):
        try:
            return re.fullmatch(choice, name) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{argument}: {choice!r} is no regular expression ({error}); correct it, or give a "
                "list of names or name endings"
            ) from None
    return any(ending in choice for ending in endings(name))
