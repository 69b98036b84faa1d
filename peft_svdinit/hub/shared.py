"""What is to be shared: a folder's files as others may have them, and the card beside them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..adapters import compact_adapter_folder
from ..factors import SIDECAR_NAME
from ..masks import COMPACT_FILE_NAME, MASK_FILE_NAME
from .artefact import PLOT, Artefact, leads_out, recognise
from .base_model import BaseModel, find_base
from .card import card_data, card_text
from .card_merge import Card, held
from .figures import Figures, figures_of_comparison, figures_of_run, with_evaluation
from .publishable import publish_file

CARD = "README.md"


@dataclass(frozen=True)
class Shared:
    """An artefact with what its card says: the base model, and what was measured."""

    artefact: Artefact
    base: BaseModel
    figures: Figures

    @classmethod
    def of(
        cls,
        folder: str | os.PathLike,
        *,
        base_model: str | None = None,
        comparison: str | os.PathLike | None = None,
        evaluation: str | os.PathLike | None = None,
        token: str | None = None,
    ) -> Shared:
        """Arguments and errors are those of `push_to_hub`."""
        artefact = recognise(folder)
        figures = figures_of_run(artefact.folder)
        if comparison is not None:
            figures = figures_of_comparison(Path(comparison).expanduser(), figures)
        if evaluation is not None:
            figures = with_evaluation(figures, Path(evaluation).expanduser())
        return cls(artefact, find_base(artefact, base_model, token), figures)

    def card(
        self, existing: Card, repo_id: str, files: Collection[str], revision: str | None = None
    ) -> str:
        """The whole card, around what others wrote in an existing one."""
        data = card_data(self.artefact, self.base, self.figures)
        text = card_text(self.artefact, self.base, self.figures, repo_id, revision)
        text = f"{held(self.artefact.kind.name, files)}\n\n{text}"
        return existing.merged(data, text, repo_id.rpartition("/")[2])

    @property
    def own_card(self) -> Card | None:
        """The README.md in the folder."""
        path = self.artefact.folder / CARD
        if not path.is_file() or leads_out(path):
            return None
        return Card.read(path.read_text(encoding="utf-8"))

    @contextmanager
    def staged(self) -> Iterator[dict[str, Path]]:
        """The files without the card, by their names in the repository, while the context lasts.

        A LoRI adapter gets its compact form, if the folder has it not.
        """
        artefact, files = self.artefact, dict[str, Path]()
        with tempfile.TemporaryDirectory() as workspace:
            stage = Path(workspace)
            for source in (*map(artefact.folder.joinpath, artefact.files), *self.figures.files):
                files[source.name] = stage / source.name
                publish_file(source, files[source.name], self.base)
            is_lori = artefact.has(SIDECAR_NAME) and artefact.has(MASK_FILE_NAME)
            if is_lori and not artefact.has(COMPACT_FILE_NAME):
                files[COMPACT_FILE_NAME] = compact_adapter_folder(stage, stage)
            if self.figures.plot:
                files[PLOT] = self.figures.plot
            yield files
