"""Hidden folders where results are written before they take their names; dead ones are cleaned.

A workspace `.{name}.{random}.writing` is locked as long as its writer lives. Where a process was
killed, the next one that writes to the same folder finds the lock free, and removes the workspace.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

logger = logging.getLogger(__name__)

NEW, OLD = "new", "old"
"""Where `publishing` keeps what comes and what goes."""
_LOCK = "lock"
_WRITING, _PUBLISHING = ".writing", ".publishing"
_NAME = re.compile(rf"\..+(\.[a-z0-9_]+\{_WRITING}|\{_PUBLISHING})")


def is_workspace(name: str) -> bool:
    """Whether a file name is that of a workspace."""
    return _NAME.fullmatch(name) is not None


def publishing_name(folder: Path) -> str:
    """What the one workspace is called whose content is being moved into `folder`."""
    return f".{folder.name}{_PUBLISHING}"


@contextmanager
def workspace(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new locked folder in `parent` for what will be called `name`; it goes in the end.

    Workspaces that killed processes left in `parent` are removed first, once in a process.

    Raises:
        OSError: if the disk is full, by its name.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        clean_once(parent)
        with _locked_folder(parent, name) as path:
            yield path
    except (OSError, SafetensorError) as error:
        reason = error.reason if isinstance(error, _DiskFull) else error
        if not _says_full(reason):
            raise
        raise _DiskFull(parent / name, reason) from error


class _DiskFull(OSError):
    """Said by the outermost workspace, of what the user named."""

    def __init__(self, path: Path, reason: Exception) -> None:
        self.reason = reason
        super().__init__(
            f"{path} cannot be written, the disk is full ({reason}): free some of it, and run the "
            "same command again"
        )


def _says_full(error: Exception) -> bool:
    numbers = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)


@contextmanager
def _locked_folder(parent: Path, name: str) -> Iterator[Path]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=_WRITING, dir=parent))
        lock = FileLock(path / _LOCK)
        try:
            try:
                lock.acquire(timeout=0)
            except NotImplementedError:
                pass  # The file system has no locks.
            except Timeout:
                continue  # Another process takes the folder for a dead one.
            if path.exists():
                yield path
                return
        finally:
            shutil.rmtree(path, ignore_errors=True)
            lock.release()


@cache
def clean_once(parent: Path) -> None:
    """Remove what killed processes left in `parent`; what they had begun to publish is finished.

    A folder is left alone while its writer lives. Where the file system has no locks that cannot be
    told, and a warning says where it is.
    """
    try:
        with os.scandir(parent) as entries:
            found = [Path(entry.path) for entry in entries if is_workspace(entry.name)]
    except PermissionError:
        return  # A folder that is only passed through.
    for path in found:
        clean(path)


def clean(path: Path) -> bool:
    """Remove a workspace if its writer is dead; whether it is gone."""
    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except NotImplementedError:
        logger.warning(
            "%s is being written by another process, or was left by one that was killed: this "
            "file system has no locks that would tell. If none is running, delete it",
            path,
        )
        return False
    except OSError:
        return not path.exists()  # It went meanwhile, or is another user's.
    try:
        if path.name.endswith(_PUBLISHING):
            _finish(path)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        lock.release()
    logger.info("%s was left by a process that was killed; it is removed", path)
    return True


def _finish(published: Path) -> None:
    """Move into the folder what a killed process had not yet moved."""
    folder, new, old = published.parent, published / NEW, published / OLD
    for entry in sorted(new.iterdir()) if new.is_dir() else ():
        if os.path.lexists(folder / entry.name):
            os.replace(folder / entry.name, old / entry.name)
        os.replace(entry, folder / entry.name)
