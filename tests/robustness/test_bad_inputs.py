"""Every verb with every file that it reads damaged in every way, and every option misused.

CI tries a sample; `pytest tests/robustness --thorough` all of them.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from support.damage import HARMLESS, damaged, kinds_of
from support.killing import in_child
from support.snapshots import snapshot
from support.verbs import COMMANDS, READING, save_inputs
from support.wrong_values import is_no_number, wrong_options

from peft_svdinit.cli import VERBS, main

pytestmark = pytest.mark.slow

EVERY = {**COMMANDS, **READING}
SAMPLE = 20
SAMPLED = "a sample"
# What a user did not make, and nothing is wrong without.
OPTIONAL = ("generation_config.json", "svdinit_config.json", "tuned/config.json")
# Files that a command does without, or reads nothing of: masks can be drawn without their adapter,
# and of a base that names target modules the configuration is enough.
UNREAD = {("mask show", "adapter_config.json"), ("export for a base", "model.safetensors")}
# Seconds for a verb that takes less than one.
SECONDS = 60
Case = TypeVar("Case")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    thorough = metafunc.config.getoption("--thorough")
    metafunc.parametrize("verb", EVERY if thorough else [SAMPLED])


@pytest.fixture(scope="module")
def own_inputs(tmp_path_factory) -> Path:
    """To be damaged."""
    return save_inputs(tmp_path_factory.mktemp("damaged"))


def chosen(verb: str, cases: Callable[[str], Iterator[Case]]) -> list[Case]:
    """All cases of a verb, or a sample of those of all verbs."""
    if verb != SAMPLED:
        return list(cases(verb))
    every = [case for name in EVERY for case in cases(name)]
    return random.Random(0).sample(every, SAMPLE)


def faults_of(argv: Sequence[str], work: Path, must_fail: bool) -> list[str]:
    """What is wrong with how a command ends."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "file").touch()
    (work / "dangling").symlink_to("nowhere")
    (work / "itself").symlink_to("itself")
    before = snapshot(work)

    def run() -> None:
        os.chdir(work)
        main(argv)

    ended = in_child(run, work, seconds=SECONDS)
    lines = ended.said.splitlines()
    if "Traceback" in ended.said or ended.code not in (0, 2):
        return [f"ended with {ended.code}: {' | '.join(lines[-3:])}"]
    if ended.code == 0:
        return ["nothing is said of it"] if must_fail else []
    start = f"svdinit {argv[0]}: error: "
    if [line.startswith(start) for line in lines].count(True) != 1 or not lines[-1].startswith(
        start
    ):
        return [f"is not one line: {ended.said}"]
    # A long job keeps what it has done, to go on from there.
    left = {name for name in snapshot(work).items() - before.items() if ".partial/" not in name[0]}
    return [f"{min(left)[0]} is left"] if left else []


def report(faults: dict[str, list[str]], cases: Sequence[Any]) -> str:
    lines = [f"{len(faults)} of {len(cases)} cases:"]
    return "\n".join([*lines, *(f"{name}: {'; '.join(said)}" for name, said in faults.items())])


def damages(verb: str, inputs: Path) -> Iterator[tuple[str, Path, str]]:
    """(verb, file, kind) of all that can be wrong with what a command reads."""
    for path in EVERY[verb].inputs(inputs):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.suffix in (".safetensors", ".json", ".csv") and "analysis" not in file.name:
                yield from ((verb, file, kind) for kind in kinds_of(file))


def test_a_damaged_file_is_refused_in_one_line(verb, own_inputs, tmp_path):
    cases = chosen(verb, lambda name: damages(name, own_inputs))
    faults = {}
    for name, file, kind in cases:
        must_fail = kind not in HARMLESS and not str(file).endswith(OPTIONAL)
        must_fail &= (name, file.name) not in UNREAD
        # Which is the end of its last line.
        must_fail &= (kind, file.suffix) != ("without its last byte", ".json")
        argv = EVERY[name].argv(own_inputs, tmp_path / "work" / EVERY[name].output)
        with damaged(file, kinds_of(file)[kind]) as changed:
            found = faults_of(argv, tmp_path / "work", must_fail and changed)
        if found:
            faults[f"{name}, {file.relative_to(own_inputs)}, {kind}"] = found
    assert not faults, report(faults, cases)


def misuses(verb: str) -> Iterator[tuple[str, list[str]]]:
    """(verb, arguments) with one wrong option each."""
    options_class, _ = VERBS[EVERY[verb].verb]
    yield from ((verb, arguments) for arguments in wrong_options(options_class))


def test_a_wrong_option_is_refused_in_one_line(verb, inputs, tmp_path):
    cases = chosen(verb, misuses)
    faults = {}
    for name, arguments in cases:
        argv = EVERY[name].argv(inputs, tmp_path / "work" / EVERY[name].output)
        options_class, _ = VERBS[EVERY[name].verb]
        must_fail = is_no_number(arguments, options_class)
        found = faults_of([*argv, *arguments], tmp_path / "work", must_fail)
        if found:
            faults[f"{name} {' '.join(arguments)[:60]}"] = found
    assert not faults, report(faults, cases)
