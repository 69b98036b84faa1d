"""What a folder holds that can be shared, and which of its files belong to it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..adapters import EXPORT_REPORT, EXTRACTION_JSON, MERGE_JSON, RESIZE_REPORT
from ..analysis import COMPARISON_NUMBERS
from ..factors import FACTORS_FILE_NAME, SIDECAR_NAME, read_sidecar
from ..files import TensorFile, WrongKind, refuse_pickle
from ..low_rank import PLAN_NAME, read_plan
from ..masks import COMPACT_FILE_NAME, MASK_FILE_NAME
from ..models import (
    CONFIG_NAME,
    MODEL_CONFIG,
    WEIGHTS_NAME,
    adapted_module,
    read_adapter_config,
    read_model_config,
    refuse_endless_patterns,
    shard_index,
)
from ..training import RUN_INFO, TRAINING_LOG

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "merges.txt", "vocab.txt", "vocab.json", "tokenizer.model"),
)
RECORDS = (RUN_INFO, TRAINING_LOG, EXTRACTION_JSON, RESIZE_REPORT, MERGE_JSON, EXPORT_REPORT)
# What belongs to the card.
PLOT = "peft_svdinit_results.png"
SHOWN = (COMPARISON_NUMBERS, PLOT)
_ADAPTER = (CONFIG_NAME, WEIGHTS_NAME, SIDECAR_NAME, MASK_FILE_NAME, COMPACT_FILE_NAME)
_MODEL = (
    *(MODEL_CONFIG, "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *(_INDEX, PLAN_NAME, "low_rank.safetensors"),
)


@dataclass(frozen=True)
class Kind:
    """What is shared.

    Attributes:
        name: in a sentence.
        marker: the file by which a folder is of the kind.
        library: of the card's metadata.
        relation: to the base model, in the card's metadata.
        tags: of the card's metadata.
        files: patterns of the names that belong to it.
    """

    name: str
    marker: str
    library: str
    relation: str
    tags: tuple[str, ...]
    files: tuple[str, ...]


# A folder is of the first kind whose marker it has.
KINDS = (
    Kind("LoRA adapter", CONFIG_NAME, "peft", "adapter", ("lora",), (*_ADAPTER, *_TOKENIZER)),
    Kind("model", MODEL_CONFIG, "transformers", "finetune", (), (*_MODEL, *_TOKENIZER)),
    Kind(
        *("set of SVD factors", FACTORS_FILE_NAME, "peft-svdinit", "adapter"),
        *(("lora", "svd-factors"), (FACTORS_FILE_NAME, "svd_analysis_rank*.json")),
    ),
    Kind(
        *("compact LoRI adapter", COMPACT_FILE_NAME, "peft-svdinit", "adapter"),
        *(("lora", "lori"), (COMPACT_FILE_NAME, MASK_FILE_NAME)),
    ),
    Kind(
        *("LoRI mask", MASK_FILE_NAME, "peft-svdinit", "adapter"),
        *(("lora", "lori", "mask"), (MASK_FILE_NAME,)),
    ),
)


def is_own(name: str) -> bool:
    """Whether a push of this package may have written a file of the name, and may delete it."""
    own = (*(pattern for kind in KINDS for pattern in kind.files), *RECORDS, *SHOWN)
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in own)


@dataclass(frozen=True)
class Artefact:
    """A folder of one kind.

    Attributes:
        folder: where it is.
        kind: what it is.
        files: the names of its files that are shared.
        left_out: the other names, with the reason.
        config: `adapter_config.json` of an adapter, `config.json` of a model.
        options: of this package that an adapter was made with, `svdinit_config.json`.
    """

    folder: Path
    kind: Kind
    files: tuple[str, ...]
    left_out: dict[str, str]
    config: dict[str, Any]
    options: dict[str, Any]

    def has(self, name: str) -> bool:
        return name in self.files


def recognise(folder: str | os.PathLike) -> Artefact:
    """What is in `folder`.

    Raises:
        FileNotFoundError: if there is no such folder, or it holds nothing of these kinds.
        ValueError: if it holds pickles in place of safetensors, a damaged configuration, an
            adapter that is no LoRA, or not all shards of a model.
        WrongKind: if it is a file.
    """
    path = Path(folder).expanduser()
    if path.is_file():
        raise WrongKind(f"folder must be a folder, but {path} is a file; give the folder it is in")
    if not path.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {path}")
    entries = {entry.name: entry for entry in sorted(path.iterdir())}
    kind = next((kind for kind in KINDS if kind.marker in entries), None)
    if kind is None:
        markers = ", ".join(kind.marker for kind in KINDS)
        raise FileNotFoundError(
            f"folder: {path} holds nothing to share: none of {markers} is in it"
        )
    _refuse_pickled_weights(kind, entries)
    patterns = (*kind.files, *RECORDS)
    files = tuple(
        name
        for name, entry in entries.items()
        if entry.is_file()
        and not leads_out(entry)
        and re.fullmatch(r"[\w.-]+", name)
        and any(fnmatchcase(name, pattern) for pattern in patterns)
    )
    reasons = {name: _reason(entry) for name, entry in entries.items() if name not in files}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    readers = {CONFIG_NAME: read_adapter_config, MODEL_CONFIG: read_model_config}
    read = readers.get(kind.marker)
    config = read(path / kind.marker, "folder") if read else {}
    options = read_sidecar(path / SIDECAR_NAME, "folder") if SIDECAR_NAME in files else {}
    if kind.marker == CONFIG_NAME and config.get("peft_type") != "LORA":
        raise ValueError(
            f"folder: {path} holds an adapter of type {config.get('peft_type')}, only LORA is "
            "shared by this package; PEFT's own push_to_hub takes it"
        )
    if kind.marker == CONFIG_NAME:
        names = map(adapted_module, TensorFile(path / WEIGHTS_NAME, "folder").shapes)
        refuse_endless_patterns(config, names, f"folder: {path / CONFIG_NAME}: ")
    if PLAN_NAME in files:
        read_plan(path, "folder")
    if _INDEX in files:
        missing = sorted(set(shard_index(path, "folder").values()) - set(files))
        if missing:
            raise ValueError(f"folder: {path} lacks {', '.join(missing)}, of which {_INDEX} tells")
    return Artefact(path, kind, files, left_out, config, options)


def _refuse_pickled_weights(kind: Kind, entries: dict[str, Path]) -> None:
    weights = {CONFIG_NAME: WEIGHTS_NAME, MODEL_CONFIG: "model*.safetensors"}.get(kind.marker)
    if weights is None or any(fnmatchcase(name, weights) for name in entries):
        return
    stem = "adapter_model" if kind.marker == CONFIG_NAME else "pytorch_model"
    for name, entry in entries.items():
        if name.startswith(stem):
            refuse_pickle(entry, "folder")
    raise FileNotFoundError(f"folder: {next(iter(entries.values())).parent} has no {weights}")


def leads_out(entry: Path) -> bool:
    """Whether it links what is not in the folder; a snapshot of the cache links its blobs."""
    folder, target = entry.parent.resolve(), entry.resolve()
    snapshot = folder.parent.name == "snapshots"
    allowed = [folder, *([folder.parents[1] / "blobs"] if snapshot else [])]
    return not any(target.is_relative_to(place) for place in allowed)


def _reason(entry: Path) -> str:
    """Why a file stays here; nothing of what nobody would miss."""
    if entry.name.startswith(".") or entry.name == "README.md":
        return ""
    if any(fnmatchcase(entry.name, pattern) for pattern in _PICKLES):
        return "a pickle"
    if leads_out(entry):
        return "a link out of the folder"
    return "a folder" if entry.is_dir() else "no part of it"
