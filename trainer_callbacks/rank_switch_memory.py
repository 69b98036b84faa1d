"""What `trainer_state.json` remembers of switches to low rank, for a resume."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from peft_svdinit.files import Count, read_json, validated

_KEY = "rank_switch"


class _Attributes(msgspec.Struct):
    options: dict[str, Any]
    done: list[dict[str, Any]]
    epoch: Count = 0
    stable_ranks: list[dict[str, float]] = []
    groups: str = ""


class _Kept(msgspec.Struct):
    attributes: _Attributes


class _Callbacks(msgspec.Struct):
    rank_switch: _Kept | None = None


class _State(msgspec.Struct):
    stateful_callbacks: _Callbacks = msgspec.field(default_factory=_Callbacks)


@dataclass
class Memory:
    """The stages of a run.

    Attributes:
        options: as JSON; a resumed run must have the same.
        done: the stages so far, each with its step, and with a reason if it changed nothing.
        epoch: the last epoch at whose end stable ranks were taken, or a stage was due.
        stable_ranks: of each layer, at each epoch since the last stage.
        groups: digest of the names in the optimizer's groups after the last stage.
    """

    options: dict[str, Any]
    done: list[dict[str, Any]] = field(default_factory=list)
    epoch: int = 0
    stable_ranks: list[dict[str, float]] = field(default_factory=list)
    groups: str = ""

    def keep(self, state: TrainerState) -> None:
        """Put it where the next checkpoint takes it from."""
        # Not as an ExportableState: from that the Trainer would make a new callback, which knows
        # neither the Trainer nor the batches.
        kept: Any = state.stateful_callbacks
        kept[_KEY] = {"args": {}, "attributes": dict(vars(self))}

    def recall(self, state: TrainerState) -> None:
        """Take what the checkpoint has, if training goes on from one.

        Raises:
            ValueError: if that was made with other options, or is damaged.
        """
        kept: Any = state.stateful_callbacks
        found = {}
        if state.global_step and _KEY in kept:
            place = f"{TRAINER_STATE_NAME} of the checkpoint: stateful_callbacks.{_KEY}."
            validated(kept[_KEY], _Kept, place)
            found = kept[_KEY]["attributes"]
            mine = json.loads(json.dumps(self.options))
            other = [name for name in mine if mine[name] != found["options"].get(name)]
            if other:
                raise ValueError(
                    "the checkpoint was made with other switches than this callback's: "
                    f"{other[0]} is {found['options'].get(other[0])} there and {mine[other[0]]} "
                    "here; give the callback what it had"
                )
        self.done = [dict(each) for each in found.get("done", [])]
        self.epoch = found.get("epoch", 0)
        self.stable_ranks = [dict(each) for each in found.get("stable_ranks", [])]
        self.groups = found.get("groups", "")


def was_switched(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was saved after a switch.

    Raises:
        ValueError: if its state is damaged.
    """
    path = Path(checkpoint, TRAINER_STATE_NAME)
    if not path.is_file():
        return False
    # Losses that are not finite are in it as Python writes them.
    state = validated(
        read_json(path, "checkpoint", constants=True), _State, f"checkpoint: {path}: "
    )
    kept = state.stateful_callbacks.rank_switch
    return kept is not None and any("reason" not in each for each in kept.attributes.done)
