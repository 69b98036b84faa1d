"""What goes wrong in a callback once steps are taken costs the callback's files, not the model."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.state import PartialState

logger = logging.getLogger(__name__)


class Sparing:
    """Contexts that turn what is raised within them into one warning, so that training goes on.

    The Trainer has saved nothing yet when a hook raises. Whatever a hook does after
    `on_train_begin`, which is where wrong configurations are refused, therefore stands in a context
    of its own. Other processes than the main one, which write nothing, are silent.

    Args:
        owner: name of the callback, for the warning.

    Attributes:
        missing: what could not be done, in the order of its first failure.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.missing: list[str] = []

    @contextmanager
    def __call__(self, missing: str, remedy: str) -> Iterator[None]:
        """Spare the training from what is raised in here.

        Args:
            missing: what there will not be if it fails; warned of once.
            remedy: how to have it all the same.
        """
        try:
            yield
        except Exception as error:
            if missing in self.missing:
                return
            self.missing.append(missing)
            logger.log(
                logging.WARNING if PartialState().is_main_process else logging.DEBUG,
                "%s leaves no %s (%s: %s); the training is not affected. %s",
                self.owner,
                missing,
                type(error).__name__,
                error,
                remedy,
                exc_info=True,
            )


def prepare_folder(folder: Path, owner: str, stale: Sequence[str] = ()) -> None:
    """Make a callback's folder before training, without the stale files that training replaces.

    Without them, what fails to be written cannot be mistaken for what was.

    Raises:
        OSError: if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in stale:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"output_dir of {owner} must be a writable directory, got {folder}: {error}"
        ) from error
