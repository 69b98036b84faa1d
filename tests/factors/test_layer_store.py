"""The working folder of an extraction: resumed, locked, and never trusted blindly."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.tiny_models import truncate

from peft_svdinit import LowRankFactors
from peft_svdinit.factors import Factorisation, LayerStore, fill_store
from peft_svdinit.files import TensorWriter

NAMES = ["layers.0.q", "layers.1.q", "layers.2.q"]


def deltas() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(9, 7, generator=generator) for name in NAMES}


def store(folder: Path, **inputs: object) -> LayerStore:
    return LayerStore(folder / "job", NAMES, inputs)


def assert_equal(one: LowRankFactors, other: LowRankFactors) -> None:
    assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("U", "S", "Vh"))
    assert one.norm == other.norm


@pytest.mark.parametrize("read_ahead", [1, 2, 8])
def test_a_filled_store_gives_every_layer_back_in_order(tmp_path, read_ahead):
    factorise = Factorisation(3)
    with store(tmp_path) as filled:
        fill_store(filled, deltas(), factorise, read_ahead=read_ahead)
        assert list(filled) == NAMES and len(filled) == 3
        for name, delta in deltas().items():
            assert_equal(filled[name], factorise(name, delta))
            S, norm = filled.singular_values(name)
            assert torch.equal(S, filled[name].S) and norm == filled[name].norm


def test_a_run_that_was_stopped_goes_on_with_the_layers_that_it_lacks(tmp_path):
    made = []

    def failing(name: str, delta: torch.Tensor) -> LowRankFactors:
        made.append(name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return Factorisation(3)(name, delta)

    with pytest.raises(KeyboardInterrupt), store(tmp_path) as filled:
        fill_store(filled, deltas(), failing)
    with store(tmp_path) as resumed:
        assert list(resumed) == NAMES[:1]
        fill_store(resumed, deltas(), failing)
        assert made == [NAMES[0], NAMES[1], NAMES[1], NAMES[2]]
        for name, delta in deltas().items():
            assert_equal(resumed[name], Factorisation(3)(name, delta))


def test_a_kill_at_any_moment_leaves_whole_layers_only(tmp_path):
    script = (
        "import os, sys, torch\n"
        "from peft_svdinit.factors import LayerStore, Factorisation, fill_store\n"
        "import peft_svdinit.files.atomic as module\n"
        "rename = os.replace\n"
        "def dying(source, target):\n"
        "    if 'layer-00001' in str(target): os._exit(9)\n"
        "    rename(source, target)\n"
        "module.os.replace = dying\n"
        "names = ['a', 'b', 'c']\n"
        "with LayerStore(sys.argv[1], names, {}) as store:\n"
        "    fill_store(store, {n: torch.randn(9, 7) for n in names}, Factorisation(3))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "job")], check=False)
    assert done.returncode == 9
    with LayerStore(tmp_path / "job", ["a", "b", "c"], {}) as resumed:
        assert list(resumed) == ["a"]
        assert resumed["a"].rank == 3


def test_other_inputs_start_afresh(tmp_path, caplog):
    with store(tmp_path, rank=3) as first:
        fill_store(first, deltas(), Factorisation(3))
    with store(tmp_path, rank=3) as again:
        assert len(again) == 3
    with store(tmp_path, rank=2) as other:
        assert len(other) == 0
    assert "other inputs; starting afresh" in caplog.text


def test_a_layer_that_is_damaged_is_made_again(tmp_path):
    with store(tmp_path) as first:
        fill_store(first, deltas(), Factorisation(3))
        damaged = sorted(first.folder.glob("layer-*"))[1]
    truncate(damaged)
    with store(tmp_path) as resumed:
        assert list(resumed) == [NAMES[0], NAMES[2]]
        with pytest.raises(KeyError):
            resumed[NAMES[1]]


def test_a_second_process_on_one_output_is_refused(tmp_path):
    script = (
        "import sys\nfrom peft_svdinit.factors import LayerStore\n"
        "LayerStore(sys.argv[1], ['layers.0.q'], {}).__enter__()"
    )
    with store(tmp_path) as held:
        second = subprocess.run(
            [sys.executable, "-c", script, str(held.folder)], capture_output=True, text=True
        )
    assert second.returncode != 0
    assert "in use by another process" in second.stderr
    with store(tmp_path):
        pass


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    folder = tmp_path / "job"
    files = {"thesis.tex": "years of work", ".layer-9/x": "mine", "layer-0.safetensors": "mine"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=r"holds something else, \.layer-9; move it"):
        store(tmp_path).__enter__()
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert found == files


@pytest.mark.parametrize("text", ['{"name": "backup"}', "not JSON"])
def test_a_job_of_another_program_is_left_alone(tmp_path, text):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text(text)
    with pytest.raises(ValueError, match=r"holds something else, job\.json"):
        store(tmp_path).__enter__()
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["job.json"]
    assert (tmp_path / "job" / "job.json").read_text() == text


def test_files_put_beside_a_job_are_never_deleted(tmp_path, caplog):
    notes = tmp_path / "job" / "notes.txt"
    with store(tmp_path) as filled:
        fill_store(filled, deltas(), Factorisation(3))
        notes.write_text("mine")
        filled.remove()
    assert "holds notes.txt, which is not of this job" in caplog.text
    with pytest.raises(ValueError, match=r"holds something else, notes\.txt"):
        store(tmp_path).__enter__()
    assert notes.read_text() == "mine"
    notes.unlink()
    with store(tmp_path) as resumed:
        assert len(resumed) == 3


def test_what_a_killed_write_left_is_cleared(tmp_path):
    (tmp_path / "job" / ".job.json.a8_b.writing").mkdir(parents=True)
    (tmp_path / "job" / ".layer-00001.safetensors.xyz.writing").mkdir()
    (tmp_path / "job" / "job.lock").touch()
    with store(tmp_path) as begun:
        assert len(begun) == 0
        assert {path.name for path in begun.folder.iterdir()} == {"job.json", "job.lock"}


def test_singular_values_do_not_keep_the_file_mapped(tmp_path):
    with store(tmp_path) as filled:
        fill_store(filled, deltas(), Factorisation(3))
        values, _ = filled.singular_values(NAMES[0])
        assert values.untyped_storage().nbytes() == values.nbytes


def test_a_full_disk_leaves_no_layer(tmp_path, monkeypatch):
    def full(writer, name, tensor):
        raise OSError("No space left on device")

    monkeypatch.setattr(TensorWriter, "write", full)
    with store(tmp_path) as filled:
        with pytest.raises(OSError, match="No space left on device"):
            fill_store(filled, deltas(), Factorisation(3))
        assert not len(filled) and not list(filled.folder.glob("*layer-*"))


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_cannot_be_used_is_refused_at_once(device):
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used"):
        Factorisation(3, device=device)


def test_removing_a_store_leaves_nothing(tmp_path):
    with store(tmp_path) as filled:
        fill_store(filled, deltas(), Factorisation(3))
        filled.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_layer_does_not_depend_on_those_before_it():
    delta = deltas()["layers.0.q"]
    one, other = (Factorisation(2, method="krylov")(name, delta) for name in NAMES[:2])
    assert not torch.equal(one.U, other.U)
    assert_equal(one, Factorisation(2, method="krylov")(NAMES[0], delta))


def test_a_zero_delta_keeps_one_triplet_of_nothing():
    factors = Factorisation(5)("layer", torch.zeros(9, 7))
    assert (factors.rank, factors.norm, float(factors.S[0])) == (1, 0.0, 0.0)


def test_a_delta_that_is_not_finite_is_refused_by_its_layer():
    with pytest.raises(ValueError, match=r"layer layers.0.q: .*NaN or infinite"):
        Factorisation(2)("layers.0.q", torch.full((60, 70), torch.inf))


def test_an_error_of_a_reader_reaches_the_caller_and_ends_the_threads(tmp_path):
    class Broken(dict):
        def __getitem__(self, name: str) -> torch.Tensor:
            if name == NAMES[1]:
                raise ValueError("a truncated shard")
            return super().__getitem__(name)

    with store(tmp_path) as filled:
        with pytest.raises(ValueError, match="a truncated shard"):
            fill_store(filled, Broken(deltas()), Factorisation(2), read_ahead=2)
        assert list(filled) == NAMES[:1]
    assert not any(thread.name.startswith("deltas") for thread in threading.enumerate())


def test_no_readers_are_refused(tmp_path):
    with store(tmp_path) as empty, pytest.raises(ValueError, match="read_ahead must be at least 1"):
        fill_store(empty, deltas(), Factorisation(2), read_ahead=0)
