"""Whether results can be written where they are to go, looked up before there are any."""

from __future__ import annotations

import os
from pathlib import Path


def check_output(folder: str | os.PathLike, argument: str = "output_dir") -> None:
    """Raise ValueError unless the folder can be written to, or made; nothing is.

    Args:
        folder: where results are to go.
        argument: by which the user gave it; the messages of errors begin with it.
    """
    path = Path(folder).expanduser().absolute()
    for place in (path, *path.parents):
        try:
            os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{argument}: {folder} cannot be made: {error.strerror}") from error
        if not place.is_dir():
            raise ValueError(f"{argument}: {folder} cannot be a folder, {place} is none")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(
                f"{argument}: {folder} cannot be written to, you have no right to write in {place}"
            )
        return
