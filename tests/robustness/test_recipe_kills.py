"""Recipes killed at their changes of the disk and within their writes, and then run again.

That a training goes on from a checkpoint with the same bits is what test_train_recipes.py tests;
here is a recipe of several stages, and with `--thorough` more of them, killed anywhere.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import compare_inits
import pytest
import train_lora
import train_lori
from support.killing import Child, Ended, Fate
from support.recipe_inputs import shared_options
from support.scenes import spread
from support.snapshots import Snapshot, difference, snapshot
from support.verbs import undrawn

pytestmark = pytest.mark.slow

MOST = 24
RECIPES = {
    "train_lori": (
        train_lori,
        "--max_steps 3 --calibration_steps 2 --lori_density 0.25 --save_steps 2 "
        "--lora_target_modules q_proj v_proj",
    ),
    "train_lora": (
        train_lora,
        "--max_steps 4 --save_steps 2 --resume_from_checkpoint last --save_moments true",
    ),
    "compare_inits": (
        compare_inits,
        "--max_steps 2 --teacher_steps 2 --teacher_rank 4 --eval_steps 1 --seeds 0",
    ),
}
# Columns that say how long something took and how much memory.
MEASURED = {"seconds", "peak_memory_mb"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    thorough = metafunc.config.getoption("--thorough")
    metafunc.parametrize("recipe", RECIPES if thorough else ["train_lori"])


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Iterator[list[str]]:
    with undrawn():
        yield shared_options(tmp_path_factory.mktemp("recipe"))


def repeated(found: Snapshot) -> Snapshot:
    """Weights, masks and losses as they are, the names of all other files."""
    kept = {}
    for name, content in found.items():
        if name.endswith("training_log.csv"):
            rows = csv.DictReader(io.StringIO(content.decode()))
            lines = [[value for key, value in row.items() if key not in MEASURED] for row in rows]
            kept[name] = repr(lines).encode()
        else:
            kept[name] = content if name.endswith((".safetensors", "_config.json")) else b""
    return kept


def run(recipe: str, options: list[str], work: Path, fate: Fate | None = None) -> Ended:
    module, own = RECIPES[recipe]
    argv = [*options, *own.split(), "--output_dir", str(work / "run")]
    return Child(lambda: module.main(argv), work, fate).ended()


def test_a_killed_recipe_ends_with_the_same_bits_run_again(recipe, options, tmp_path, thorough):
    work = tmp_path / "work"
    work.mkdir()
    made = run(recipe, options, work)
    assert made.code == 0, made.said
    expected = repeated(snapshot(work))
    sizes = {len(content) // 2 for content in snapshot(work).values()}
    fates = [Fate("kill", event) for event in spread(range(len(made.events)), MOST)]
    fates += [Fate("kill", size=size) for size in spread(sorted(sizes), MOST // 2)]
    fates, faults = fates if thorough else [fates[MOST * 2 // 3]], []
    for fate in fates:
        shutil.rmtree(work)
        work.mkdir()
        killed, again = run(recipe, options, work, fate), run(recipe, options, work)
        place = f"{fate} {killed.events[-1] if killed.events else ''}"
        if not killed.killed:
            faults.append(f"{place}: ended with {killed.code}: {killed.said[-500:]}")
        elif again.code:
            faults.append(f"{place}: run again {again.code}: {again.said[-500:]}")
        elif (found := repeated(snapshot(work))) != expected:
            faults.append(f"{place}: {difference(found, expected)}")
    assert not faults, "\n".join([f"{len(faults)} faults after {len(fates)} kills", *faults])
