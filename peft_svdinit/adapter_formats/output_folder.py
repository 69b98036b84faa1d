"""Whether a folder may be replaced by the adapter that is made of others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peft.utils import CONFIG_NAME


def check_output_folder(output: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError if `output` is an input or holds one, is a file, or holds no adapter.

    Args:
        output: the folder to write.
        inputs: folders and files of the adapters that are read.
    """
    target, read = output.resolve(), {path.resolve() for path in inputs}
    if target in read:
        raise ValueError(f"output must not be an input, got {output}; choose another name")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, but {output} is a file")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / CONFIG_NAME).is_file():
        raise ValueError(
            f"output must be a new folder, an empty one or an adapter's, which is replaced; "
            f"{output} is none of these"
        )
    # PEFT saves the second adapter of a model in a folder within that of the first.
    within = [path for path in read if target in path.parents]
    if within:
        raise ValueError(
            f"output must not hold an input, but {min(within)} is in {output}, which would be "
            "replaced; choose another name"
        )
