"""Two processes at once: one is stopped at some event, another comes in between, it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.killing import Child, Ended, Fate
from support.scenes import Scene, spread
from support.snapshots import Snapshot, difference, snapshot
from support.verbs import COMMANDS, Command, undrawn

from peft_svdinit.cli import main

pytestmark = pytest.mark.slow

MOST = 15
IN_CI = ["mask", "merge svd", "resize a file"]
# Seconds that a process is given which may be waiting for another.
PATIENCE = 1.0


@pytest.fixture(scope="module")
def pictures() -> Iterator[None]:
    with undrawn():
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--thorough")
    if "verb" in metafunc.fixturenames:
        metafunc.parametrize("verb", COMMANDS if every else IN_CI)
    if "reader" in metafunc.fixturenames:
        metafunc.parametrize("reader", READERS if every else READERS_IN_CI)


def refused(ended: Ended) -> bool:
    """Whether a verb ended with one line that says what was wrong."""
    *_, last = ["", *ended.said.splitlines()]
    return ended.code == 2 and "Traceback" not in ended.said and ": error: " in last


def faults_of_race(scene: Scene, event: int) -> list[str]:
    scene.begin()
    first = scene.child(Fate("stop", event))
    stopped = first.stops()
    second = scene.child(another=True)
    if stopped:
        second.stops(PATIENCE)
        first.go_on()
    ends = [first.ended(), second.ended()]
    place = f"stopped before {ends[0].events[event]}"
    faults = [f"{place}: {end.code}: {end.said}" for end in ends if end.code and not refused(end)]
    done = [
        whole for end, whole in zip(ends, (scene.new, scene.another), strict=True) if end.code == 0
    ]
    found = scene.found()
    if found not in (done or [scene.old]):
        told = "; or ".join(difference(found, whole) for whole in done or [scene.old])
        faults.append(f"{place}: codes {[end.code for end in ends]}: {told}")
    return faults


def test_of_two_writers_of_one_folder_one_has_it(verb, inputs, tmp_path, pictures, thorough):
    scene = Scene(COMMANDS[verb], inputs, tmp_path, after_another=True)
    _ = scene.another
    events = range(len(scene.changes))
    chosen = spread(events, MOST) if thorough else [len(events) // 2, len(events) - 1]
    faults = [fault for event in chosen for fault in faults_of_race(scene, event)]
    assert not faults, "\n".join([f"{len(faults)} faults in {len(chosen)} races", *faults])


# Commands by an input, and what takes its place while it is read.
READERS = {
    "synthesize": ("one", "two"),
    "extract an adapter's factors": ("one", "two"),
    "extract an adapter": ("tuned", "tuned-two"),
    "analyze": ("one", "two"),
    "compare": ("runs/b", "runs/c"),
    "mask": ("one", "two"),
    "mask show": ("lori", "other"),
    "merge cat": ("one", "three"),
    "resize": ("one", "two"),
    "export": ("factors", "factors-two"),
    "export compact": ("lori", "other"),
    "export stock": ("compact", "compact-other"),
}
READERS_IN_CI = ["resize", "mask show"]


@dataclass(frozen=True)
class Reading:
    """A command at work in a folder on an input that is replaced there."""

    command: Command
    inputs: Path
    one: str
    two: str
    work: Path

    def begin(self, first: str, second: str) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.inputs / first, self.work / "input")
        shutil.copytree(self.inputs / second, self.work / "next")

    def child(self, event: int | None) -> Child:
        own = {str(self.inputs / self.one): str(self.work / "input")}
        argv = self.command.argv(self.inputs, self.work / "result")
        argv = [own.get(word, word) for word in argv]
        return Child(lambda: main(argv), self.work / "input", Fate("stop", event, of="reads"))

    def undisturbed(self, first: str) -> tuple[Ended, Snapshot]:
        self.begin(first, first)
        ended = self.child(None).ended()
        assert ended.code == 0, ended.said
        return ended, snapshot(self.work / "result")

    def faults(self, event: int, wholes: list[Snapshot]) -> list[str]:
        """What is wrong if the input is another one from some event on."""
        self.begin(self.one, self.two)
        child = self.child(event)
        if child.stops():
            (self.work / "input").rename(self.work / "gone")
            (self.work / "next").rename(self.work / "input")
            child.go_on()
        ended = child.ended()
        found, place = snapshot(self.work / "result"), f"replaced before {ended.events[event]}"
        if ended.code:
            right = refused(ended) and not found
            return [] if right else [f"{place}: {ended.code}: {ended.said} and {list(found)}"]
        return [] if found in wholes else [f"{place}: a mixture, {difference(found, wholes[1])}"]


def test_an_input_replaced_while_it_is_read_gives_one_or_the_other_result_or_is_refused(
    reader, inputs, tmp_path, pictures, thorough
):
    reading = Reading(COMMANDS[reader], inputs, *READERS[reader], tmp_path / "work")
    ended, first = reading.undisturbed(reading.one)
    _, second = reading.undisturbed(reading.two)
    assert first != second
    events = range(len(ended.events))
    chosen = spread(events, MOST) if thorough else [len(events) // 2]
    faults = [fault for event in chosen for fault in reading.faults(event, [first, second])]
    assert not faults, "\n".join([f"{len(faults)} faults in {len(chosen)} readings", *faults])
