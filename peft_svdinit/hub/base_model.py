"""The base model by the name that others know it by, and under which licence it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..factors import FactorsFile
from ..files import ask_hub, is_local, split_revision
from ..masks import load_compact, load_mask
from ..training import original_of
from .artefact import Artefact

logger = logging.getLogger(__name__)

_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseModel:
    """A base model of the Hub.

    Attributes:
        name: its id.
        revision: the commit that was used, where that is known.
        recorded: what the artefact itself calls it, a path of this disk perhaps.
        quantised_from: whether the one used was quantised from it, as the embedded model is.
        licence: `license`, `license_name` and `license_link` of its card, as far as they are there.
    """

    name: str
    revision: str | None = None
    recorded: str | None = None
    quantised_from: bool = False
    licence: dict[str, Any] = field(default_factory=dict)


def find_base(artefact: Artefact, given: str | None, token: str | None = None) -> BaseModel:
    """The base of an artefact.

    Args:
        artefact: what is shared.
        given: the base by the user, as `named_base` takes it; it goes before what the artefact
            says.
        token: of the Hub.

    Raises:
        ValueError: if neither names one, or as `named_base`.
        FileNotFoundError, PermissionError, ConnectionError: as `base_on_hub`.
    """
    recorded, revision = _recorded(artefact)
    for value in (recorded, revision):
        if not isinstance(value, str | None):
            raise ValueError(f"folder: {artefact.folder} names {value!r} as its base model")
    source = given or recorded
    if not source:
        raise ValueError(
            f"folder: {artefact.folder} does not say what its base model is; name it as the Hub "
            "does, base_model=user/name"
        )
    base = base_on_hub(source, token)
    if recorded and not is_local(recorded) and split_revision(recorded)[0] != base.name:
        logger.warning("The base model is recorded as %s, and shared as %s.", recorded, base.name)
    same = recorded is not None and split_revision(recorded)[0] == base.name
    return replace(
        base, recorded=recorded or source, revision=base.revision or (revision if same else None)
    )


def base_on_hub(source: str, token: str | None = None) -> BaseModel:
    """As `named_base`, with its licence.

    Raises:
        ValueError: as `named_base`.
        FileNotFoundError, PermissionError: if the Hub has no such model or revision, or hides it;
            the original of a `builtin:` model need not be there.
        ConnectionError: if the Hub does not answer.
    """
    base = named_base(source)
    name = f"{base.name}@{base.revision}" if base.revision else base.name
    try:
        licence = ask_hub(lambda: _licence(base, token), name, argument="base_model", use="read")
    except OSError as error:
        if not base.quantised_from:
            raise
        logger.warning("The licence of the base model is not known: %s", error)
        licence = {}
    return replace(base, licence=licence)


def named_base(source: str) -> BaseModel:
    """The base model of the Hub that `source` is: `user/name`, `user/name@revision`, or a snapshot
    in its cache; of a `builtin:` model the one that it was quantised from.

    Raises:
        ValueError: if it is another path of this disk.
    """
    original = original_of(source)
    if original:
        return BaseModel(original, quantised_from=True)
    if not is_local(source):
        return BaseModel(*split_revision(source))
    parts = Path(source).parts
    # models--user--name/snapshots/commit
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return BaseModel(parts[-3].removeprefix("models--").replace("--", "/", 1), parts[-1])
    raise ValueError(
        f"base_model: the base model is {source}, a path of this disk that nobody else has; name "
        "it as the Hub does, base_model=user/name"
    )


def _recorded(artefact: Artefact) -> tuple[str | None, str | None]:
    folder = artefact.folder
    if artefact.kind.name == "LoRA adapter":
        return artefact.config.get("base_model_name_or_path"), artefact.config.get("revision")
    if artefact.kind.name == "model":
        return artefact.config.get("_name_or_path"), None
    if artefact.kind.name == "set of SVD factors":
        metadata = FactorsFile(folder, argument="folder").metadata
        return metadata.base_model_name_or_path, metadata.base_model_revision
    if artefact.kind.name == "LoRI mask":
        return load_mask(folder, argument="folder").base_model_name_or_path, None
    compact = load_compact(folder, argument="folder")
    return compact.config.get("base_model_name_or_path"), compact.config.get("revision")


def _licence(base: BaseModel, token: str | None) -> dict[str, Any]:
    card: Any = HfApi(token=token).model_info(base.name, revision=base.revision).card_data
    found = {key: getattr(card, key, None) for key in _LICENCE} if card else {}
    return {key: value for key, value in found.items() if value}
