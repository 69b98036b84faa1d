"""Training arguments of recipes that make many runs: progress bars only where somebody looks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from peft_svdinit.training import RecipeArguments


@dataclass
class QuietArguments(RecipeArguments):
    """All of transformers' TrainingArguments."""

    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "No progress bars; by default where there is no terminal."}
    )

    def __post_init__(self) -> None:
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        super().__post_init__()
