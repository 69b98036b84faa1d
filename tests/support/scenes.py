"""A command of the tool at work in a folder, again and again from the same beginning."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from peft_svdinit.cli import main
from support.killing import Child, Ended, Fate
from support.snapshots import Snapshot, snapshot
from support.verbs import Command

Item = TypeVar("Item")


@dataclass(frozen=True)
class Scene:
    """A command, and what is in its folder before.

    Attributes:
        folder: for itself; within it the commands work in `work`, whose name is in their reports.
        after_another: whether the folder has the result of the command's other options before.
    """

    command: Command
    inputs: Path
    folder: Path
    after_another: bool

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def child(self, fate: Fate | None = None, *, another: bool = False) -> Child:
        argv = self.command.argv(self.inputs, self.work / self.command.output, another=another)
        return Child(lambda: main(argv), self.work, fate)

    def run(self, fate: Fate | None = None, *, another: bool = False) -> Ended:
        """The command, or that of the other options, to its end or its fate."""
        return self.child(fate, another=another).ended()

    def begin(self) -> None:
        """Put the folder back to what it was in the beginning."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self._start, self.work)

    def found(self) -> Snapshot:
        return snapshot(self.work)

    @cached_property
    def _start(self) -> Path:
        self.work.mkdir(parents=True)
        if self.after_another:
            self._made(self.run(another=True))
        return self.work.rename(self.folder / "start")

    @cached_property
    def old(self) -> Snapshot:
        """What is there in the beginning."""
        return snapshot(self._start)

    @cached_property
    def another(self) -> Snapshot:
        """What the command of the other options leaves."""
        self.begin()
        self._made(self.run(another=True))
        return self.found()

    @property
    def new(self) -> Snapshot:
        """What the command leaves."""
        return self._to_its_end[1]

    @property
    def changes(self) -> list[str]:
        """What the command changes in its folder, in order."""
        return self._to_its_end[0].events

    @cached_property
    def _to_its_end(self) -> tuple[Ended, Snapshot]:
        self.begin()
        return self._made(self.run()), self.found()

    @staticmethod
    def _made(ended: Ended) -> Ended:
        assert ended.code == 0, ended.said
        return ended


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """As many of them at equal distances."""
    step = max(1.0, len(items) / most)
    return [items[int(number * step)] for number in range(min(most, len(items)))]
