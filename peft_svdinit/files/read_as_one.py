"""Files that belong together are read together, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def read_together(path: Path, argument: str) -> Iterator[None]:
    """Around the reading of `path` and of what lies beside it.

    Args:
        path: one of the files, read within the context; it need not be there.
        argument: by which the user gave it.

    Raises:
        ValueError: in the end, if another file took the place of `path` meanwhile: what was read of
            the others may then be of another adapter, say.
    """
    before = _stamp(path)
    yield
    if _stamp(path) != before:
        raise ValueError(
            f"{argument}: {path.parent} was changed while it was read; run the same command again"
        )


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
