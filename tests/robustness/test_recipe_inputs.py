"""A training recipe with every file that it reads damaged in every way, by `--thorough`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import train_lora
from support.damage import HARMLESS, damaged, kinds_of
from support.killing import Ended, in_child
from support.recipe_inputs import save_model, shared_options
from support.snapshots import snapshot

from peft_svdinit.cli import main as svdinit

pytestmark = pytest.mark.slow

# Of which transformers makes what is missing.
OPTIONAL = ("generation_config.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and factors of a delta of the model."""
    folder = tmp_path_factory.mktemp("recipe")
    shared_options(folder)
    tuned = save_model(folder / "tuned", seed=1)
    pair = f"--base {folder}/model --tuned {tuned} --rank 4 --lora_r 2 --save_as factors"
    svdinit(f"extract {pair} --plots false --output_dir {folder}/factors".split())
    return folder


def files(folder: Path) -> Iterator[Path]:
    yield folder / "data.jsonl"
    yield folder / "factors" / "factors.safetensors"
    yield from (path for path in sorted((folder / "model").iterdir()) if path.suffix != ".jinja")


def trained(folder: Path, work: Path) -> Ended:
    options = (
        f"--model_name_or_path {folder}/model --dataset_name {folder}/data.jsonl --use_cpu true "
        f"--disable_tqdm true --init svd --svd_factors {folder}/factors --lora_r 2 --max_steps 1 "
        f"--per_device_train_batch_size 2 --max_eval_samples 2 --output_dir {work}/run"
    )
    return in_child(lambda: train_lora.main(options.split()), work)


def test_a_damaged_file_is_refused_in_one_line_before_anything_is_made(request, thorough, tmp_path):
    if not thorough:
        pytest.skip("with --thorough")
    folder = request.getfixturevalue("folder")
    made = trained(folder, tmp_path / "right")
    assert made.code == 0, made.said
    cases = [(file, kind) for file in files(folder) for kind in kinds_of(file)]
    faults, work = [], tmp_path / "work"
    for file, kind in cases:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        with damaged(file, kinds_of(file)[kind]) as changed:
            ended = trained(folder, work)
        place = f"{file.relative_to(folder)}, {kind}"
        *_, last = ["", *ended.said.splitlines()]
        if ended.code == 0:
            if changed and kind not in HARMLESS and file.name not in OPTIONAL:
                faults.append(f"{place}: nothing is said of it")
        elif "Traceback" in ended.said or "error: " not in last:
            faults.append(f"{place}: ended with {ended.code}: {ended.said[-400:]}")
        elif snapshot(work):
            faults.append(f"{place}: left {min(snapshot(work))}")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])
