"""The base model by the name that others know it by, and under which licence it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
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
        given: the base by the user, as `named_base` takes it; it goes before what the artefact
            says.
        token: of the Hub.

    Raises:
        ValueError: if neither names one, or as `named_base`.
        FileNotFoundError, PermissionError, ConnectionError: if a `given` id is not on the Hub.
    """
    recorded, revision = _recorded(artefact)
    source = given or recorded
    if not source:
        raise ValueError(
            f"folder: {artefact.folder} does not say what its base model is; name it as the Hub "
            "does, base_model=user/name"
        )
    base = named_base(source, None if given else revision)
    try:
        licence = ask_hub(lambda: _licence(base.name, token), base.name, argument="base_model")
    except OSError as error:
        if given == base.name:
            raise
        logger.warning("The licence of the base model is not known: %s", error)
        licence = {}
    return replace(base, recorded=recorded or source, licence=licence)


def named_base(source: str, revision: str | None = None) -> BaseModel:
    """The base model of the Hub that `source` is: `user/name`, `user/name@revision`, or a snapshot
    in its cache; of a `builtin:` model the one that it was quantised from.

    Raises:
        ValueError: if it is another path of this disk.
    """
    original = original_of(source)
    if original:
        return BaseModel(original, quantised_from=True)
    if not is_local(source):
        return BaseModel(*hub_id(source, revision, "base_model"))
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


def _licence(name: str, token: str | None) -> dict[str, Any]:
    card: Any = HfApi(token=token).model_info(name).card_data
    found = {key: getattr(card, key, None) for key in _LICENCE} if card else {}
    return {key: value for key, value in found.items() if value}
