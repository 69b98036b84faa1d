"""The base model by the name that others know it by, and under which licence it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..factors import FactorsFile
from ..files import ask_hub, hub_id, is_local
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
        given: its id by the user, `user/name` or `user/name@revision`; it goes before what the
            artefact says.
        token: of the Hub.

    Raises:
        ValueError: if the artefact names none, or one of this disk that nobody else has.
        FileNotFoundError, PermissionError, ConnectionError: if `given` is not on the Hub.
    """
    recorded, revision = _recorded(artefact)
    if given is not None:
        if is_local(given):
            raise ValueError(f"base_model must be an id of the Hub, got the path {given}")
        name, of_given = hub_id(given, None, "base_model")
        licence = ask_hub(lambda: _licence(name, token), given, argument="base_model")
        return BaseModel(name, of_given, recorded, licence=licence)
    if not recorded:
        raise ValueError(
            f"folder: {artefact.folder} does not say what its base model is; name it by "
            "base_model=user/name"
        )
    found = _named(recorded, revision)
    try:
        licence = ask_hub(lambda: _licence(found.name, token), found.name, argument="base_model")
    except OSError as error:
        logger.warning("The licence of the base model is not known: %s", error)
        return found
    return BaseModel(found.name, found.revision, recorded, found.quantised_from, licence)


def _named(recorded: str, revision: str | None) -> BaseModel:
    original = original_of(recorded)
    if original:
        return BaseModel(original, None, recorded, quantised_from=True)
    if not is_local(recorded):
        name, named = hub_id(recorded, revision, "base_model")
        return BaseModel(name, named, recorded)
    parts = Path(recorded).parts
    # A snapshot in the cache of the Hub: models--user--name/snapshots/commit.
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        name = parts[-3].removeprefix("models--").replace("--", "/", 1)
        return BaseModel(name, parts[-1], recorded)
    raise ValueError(
        f"base_model: the base model is recorded as {recorded}, a path of this disk that nobody "
        "else has; name it as the Hub does, base_model=user/name"
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


def _licence(name: str, token: str | None) -> dict[str, Any]:
    card: Any = HfApi(token=token).model_info(name).card_data
    found = {key: getattr(card, key, None) for key in _LICENCE} if card else {}
    return {key: value for key, value in found.items() if value}
