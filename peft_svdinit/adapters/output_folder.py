"""The folder of an adapter that is made of others: what it may replace, and what it keeps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..files import clean_once, file_stamps, is_workspace, publishing
from ..models import CONFIG_NAME, WEIGHTS_NAME

RESIZE_REPORT = "resize.json"
MERGE_JSON, MERGE_REPORT = "merge_report.json", "merge_report.md"
EXTRACTION_JSON, EXTRACTION_REPORT = "extraction.json", "extraction.md"
EXPORT_REPORT = "export.json"
# By one of these a folder is known to be made of something else: no training is lost with it.
_RECORDS = {RESIZE_REPORT, MERGE_JSON, EXTRACTION_JSON, EXPORT_REPORT}
_REPLACED = {CONFIG_NAME, WEIGHTS_NAME, MERGE_REPORT, EXTRACTION_REPORT, *_RECORDS}
# PEFT writes the first into every adapter, the Hub the second.
_KEPT = {"README.md", ".gitattributes"}


@dataclass(frozen=True)
class OutputFolder:
    """A folder that is new, empty or what one of the verbs wrote, and still so when it is replaced.

    Attributes:
        path: the folder.
        argument: by which the user names it.
    """

    path: Path
    argument: str
    _replaced: Mapping[str, list[int]] = field(repr=False)

    @classmethod
    def checked(
        cls, path: str | os.PathLike, argument: str, inputs: Iterable[Path] = ()
    ) -> OutputFolder:
        """The folder, if it may be written.

        Args:
            path: the folder to write.
            argument: by which the user names it.
            inputs: folders and files that are read.

        Raises:
            ValueError: if it is an input or holds one, is a file, or holds anything that was not
                written by the verbs: an adapter that was trained, for one.
        """
        output = Path(path).expanduser()
        if output.is_dir():
            clean_once(output)  # A publication that was killed is finished first.
        target, read = output.resolve(), {path.resolve() for path in inputs}
        if target in read:
            raise ValueError(f"{argument} must not be an input, got {output}; choose another name")
        # PEFT saves the second adapter of a model in a folder within that of the first.
        within = [path for path in read if target in path.parents]
        if within:
            raise ValueError(
                f"{argument} must not hold an input, but {min(within)} is in {output}, which would "
                "be replaced; choose another name"
            )
        return cls(output, argument, _replaced_files(output, argument))

    @contextmanager
    def replacing(self) -> Iterator[Path]:
        """As `publishing` to the folder; a README.md that is there stays.

        Raises:
            ValueError: if the folder changed since it was checked; it is left as it is.
        """
        with publishing(self.path, replaces=self._replaced) as temporary:
            yield temporary
            if _replaced_files(self.path, self.argument) != self._replaced:
                raise ValueError(
                    f"{self.argument}: {self.path} was changed while the adapter was made, and is "
                    "not replaced; choose another folder and run this again"
                )


def _replaced_files(folder: Path, argument: str) -> dict[str, list[int]]:
    """The files that go when `folder` is replaced, by what tells that one changed."""
    if not folder.exists():
        return {}
    if not folder.is_dir():
        raise ValueError(f"{argument} must be a folder, but {folder} is a file")
    files = file_stamps(folder) or {}
    known = _KEPT | (_REPLACED if files.keys() & _RECORDS else set())
    ours = files.keys() & known
    others = [
        path.name
        for path in folder.iterdir()
        if path.name not in ours and not is_workspace(path.name)
    ]
    if others:
        raise ValueError(
            f"{argument}: {folder} holds {min(others)}, which this command did not write and would "
            "delete; choose a new folder, an empty one or one with an earlier result alone"
        )
    return {name: stamp for name, stamp in files.items() if name not in _KEPT}
