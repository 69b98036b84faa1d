"""Every verb killed, or short of space, at its changes of the disk and within its writes.

CI does so a few times; `pytest tests/robustness --thorough` wherever it can make a difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.killing import Fate
from support.scenes import Scene, spread
from support.snapshots import difference, is_part_of, results
from support.verbs import COMMANDS, undrawn

pytestmark = pytest.mark.slow

IN_CI = [
    "synthesize", "extract an adapter", "compare", "mask", "merge svd", "resize a file",
    "export compact",
]  # fmt: skip
# Events of one verb from one beginning.
MOST = 40
# What follows a kill.
THEN = ["the command", "the command after another kill", "the command", "the other command"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("--thorough"):
        cases = [(verb, after_another) for verb in COMMANDS for after_another in (True, False)]
    else:
        cases = [(verb, True) for verb in IN_CI]
    names = [f"{verb}{' anew' if not after_another else ''}" for verb, after_another in cases]
    metafunc.parametrize("scene", cases, ids=names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def scene(request, inputs: Path, tmp_path_factory) -> Iterator[Scene]:
    verb, after_another = request.param
    with undrawn():
        yield Scene(COMMANDS[verb], inputs, tmp_path_factory.mktemp("scene"), after_another)


def events(scene: Scene, kinds: tuple[str, ...], thorough: bool) -> list[int]:
    """Changes of these kinds to strike at: in CI the middle one."""
    chosen = [n for n, change in enumerate(scene.changes) if change.startswith(kinds)]
    return spread(chosen, MOST) if thorough else [chosen[len(chosen) // 2]]


def sizes(scene: Scene, thorough: bool) -> list[int]:
    """Numbers of bytes at which the writing of some file is half done."""
    every = sorted({len(content) // 2 for content in scene.new.values()} | {0})
    return every if thorough else [every[-1]]


def place(fate: Fate, events: list[str]) -> str:
    return f"{fate.deed} {fate.size or ''} {events[-1] if events else 'before anything'}"


def faults_after_kill(scene: Scene, fate: Fate, then: str) -> list[str]:
    """What is wrong after a kill, and after the same command once more, or another."""
    scene.begin()
    killed = scene.run(fate)
    if not killed.killed:
        return [f"ended with {killed.code}: {killed.said}"]
    faults, left = [], results(scene.found())
    if not any(is_part_of(left, results(whole)) for whole in (scene.old, scene.new)):
        faults.append(f"neither old nor new; {difference(left, results(scene.new))}")
    if then == THEN[1]:
        scene.run(Fate("kill", len(killed.events) // 2))
    other = then == THEN[3]
    ended = scene.run(another=other)
    expected = scene.another if other else scene.new
    found = {
        name: content
        for name, content in scene.found().items()
        if name in expected or name.split("/")[0] not in ended.said
    }
    if ended.code:
        faults.append(f"{then} ended with {ended.code}: {ended.said}")
    elif found != expected:
        faults.append(f"after {then} {difference(found, expected)}")
    return [f"{place(fate, killed.events)}: {fault}" for fault in faults]


def test_a_killed_verb_leaves_no_mixture_and_ends_with_the_same_bits_run_again(scene, thorough):
    if thorough:
        _ = scene.another  # Which runs in the folder, as all below does.
    fates = [
        Fate("kill", event)
        for event in events(scene, ("",) if thorough else ("os.rename",), thorough)
    ]
    fates += [Fate("kill", size=size) for size in sizes(scene, thorough)]
    then = itertools.cycle(THEN if thorough else THEN[:1])
    pairs = zip(fates, then, strict=False)
    faults = [fault for fate, next_ in pairs for fault in faults_after_kill(scene, fate, next_)]
    assert not faults, "\n".join([f"{len(faults)} faults after {len(fates)} kills", *faults])


def faults_of_full_disk(scene: Scene, fate: Fate) -> list[str]:
    scene.begin()
    ended, found = scene.run(fate), scene.found()
    if ended.code == 0:  # What there was of the disk was enough.
        return [] if found == scene.new else [difference(found, scene.new)]
    *_, last = ["", *ended.said.splitlines()]
    faults = []
    if ended.code != 2 or "Traceback" in ended.said or ": error: " not in last:
        faults.append(f"ended with {ended.code}: {ended.said}")
    elif str(scene.work) not in last or not ("full" in last or "space" in last):
        faults.append(f"does not say which disk is full: {last}")
    # A job that is long keeps what it has done, to go on from there.
    kept = {name: found[name] for name in found if not name.startswith("result.partial/")}
    if kept != scene.old:
        faults.append(f"left {difference(kept, scene.old)}")
    return [f"{place(fate, ended.events)}: {fault}" for fault in faults]


def test_a_full_disk_is_said_in_one_line_and_nothing_is_lost_or_left(scene, thorough):
    fates = [Fate("full", event) for event in events(scene, ("open", "os.mkdir"), thorough)]
    fates += [Fate("full", size=size) for size in sizes(scene, thorough)]
    faults = [fault for fate in fates for fault in faults_of_full_disk(scene, fate)]
    assert not faults, "\n".join([f"{len(faults)} faults, {len(fates)} times full", *faults])
