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
from support.verbs import COMMANDS, undrawn

from peft_svdinit.cli import main

pytestmark = pytest.mark.slow

MOST = 15
IN_CI = ["extract factors", "mask", "merge svd", "resize a file"]
# Seconds that a process is given which may be waiting for another.
PATIENCE = 1.0


@pytest.fixture(scope="module")
def pictures(thorough: bool) -> Iterator[None]:
    with undrawn(not thorough):
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


@dataclass(frozen=True)
class Reader:
    """A command that reads an input which another process replaces.

    Attributes:
        words: the command, with `{input}`, `{i}` for the other inputs and `{out}`.
        one, two: the input, and what takes its place.
    """

    words: str
    one: str
    two: str


READERS = {
    "analyze": Reader("analyze --adapter {input} --lora_r 2 --plots false --output_dir {out}", "one", "two"),
    "synthesize": Reader("synthesize --adapter {input} --rank 6 --lora_r 2 --plots false --output_dir {out}", "one", "two"),
    "resize": Reader("resize --adapter {input} --rank 2 --output {out}", "one", "two"),
    "merge": Reader("merge --adapter {input} {i}/three --output {out}", "one", "two"),
    "mask": Reader("mask --source random --adapter {input} --plots false --output {out}", "one", "two"),
    "mask show": Reader("mask --show {input} --plots false --output {out}", "lori", "other"),
    "export": Reader("export --factors {input} --lora_r 2 --output_dir {out}", "factors", "factors-two"),
    "export compact": Reader("export --compact --adapter {input} --output_dir {out}", "lori", "other"),
    "export stock": Reader("export --adapter {input} --output_dir {out}", "compact", "compact-other"),
    "extract": Reader(
        "extract --base {i}/base --tuned {input} --rank 2 --verify layers --target_modules q_proj --output_dir {out}", "tuned", "tuned-two"
    ),
    "compare": Reader("compare --runs {i}/runs/a {input} --output_dir {out}", "runs/b", "runs/c"),
}  # fmt: skip
READERS_IN_CI = ["resize", "mask show"]


@dataclass(frozen=True)
class Reading:
    """A reader at work in a folder."""

    reader: Reader
    inputs: Path
    work: Path

    def begin(self, first: str, second: str) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.inputs / first, self.work / "input")
        shutil.copytree(self.inputs / second, self.work / "next")

    def child(self, event: int | None) -> Child:
        places = {"input": self.work / "input", "i": self.inputs, "out": self.work / "result"}
        argv = [word.format(**places) for word in self.reader.words.split()]
        return Child(lambda: main(argv), self.work / "input", Fate("stop", event, of="reads"))

    def undisturbed(self, first: str) -> tuple[Ended, Snapshot]:
        self.begin(first, first)
        ended = self.child(None).ended()
        assert ended.code == 0, ended.said
        return ended, snapshot(self.work / "result")

    def faults(self, event: int, wholes: list[Snapshot]) -> list[str]:
        """What is wrong if the input is another one from some event on."""
        self.begin(self.reader.one, self.reader.two)
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
    reading = Reading(READERS[reader], inputs, tmp_path / "work")
    (ended, first), (_, second) = map(
        reading.undisturbed, (READERS[reader].one, READERS[reader].two)
    )
    assert first != second
    events = range(len(ended.events))
    chosen = spread(events, MOST) if thorough else [len(events) // 2]
    faults = [fault for event in chosen for fault in reading.faults(event, [first, second])]
    assert not faults, "\n".join([f"{len(faults)} faults in {len(chosen)} readings", *faults])
