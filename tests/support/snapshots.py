"""What is in a folder, to be compared with what should be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

Snapshot = Mapping[str, bytes]


def snapshot(folder: Path) -> Snapshot:
    """Every file below a folder with its bytes, and every empty folder, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.fsencode(os.readlink(path))
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[f"{name}/"] = b""
    return found


def results(found: Snapshot) -> Snapshot:
    """The files that a user sees: without hidden ones, and those that a job goes on from."""
    return {
        name: content
        for name, content in found.items()
        if not name.endswith("/")
        and not any(part.startswith(".") or part.endswith(".partial") for part in name.split("/"))
    }


def is_part_of(found: Snapshot, whole: Snapshot) -> bool:
    return found.items() <= whole.items()


def difference(found: Snapshot, expected: Snapshot) -> str:
    """In words, for the message of a failure."""
    lost, more = expected.keys() - found.keys(), found.keys() - expected.keys()
    changed = [name for name in found.keys() & expected.keys() if found[name] != expected[name]]
    parts = {"missing": lost, "left over": more, "different": changed}
    return "; ".join(
        f"{what}: {', '.join(sorted(names))}" for what, names in parts.items() if names
    )
