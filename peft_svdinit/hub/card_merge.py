"""A card that exists, with our part of it replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

BEGIN = "<!-- peft-svdinit: this part is written again by every push -->"
END = "<!-- peft-svdinit: end -->"
# What its author may know better than we do.
_KEPT = ("license", "license_name", "license_link", "pipeline_tag", "base_model_relation")


def merged_card(existing: str | None, data: Mapping[str, Any], text: str, title: str) -> str:
    """The whole card.

    Args:
        existing: the card there is; None or PEFT's unfilled template is none.
        data: metadata that is ours to say; of tags there may be more, and a licence and a pipeline
            that are there already stay.
        text: our part.
        title: of a new card.

    Raises:
        ValueError: if the existing card's metadata cannot be read, or its marks of our part are
            broken.
    """
    ours = f"{BEGIN}\n\n{text}\n\n{END}"
    card = _read(existing or "")
    known = card.data.to_dict()
    if existing is None or is_unfilled(existing):
        body = f"# {title}\n\n{ours}\n"
    else:
        body = _replaced(card.text, ours)
    kept = {key: known[key] for key in _KEPT if known.get(key)}
    tags = sorted({*_listed(known.get("tags")), *_listed(data.get("tags"))})
    # PEFT writes a tag with the path of the base on the disk of whoever trained.
    stale = f"base_model:{data.get('base_model_relation')}:"
    tags = [tag for tag in tags if not tag.startswith(stale) or tag in data["tags"]]
    merged = ModelCardData(**{**known, **data, **kept, "tags": tags})
    return f"---\n{merged.to_yaml()}\n---\n\n{body.lstrip()}"


def is_unfilled(card: str) -> bool:
    """Whether a card is the template that PEFT saves with every adapter, with nothing filled in."""
    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    added = ("### Framework versions", "- PEFT ")
    lines = [line for line in _read(card).text.splitlines() if line.strip()]
    return all(line in template or line.startswith(added) for line in lines)


def without_our_part(card: str) -> str:
    """What of a card others wrote, its metadata left out."""
    text = _read(card).text
    return (_replaced(text, "") if BEGIN in text else text).strip()


def _read(card: str) -> ModelCard:
    try:
        return ModelCard(card)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"card: the metadata of README.md is damaged: {error}") from error


def _replaced(text: str, ours: str) -> str:
    if BEGIN not in text and END not in text:
        return f"{text.rstrip()}\n\n{ours}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after:
        raise ValueError(
            f"card: README.md must have the line {BEGIN!r} once, and {END!r} after it; mend the "
            "two, or delete both with what is between them"
        )
    return f"{before}{ours}{after}"


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
