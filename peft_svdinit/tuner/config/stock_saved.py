"""Configurations that are saved as the stock LoRA that their adapter is."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from huggingface_hub import hf_hub_download
from peft import LoraConfig

from ...factors import SIDECAR_NAME, read_sidecar
from ...files import fetched_file, is_local, write_json

_KIND = "config_class"
_Config = TypeVar("_Config", bound="StockSavedConfig")
_DOWNLOAD_OPTIONS = inspect.signature(hf_hub_download).parameters.keys() - {
    "repo_id",
    "filename",
    "dry_run",
}


@dataclass
class StockSavedConfig(LoraConfig):
    """A LoraConfig with a start of its own, saved as a stock one with a sidecar beside it."""

    init_marker: ClassVar[str]
    """`init_lora_weights` of the configuration in memory. Stock PEFT refuses this value by name,
    where it would silently start at random from True: in a mixed model, say."""

    @property
    def begins_at_base(self) -> bool:
        """Whether the model with the untrained adapter computes what the base alone does."""
        return True

    def mark(self) -> None:
        """Put the marker into `init_lora_weights`.

        Raises:
            ValueError: if it asks for another start, or an option replaces LoRA's update.
        """
        if self.init_lora_weights not in (True, self.init_marker):
            raise ValueError(
                f"init_lora_weights must stay True in a {type(self).__name__}, which initialises "
                f"the adapter, got {self.init_lora_weights!r}"
            )
        others = ", ".join(_other_variants(self))
        if others:
            raise ValueError(
                f"{others} cannot be combined with a {type(self).__name__}: the update of the "
                "layers would not be B A; leave one of the two out"
            )
        self.init_lora_weights = self.init_marker  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def as_stock_start(self) -> Iterator[None]:
        """While PEFT creates the layers, let it give them its default start."""
        self.init_lora_weights = True
        try:
            yield
        finally:
            self.init_lora_weights = self.init_marker  # pyright: ignore[reportAttributeAccessIssue]

    def stock(self) -> LoraConfig:
        """The LoraConfig of the saved adapter."""
        return LoraConfig(**{**lora_options(self), "init_lora_weights": True})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` of a stock LoRA and the sidecar with all options."""
        self.stock().save_pretrained(save_directory, **kwargs)
        options = {key: value for key, value in asdict(self).items() if key != "runtime_config"}
        options = {k: sorted(v) if isinstance(v, set) else v for k, v in options.items()}
        write_json(Path(save_directory) / SIDECAR_NAME, {_KIND: type(self).__name__, **options})

    @classmethod
    def from_pretrained(
        cls: type[_Config],
        pretrained_model_name_or_path: str,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> _Config:
        """The config that an adapter was saved with, from its sidecar.

        Options in it that this version does not know are ignored with a warning, as PEFT does.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or its repository of the Hub.
            subfolder: where in it the adapter is.
            kwargs: of `huggingface_hub.hf_hub_download`: revision, token, cache_dir and so on. A
                folder on this disk is read without them.

        Raises:
            ValueError: if there is no sidecar of this class, LoraConfig.from_pretrained reads any
                adapter; or if its options are none that make such a config.
            TypeError: if an argument is none of these.
        """
        cls._check_arguments(kwargs)
        source = os.path.join(pretrained_model_name_or_path, subfolder or "")
        try:
            path = adapter_file(pretrained_model_name_or_path, SIDECAR_NAME, subfolder, kwargs)
            options = read_sidecar(path, SIDECAR_NAME)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(
                f"{source} has no {SIDECAR_NAME}: it was not saved by a {cls.__name__}, or cannot "
                "be reached; LoraConfig.from_pretrained reads it as the stock LoRA it is"
            ) from error
        kind = options.pop(_KIND, None)
        if kind != cls.__name__:
            raise ValueError(f"{source} was saved by a {kind}, not by a {cls.__name__}")
        known = {entry.name for entry in fields(cls) if entry.init}
        unknown = sorted(options.keys() - known)
        if unknown:
            warnings.warn(
                f"{path} has options that this {cls.__name__} does not know, which are ignored: "
                f"{', '.join(unknown)}. It was probably saved under a newer PEFT "
                f"({options.get('peft_version')}) or peft_svdinit; upgrade before you go on",
                stacklevel=2,
            )
        try:
            return cls(**{key: value for key, value in options.items() if key in known})
        except Exception as error:  # Of any kind: PEFT makes of a file's values what it can.
            raise ValueError(
                f"{SIDECAR_NAME}: {path} has options that make no {cls.__name__}: {error}"
            ) from error

    @classmethod
    def _check_arguments(cls, given: Mapping[str, Any]) -> None:
        """Raise TypeError for what `from_pretrained` would not use."""
        options = {entry.name for entry in fields(cls) if entry.init}
        for name in sorted(given.keys() - _DOWNLOAD_OPTIONS):
            close = get_close_matches(name, sorted(options | _DOWNLOAD_OPTIONS), n=1)
            meant = close[0] if close else name
            message = f"{cls.__name__}.from_pretrained() got an unexpected argument {name!r}"
            if meant != name:
                message += f", did you mean {meant!r}?"
            if meant in options - _DOWNLOAD_OPTIONS:
                message += (
                    "; the options of the adapter are those it was saved with: change them on "
                    f"what is returned, dataclasses.replace(config, {meant}=...)"
                )
            raise TypeError(message)


def adapter_file(
    name_or_path: str | os.PathLike,
    file_name: str,
    subfolder: str | None = None,
    download: Mapping[str, Any] | None = None,
) -> Path:
    """Where a file of a saved adapter is on this disk, fetched if the adapter is on the Hub.

    Args:
        name_or_path: the adapter's folder, or its repository of the Hub.
        file_name: the file.
        subfolder: where in it the adapter is.
        download: further arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: if the Hub has no such file, or cannot be reached. A file of a local
            folder need not exist.
        PermissionError, ConnectionError: if the Hub does not give it.
    """
    if is_local(name_or_path):
        return Path(name_or_path, subfolder or "", file_name).expanduser()
    options = {"subfolder": subfolder, **(download or {})}
    revision = options.pop("revision", None)
    return fetched_file(name_or_path, file_name, argument="adapter", revision=revision, **options)


def path_text(option: str, value: str | os.PathLike, remedy: str) -> str:
    """The string that JSON can hold of a path or Hub id.

    Raises:
        TypeError: if `value` is neither; the message ends with `remedy`.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(
            f"{option} must be a path or Hub id, so that the config can be saved, got "
            f"{type(value).__name__}; {remedy}"
        )
    return text


def _other_variants(config: LoraConfig) -> list[str]:
    """Options in use that replace LoRA's update; under DoRA and aLoRA it still begins at B A."""
    return [
        entry.name
        for entry in fields(LoraConfig)
        if entry.metadata.get("is_lora_variant")
        and entry.name not in ("use_dora", "alora_invocation_tokens")
        and getattr(config, entry.name)
    ]


def lora_options(config: LoraConfig) -> dict[str, Any]:
    """What a LoraConfig was made with, the fields of subclasses left out."""
    return {entry.name: getattr(config, entry.name) for entry in fields(LoraConfig) if entry.init}
