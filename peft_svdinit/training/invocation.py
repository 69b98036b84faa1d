"""The command that a run can be repeated by: all options of a file and of the command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Of options that say where results go and what they are called there, not what they are.
_LEFT_OUT = ("--config", "--push_to_hub", "--hub_", "--resume_from_checkpoint", "--dry_run")


def invocation(
    script: str, argv: Sequence[str], arguments: Sequence[str], values: Mapping[str, Any]
) -> str:
    """`recipes/<script> --option value …`, without a file of options, and without a token.

    Args:
        script: the recipe's file.
        argv: of the command line.
        arguments: what a file of options says, in the command line's form.
        values: what it says that no command line can.
    """
    given = [*arguments, *(f"--{n}={json.dumps(v)}" for n, v in values.items() if v is not None)]
    kept: list[str] = []
    for option, words in _grouped([*given, *argv]).items():
        if not option.startswith(_LEFT_OUT):
            kept += words
    return shlex.join([f"recipes/{Path(script).name}", *kept])


def launched(invocation: str, runs_as: Mapping[str, Any]) -> str:
    """The command with what starts its processes.

    Args:
        invocation: as above.
        runs_as: as `RunsAs.as_dict` has it.
    """
    processes = runs_as.get("processes") or 1
    if runs_as.get("wrapper") == "DeepSpeedEngine":
        file = f"recipes/accelerate/zero{runs_as.get('stage')}.yaml"
        return f"accelerate launch --config_file {file} --num_processes {processes} {invocation}"
    if processes > 1:
        return f"torchrun --nproc_per_node {processes} {invocation}"
    return f"python {invocation}"


def _grouped(words: Sequence[str]) -> dict[str, list[str]]:
    """Each option with its words; of an option given twice the last, which is what counts."""
    found: dict[str, list[str]] = {}
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
            found.pop(option, None)
            found[option] = [word]
        elif option:
            found[option].append(word)
    return found
