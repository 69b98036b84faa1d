"""The command that a run can be repeated by: all options of a file and of the command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMENT = "  # in a file of options: "
# Options that say where results go and what they are called there, not what they are.
_LEFT_OUT = ("--config", "--push_to_hub", "--resume_from_checkpoint")
_LEFT_OUT_PREFIXES = ("--hub_", "--dry_run")


def invocation(
    script: str, argv: Sequence[str], arguments: Sequence[str], values: Mapping[str, Any]
) -> str:
    """`recipes/<script> --option value …`, without a file of options, and without a token.

    What no command line can say, null for one, stands in a comment behind it.

    Args:
        script: the recipe's file.
        argv: of the command line.
        arguments: what a file of options says, in the command line's form.
        values: what it says that no command line can.
    """
    said = {name: value for name, value in values.items() if isinstance(value, dict)}
    given = [*arguments, *(f"--{name}={json.dumps(value)}" for name, value in said.items())]
    kept: list[str] = []
    options = _grouped([*given, *argv])
    for option, words in options.items():
        if option not in _LEFT_OUT and not option.startswith(_LEFT_OUT_PREFIXES):
            kept += words
    command = shlex.join([f"recipes/{Path(script).name}", *kept])
    unsaid = [name for name in values if name not in said and f"--{name}" not in options]
    listed = ", ".join(f"{name}: {json.dumps(values[name])}" for name in unsaid)
    return f"{command}{COMMENT}{listed}" if unsaid else command


def launched(invocation: str, runs_as: Mapping[str, Any]) -> str:
    """The command with what starts its processes.

    Args:
        invocation: as above.
        runs_as: as `RunsAs.as_dict` has it.
    """
    processes, wrapper = runs_as.get("processes") or 1, str(runs_as.get("wrapper"))
    if wrapper == "DeepSpeedEngine":
        offload = "_offload" if runs_as.get("offloaded") else ""
        file = f"zero{runs_as.get('stage')}{offload}"
    elif wrapper.startswith(("FSDP", "FullySharded")):
        file = "fsdp2"
    elif processes > 1:
        return f"torchrun --nproc_per_node {processes} {invocation}"
    else:
        return f"python {invocation}"
    options = f"--config_file recipes/accelerate/{file}.yaml --num_processes {processes}"
    return f"accelerate launch {options} {invocation}"


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
