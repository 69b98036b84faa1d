"""The model card: what it is, how to load it, what was measured, how it was made, its limits."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from ..analysis import code, escaped, facts, fenced
from ..factors import FactorsFile
from ..files import is_local
from ..masks import load_mask
from .artefact import PLOT, Artefact
from .base_model import BaseModel
from .figures import Figures
from .publishable import command_without_paths, without_paths
from .usage import usage

TAG = "peft-svdinit"


def card_data(artefact: Artefact, base: BaseModel, figures: Figures) -> dict[str, Any]:
    """The metadata that is ours to say."""
    tags = {TAG, *artefact.kind.tags, f"base_model:{artefact.kind.relation}:{base.name}"}
    start = _start(artefact)
    tags |= {"lori"} if "LoRI" in start else {"svd-init"} if start else set()
    data: dict[str, Any] = {
        "base_model": base.name,
        "base_model_relation": artefact.kind.relation,
        "library_name": artefact.kind.library,
        "tags": sorted(tags),
        **base.licence,
    }
    dataset = figures.facts.get("dataset", "")
    if re.fullmatch(r"[\w-]+/[\w.-]+", dataset) and not is_local(dataset):
        data["datasets"] = [dataset]
    is_causal = artefact.config.get("task_type") == "CAUSAL_LM"
    return {**data, "pipeline_tag": "text-generation"} if is_causal else data


def card_text(
    artefact: Artefact,
    base: BaseModel,
    figures: Figures,
    repo_id: str,
    revision: str | None = None,
) -> str:
    """Our part of the card, as Markdown."""
    picture = f"![What was measured]({PLOT})" if figures.plot else ""
    measured = "\n\n".join(part for part in (figures.text, picture) if part)
    command, files = command_without_paths(figures.command or "", base)
    limits = [*figures.limits, *_limits(base, files)]
    sections = {
        "Use": usage(artefact, base, repo_id, revision),
        "What was measured": measured or "Nothing that was recorded.",
        "How it was made": _made(figures, command, base),
        "Limits": "\n".join(f"- {limit}" for limit in limits),
    }
    parts = [_summary(artefact, base)]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join(parts)


def _summary(artefact: Artefact, base: BaseModel) -> str:
    of = "fine-tuned from" if artefact.kind.name == "model" else "for"
    what = f"A {artefact.kind.name} {of} {_linked(base.name)}"
    if base.revision:
        what += f" at revision {code(base.revision)}"
    details = [_sizes(artefact), _start(artefact)]
    sentence = "; ".join(filter(None, [what, *details]))
    return f"{sentence}. Made with peft-svdinit {version(TAG)}."


def _linked(name: str) -> str:
    return f"[{escaped(name)}](https://huggingface.co/{quote(name)})"


def _sizes(artefact: Artefact) -> str:
    config = artefact.config
    if artefact.kind.name == "LoRA adapter":
        return escaped(f"rank {config.get('r')}, alpha {config.get('lora_alpha')}")
    if artefact.kind.name == "set of SVD factors":
        file = FactorsFile(artefact.folder, argument="folder")
        return f"{len(file)} layers, rank up to {max(map(file.rank_of, file))}"
    if artefact.kind.name == "LoRI mask":
        mask = load_mask(artefact.folder, argument="folder")
        return (
            f"{mask.kept:,} of {mask.size:,} entries of B in {len(mask.layers)} layers, density "
            f"{mask.density:g}, for the A of seed {mask.seed}"
        )
    return ""


def _start(artefact: Artefact) -> str:
    """How the adapter began, in words; nothing of a stock start."""
    options = artefact.options
    if options.get("config_class") == "SvdLoraConfig":
        return (
            f"started from an SVD (source {code(options.get('svd_source'))}, start "
            f"{code(options.get('svd_start'))})"
        )
    if options.get("config_class") == "LoriConfig":
        return escaped(
            f"LoRI: A drawn from seed {options.get('lori_seed')} and frozen, a share of "
            f"{options.get('lori_density')} of B trained"
        )
    return ""


def _made(figures: Figures, command: str, base: BaseModel) -> str:
    parts = []
    if command:
        parts += ["In a clone of peft-svdinit:", fenced(command, "bash")]
    parts.append(facts(without_paths(figures.facts, base)))
    return "\n\n".join(filter(None, parts))


def _limits(base: BaseModel, files: list[str]) -> list[str]:
    found = []
    if files:
        names = ", ".join(map(code, files))
        found.append(f"The command reads what only its author has: {names}.")
    if base.quantised_from:
        found.append(
            f"Trained and measured on a base that was quantised from {escaped(base.name)} and "
            "dequantised again: on the original itself the figures differ."
        )
    if not base.licence:
        found.append("The licence of the base is not stated here: see its own page.")
    return found
