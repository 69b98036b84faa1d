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
    """The switches of a run.

    Attributes:
        rules: when and what, as JSON: a resumed run must have the same.
        done: the switches so far.
        stable_ranks: of each layer, at each epoch that has ended.
    """

    rules: list[Any]
    done: list[dict[str, Any]] = field(default_factory=list)
    stable_ranks: list[dict[str, float]] = field(default_factory=list)

    def keep(self, state: TrainerState) -> None:
        """Put it where the next checkpoint takes it from."""
        # Not as an ExportableState: from that the Trainer would make a new callback, which knows
        # neither the Trainer nor the batches.
        kept: Any = state.stateful_callbacks
        kept[_KEY] = {
            "args": {},
            "attributes": {
                "rules": self.rules,
                "done": self.done,
                "stable_ranks": self.stable_ranks,
            },
        }

    def recall(self, state: TrainerState) -> None:
        """Take what the checkpoint has, if training goes on from one.

        Raises:
            ValueError: if that was made with other rules.
        """
        self.done, self.stable_ranks = [], []
        kept: Any = state.stateful_callbacks
        if not state.global_step or _KEY not in kept:
            return
        found = kept[_KEY]["attributes"]
        if found["rules"] != json.loads(json.dumps(self.rules)):
            raise ValueError(
                f"the checkpoint was made with other switches than this callback's: "
                f"{found['rules']} there, {self.rules} here; give the callback what it had"
            )
        self.done = [dict(each) for each in found["done"]]
        self.stable_ranks = [dict(each) for each in found["stable_ranks"]]


def was_switched(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was saved after a switch."""
    path = Path(checkpoint, TRAINER_STATE_NAME)
    if not path.is_file():
        return False
    kept = json.loads(path.read_text(encoding="utf-8"))["stateful_callbacks"].get(_KEY)
    return bool(kept and kept["attributes"]["done"])
