"""Whether held-out examples were held out of an adapter's training too, by its run's record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_svdinit.training import DataOptions, read_run_info

_SPLITS = ("dataset_config", "train_split", "eval_split")
_DRAWN = ("eval_fraction", "split_seed")


def split_of(data: DataOptions) -> dict[str, Any]:
    """What decides the examples that are held out of a data set, as JSON values."""
    # Where the data set has a split for it, none is drawn.
    names = _SPLITS + (_DRAWN if data.eval_split is None else ())
    return {name: getattr(data, name) for name in names if getattr(data, name) is not None}


def held_out_note(folder: Path, data: DataOptions) -> str | None:
    """What is to be said of a loss on the held-out examples of `data`, None if nothing is.

    Args:
        folder: of the adapter, with the `run.json` of its training where this package trained it.
        data: that it is evaluated on.
    """
    try:
        trained: Mapping[str, Any] = read_run_info(folder)["extra"]
    except ValueError:
        trained = {}
    if trained.get("dataset", data.dataset_name) != data.dataset_name:
        return None
    if "dataset" not in trained or "train_split" not in trained:
        return (
            "whether it was trained on the held-out examples is not known: its folder does not say"
        )
    here = split_of(data)
    differing = [
        f"{name} {trained.get(name)!r}, here {here.get(name)!r}"
        for name in _SPLITS + _DRAWN
        if trained.get(name) != here.get(name)
    ]
    if not differing:
        return None
    return (
        "trained on another split of this data set, so that it may have learnt held-out examples "
        f"({'; '.join(differing)})"
    )
