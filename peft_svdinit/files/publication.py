"""Several files that appear in a folder together: the result of one command."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .workspaces import NEW, OLD, clean, clean_once, publishing_name, workspace

# Seconds, for which another process may be moving its files into the same folder.
_PATIENCE = 60.0


@contextmanager
def publishing(folder: str | os.PathLike, replaces: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder; what is written there is in `folder` in the end, all of it together.

    A folder that is not there yet appears with one rename. In one that exists, entries of the same
    names are moved out of the way before the first new one is moved in. A kill in between leaves
    files missing, until the next publication to the folder finishes the one that was killed, but
    never new files beside old ones. After an error everything is as it was.

    Args:
        folder: made if it does not exist. Its other entries stay.
        replaces: names of entries that go, too, such as figures of an earlier result.

    Raises:
        OSError: if the disk is full, `folder` is a file, or another process is moving its files
            into it for longer than a minute.
    """
    target = Path(folder).resolve()
    exists = target.is_dir()
    for each in (target.parent, target):
        if each.is_dir():
            clean_once(each)
    # Within a folder that exists: its parent may be of another disk, or not ours to write.
    with workspace(target if exists else target.parent, target.name) as place:
        new = place / NEW
        new.mkdir()
        (place / OLD).mkdir()  # Before the workspace is known by its other name.
        yield new
        if exists or not _took_name(new, target):
            names = {*os.listdir(new), *replaces}
            place = _alone(place, target)
            _move_in(place, target, names)
            shutil.rmtree(place, ignore_errors=True)


def _took_name(new: Path, target: Path) -> bool:
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False  # Another process was faster.
        raise
    return True


def _alone(place: Path, target: Path) -> Path:
    """The workspace under the name that one process at a time can give it."""
    chosen, end = target / publishing_name(target), time.monotonic() + _PATIENCE
    while True:
        try:
            return place.rename(chosen)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if clean(chosen):
            continue
        if time.monotonic() > end:
            raise TimeoutError(
                f"{target}: another process has been moving its files there for a minute; if none "
                f"is running, what it left is in {chosen}"
            )
        time.sleep(0.01)


def _move_in(place: Path, target: Path, names: Collection[str]) -> None:
    new, old, moved = place / NEW, place / OLD, list[str]()
    try:
        for name in sorted(names):
            if os.path.lexists(target / name):
                os.rename(target / name, old / name)
        for name in sorted(os.listdir(new)):
            os.rename(new / name, target / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.rename(target / name, new / name)
        for name in os.listdir(old):
            os.rename(old / name, target / name)
        shutil.rmtree(place, ignore_errors=True)
        raise
