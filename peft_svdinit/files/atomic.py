"""Writing a file so that a kill at any moment leaves the old content or the new, never a half."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .workspaces import workspace


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path on the same disk, to write a file at: in the end it is at `path`.

    After an error there is what was there before. `publishing` does the same for several files.
    """
    target = Path(path)
    with workspace(target.parent, target.name) as place:
        temporary = place / target.name
        yield temporary
        os.replace(temporary, target)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
