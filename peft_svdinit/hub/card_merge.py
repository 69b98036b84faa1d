"""A card that exists, with our part of it replaced."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..analysis import escaped

BEGIN = "<!-- peft-svdinit: this part is written again by every push -->"
END = "<!-- peft-svdinit: end -->"
_HOLDS = re.compile(r"^<!-- peft-svdinit holds (?P<kind>[^:]+): (?P<files>.*) -->$", re.MULTILINE)
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*(?:\r?\n|\Z)", re.M | re.S)
_LICENCE = ("license", "license_name", "license_link")
# What its author may know better than we do.
_KEPT = (*_LICENCE, "pipeline_tag")


@dataclass(frozen=True)
class Card:
    """A README.md: its metadata, and the text below them."""

    metadata: dict[Any, Any] = field(default_factory=dict)
    body: str = ""

    @classmethod
    def read(cls, text: str | None) -> Card | None:
        """None of None.

        Raises:
            ValueError: if the metadata cannot be read, or the marks of our part are broken.
        """
        if text is None:
            return None
        front = _FRONT.match(text)
        try:
            metadata = yaml.safe_load(front["yaml"]) if front else {}
        except yaml.YAMLError as error:
            raise ValueError(f"card: the metadata of README.md is damaged: {error}") from error
        if not isinstance(metadata, dict | None):
            raise ValueError(f"card: the metadata of README.md is no mapping, but {metadata!r}")
        body = text[front.end() :] if front else text.removeprefix("\ufeff")
        if (body.count(BEGIN), body.count(END)) not in ((0, 0), (1, 1)) or (
            body.find(BEGIN) > body.find(END)
        ):
            raise ValueError(
                f"card: README.md must have the line {BEGIN!r} once, and {END!r} after it; mend "
                "the two, or delete both with what is between them"
            )
        return cls(metadata or {}, body)

    @property
    def is_unfilled(self) -> bool:
        """Whether nobody wrote a text: PEFT saves a template with every adapter."""
        template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
        added = ("### Framework versions", "- PEFT ")
        lines = [line for line in self.body.splitlines() if line.strip()]
        return all(line in template or line.startswith(added) for line in lines)

    @property
    def of_others(self) -> str:
        """What others wrote."""
        return self._with_part("").strip()

    @property
    def holds(self) -> tuple[str | None, list[str]]:
        """What the last push by this package put there: its kind, and the names of its files."""
        part = self.body.partition(BEGIN)[2].partition(END)[0]
        found = _HOLDS.search(part)
        return (found["kind"], found["files"].split(", ")) if found else (None, [])

    def _with_part(self, part: str) -> str:
        if BEGIN not in self.body:
            return f"{self.body.rstrip()}\n\n{part}\n"
        before, _, rest = self.body.partition(BEGIN)
        return f"{before}{part}{rest.partition(END)[2]}"

    def merged(self, data: Mapping[str, Any], text: str, title: str) -> str:
        """The whole card with `data` and `text` of ours, the latter in place of an earlier one.

        Args:
            data: metadata that is ours to say; of tags there may be more, and a licence and a
                pipeline that are there already stay.
            text: our part.
            title: of a card that nobody wrote yet.
        """
        # A command may quote our own marks.
        text = text.replace("<!-- peft-svdinit:", "<! -- peft-svdinit:")
        part = f"{BEGIN}\n\n{text}\n\n{END}"
        body = f"# {escaped(title)}\n\n{part}\n" if self.is_unfilled else self._with_part(part)
        known = self.metadata
        kept = {key: known[key] for key in _KEPT if known.get(key)}
        if "license" in kept:
            data = {key: value for key, value in data.items() if key not in _LICENCE}
        # PEFT writes a tag with the path of the base on the disk of whoever trained.
        tags = {t for t in _listed(known.get("tags")) if not str(t).startswith("base_model:")}
        tags |= set(data["tags"])
        merged = {**known, **data, **kept, "tags": sorted(tags, key=str)}
        front = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
        return f"---\n{front}---\n\n{body.lstrip()}"


def held(kind: str, files: Collection[str]) -> str:
    """The line by which a later push knows what this one put there."""
    return f"<!-- peft-svdinit holds {kind}: {', '.join(files)} -->"


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value or [])
