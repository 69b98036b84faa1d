"""Saved adapters of any kind on one base model, one at a time; the base is as it was after each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from peft_svdinit.adapters import load_stock_adapter
from peft_svdinit.factors import INITS_MOVING_BASE, base_samples, check_base_of_adapter
from peft_svdinit.files import TensorFile, is_local, resolve_file, resolve_folder
from peft_svdinit.models import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    linear_modules,
    lora_key,
    read_adapter_config,
)

BASE = "base"
_ARGUMENT = "adapters"
_LONGEST = 300  # characters of an error of PEFT, which may name every layer


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on the disk, by the name that the table gives it."""

    name: str
    source: str
    folder: Path
    argument: str = _ARGUMENT

    @property
    def place(self) -> str:
        """What messages begin with."""
        return f"{self.argument}: {self.source}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """`adapter_config.json`."""
        return read_adapter_config(self.folder / CONFIG_NAME, self.argument)

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Of its tensors, by key."""
        return {
            key: list(shape)
            for key, shape in TensorFile(self.folder / WEIGHTS_NAME, self.argument).shapes.items()
        }

    @property
    def base(self) -> str | None:
        """What it calls its base model."""
        return self.config.get("base_model_name_or_path")

    @property
    def base_revision(self) -> str | None:
        """Of its base model on the Hub, where it says so."""
        return self.config.get("revision")

    @property
    def moves_base(self) -> bool:
        """Whether PEFT changes the base's weights as it loads the adapter, as PiSSA does."""
        start = self.config.get("init_lora_weights")
        return isinstance(start, str) and start.lower().startswith(INITS_MOVING_BASE)

    def describe(self) -> dict[str, Any]:
        """What tells it from others, as JSON values."""
        numbers = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        digest = hashlib.sha256((self.folder / WEIGHTS_NAME).read_bytes()).hexdigest()
        kind = {"peft_type": self.config.get("peft_type"), "rank": self.config.get("r")}
        found = {"source": self.source, **kind, "parameters": numbers, "sha256": digest}
        if self.moves_base:
            found["note"] = (
                f"initialised with {self.config['init_lora_weights']!r}, which PEFT repeats on the "
                "base as it loads the adapter"
            )
        return found


def find_adapters(specs: Sequence[str]) -> list[SavedAdapter]:
    """The adapters of `path`, `name=path` and Hub ids, whose last part is the name without one.

    Raises:
        FileNotFoundError: if there is no such folder or repository.
        ValueError: if one is no adapter of a causal language model or a pickle, or two share a
            name.
    """
    found: dict[str, SavedAdapter] = {}
    for spec in specs:
        given, equals, source = spec.partition("=")
        # The equals sign may be one of a folder's name.
        if not equals or Path(spec).expanduser().is_dir():
            given, source = "", spec
        name = given or Path(source).name.partition("@")[0]
        if name in found or name == BASE:
            other = found[name].source if name in found else "the base model's row"
            raise ValueError(
                f"{_ARGUMENT}: {source} and {other} are both called {name!r}; give another name "
                f"before it: other={source}"
            )
        found[name] = find_adapter(source, name)
    return list(found.values())


def find_adapter(source: str, name: str, argument: str = _ARGUMENT) -> SavedAdapter:
    """The adapter in a folder or Hub repository.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no adapter of a causal language model, or a pickle.
    """
    folder = resolve_folder(source, argument=argument)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{argument}: {source} is no adapter, it has no {CONFIG_NAME}")
    # Of the Hub, pickles are not fetched, but named.
    resolve_file(folder if is_local(source) else source, WEIGHTS_NAME, argument=argument)
    adapter = SavedAdapter(name, source, folder, argument)
    task = adapter.config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        whole = ", ".join(adapter.config.get("modules_to_save") or []) or "none"
        raise ValueError(
            f"{adapter.place} has task_type {task} (modules_to_save: {whole}); only adapters "
            "of causal language models predict tokens"
        )
    adapter.describe()  # What cannot be described is refused before anything is measured.
    return adapter


def check_adapters(
    base: Any, adapters: Sequence[SavedAdapter], names: Sequence[str], *, check_base: bool
) -> None:
    """Refuse adapters of another base model, by their shapes and by what they say of it.

    Args:
        base: the model.
        adapters: to be attached to it.
        names: what the base is called, its folder first.
        check_base: whether to compare what an adapter says, see `check_base_of_adapter`.

    Raises:
        ValueError: naming the adapter and the layer or both bases.
    """
    layers = linear_modules(base)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    strangers = [one for one in adapters if check_base and one.base not in names]
    samples = base_samples(base, layers) if strangers else {}
    for adapter in adapters:
        for name, (rows, cols) in shapes.items():
            sizes = adapter.shapes.get(lora_key(name, "A")), adapter.shapes.get(lora_key(name, "B"))
            if sizes[0] and sizes[1] and (sizes[1][0], sizes[0][-1]) != (rows, cols):
                raise ValueError(
                    f"{adapter.place} is of another base model than {names[-1]!r}: it adapts "
                    f"{name} as {sizes[1][0]} x {sizes[0][-1]}, which is {rows} x {cols} here"
                )
        if adapter in strangers:
            check_base_of_adapter(adapter.base, names, samples, shapes, place=adapter.place)


@contextmanager
def attached(base: Any, adapter: SavedAdapter) -> Iterator[PeftModel]:
    """The base with an adapter as PEFT loads it, for a while; the same bits of a base afterwards.

    Where PEFT changes the base's weights for it, a copy of them is kept meanwhile.

    Raises:
        ValueError: if PEFT cannot load it.
    """
    kept: dict[str, torch.Tensor] = {}
    if adapter.moves_base:
        kept = {name: one.detach().clone() for name, one in base.named_parameters()}
    flags = {name: one.requires_grad for name, one in base.named_parameters()}
    # PEFT takes its layers off, and leaves modules that the adapter stores whole.
    children = {module: dict(module._modules) for module in base.modules()}
    try:
        model = load_stock_adapter(base, adapter.folder)
    except ValueError as error:
        said = str(error).removeprefix("adapter: ")
        raise ValueError(f"{adapter.place}: {said[:_LONGEST]}") from error
    try:
        yield model.eval()
    finally:
        # Of virtual tokens, which change no module, there is nothing to take off.
        unload: Any = getattr(model.base_model, "unload", None)
        if unload is not None:
            unload()
        for module, own in children.items():
            module._modules.update(own)
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                parameter.requires_grad_(flags[name])
                if name in kept:
                    parameter.copy_(kept[name])
