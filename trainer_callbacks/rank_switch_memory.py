"""What `trainer_state.json` remembers of switches to low rank, for a resume."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

_KEY = "rank_switch"


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
            ValueError: if that was made with other options.
        """
        kept: Any = state.stateful_callbacks
        found = {}
        if state.global_step and _KEY in kept:
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
    """Whether a checkpoint was saved after a switch."""
    path = Path(checkpoint, TRAINER_STATE_NAME)
    if not path.is_file():
        return False
    kept = json.loads(path.read_text(encoding="utf-8")).get("stateful_callbacks", {}).get(_KEY)
    return bool(kept and any("reason" not in each for each in kept["attributes"]["done"]))
