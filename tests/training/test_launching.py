"""What a run is launched as: batches divided among processes, expectations, DeepSpeed's ops."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stages.processes import check_same_start
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.nn.parallel import DistributedDataParallel

from peft_svdinit.training import NotAsExpected, RecipeArguments, RunsAs
from peft_svdinit.training import deepspeed_ops as ops
from trainer_callbacks import agreement

RUNS_AS = RunsAs(2, "DistributedDataParallel", 0, (), "float32", "bf16", "cpu")


def arguments(folder: Path, **options: Any) -> RecipeArguments:
    return RecipeArguments(output_dir=str(folder), use_cpu=True, **options)


def test_a_total_batch_is_divided_among_accumulated_batches(tmp_path):
    made = arguments(tmp_path, total_train_batch_size=12, gradient_accumulation_steps=3)
    assert made.per_device_train_batch_size == 4


def test_processes_that_do_not_divide_the_batch_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"among 3 processes .* use a multiple of 6"):
        arguments(tmp_path, total_train_batch_size=8, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    "expected",
    [{"expected_processes": 4}, {"expected_wrapper": "FSDPModule"}, {"expected_stage": 3}],
)
def test_what_does_not_run_as_expected_is_named_with_what_does(expected):
    RUNS_AS.check(
        expected_processes=2, expected_wrapper="DistributedDataParallel", expected_stage=0
    )
    ((option, value),) = expected.items()
    with pytest.raises(NotAsExpected, match=f"{option} is {value}, but the training runs as 2 pr"):
        RUNS_AS.check(**expected)


@pytest.mark.parametrize(
    "expected", [{"expected_wrapper": "ddp"}, {"expected_stage": 7}, {"expected_processes": 2}]
)
def test_an_expectation_that_cannot_be_met_is_refused_at_once(tmp_path, expected):
    with pytest.raises(ValueError, match=next(iter(expected))):
        arguments(tmp_path, **expected)


def trainer_of(wrapped: Any, **state: Any) -> Any:
    return SimpleNamespace(
        model_wrapped=wrapped,
        args=SimpleNamespace(world_size=2, device=torch.device("cpu")),
        accelerator=SimpleNamespace(state=SimpleNamespace(**state), mixed_precision="no"),
    )


def test_what_is_compiled_or_sharded_is_told_by_its_wrapper():
    class Wrapped(DistributedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))

    found = RunsAs.of(trainer_of(SimpleNamespace(_orig_mod=Wrapped())))
    assert found == RunsAs(2, "Wrapped", 0, (), "bfloat16", "no", "cpu")

    class Sharded(FSDPModule, nn.Linear):
        def __new__(cls, *args: Any) -> Any:
            return nn.Linear.__new__(cls)

    for plugin, stage, offloaded in (
        (None, 3, ()),
        (SimpleNamespace(reshard_after_forward=False, cpu_offload=False), 2, ()),
        (
            SimpleNamespace(reshard_after_forward=True, cpu_offload=CPUOffloadPolicy()),
            3,
            ("optimizer", "parameters"),
        ),
    ):
        state = {"fsdp_plugin": plugin} if plugin else {}
        found = RunsAs.of(trainer_of(Sharded(2, 2), **state))
        assert found == RunsAs(2, "FSDPModule", stage, offloaded, "float32", "no", "cpu")


def test_processes_that_would_start_differently_are_stopped(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    other.load_state_dict(model.state_dict())

    def gathered(mine: torch.Tensor) -> torch.Tensor:
        theirs = [agreement._checksum(p) for p in other[1].parameters()]
        return torch.cat([mine, torch.stack(theirs)[None]])

    monkeypatch.setattr("stages.processes.PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(agreement, "gather", gathered)
    check_same_start(model)
    with torch.no_grad():
        other.get_parameter("1.bias")[1] += 1e-7
    with pytest.raises(RuntimeError, match=r"different starts.*: 1\.bias is the first of 1"):
        check_same_start(model)


@pytest.fixture
def no_build(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    built = SimpleNamespace(
        name="deepspeed_shm_comm", is_compatible=lambda verbose: True, load=lambda verbose: None
    )
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: built)


@pytest.mark.deepspeed
def test_the_lock_of_a_killed_build_is_removed_where_nobody_else_builds(
    tmp_path, monkeypatch, no_build
):
    monkeypatch.setenv("PEFT_SVDINIT_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "restored afterwards")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    lock = ops._own_folder() / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    # DeepSpeed itself may be building this one at the moment.
    other = lock.parents[1] / "fused_adam" / "lock"
    other.parent.mkdir()
    other.touch()
    ops.prepare_op(ops.COMMUNICATION)
    assert not lock.exists() and other.exists()
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]) == lock.parents[1]


@pytest.mark.deepspeed
@pytest.mark.usefixtures("no_build")
def test_a_lock_in_a_folder_of_the_users_is_refused_before_any_wait(tmp_path, monkeypatch):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"deepspeed_shm_comm/lock says that an op .* delete the"):
        ops.prepare_op(ops.COMMUNICATION)
    assert lock.exists()


def test_without_deepspeed_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "zero2.json").write_text("{}")
    with pytest.raises(ModuleNotFoundError, match=r"peft-svdinit\[deepspeed\]"):
        arguments(tmp_path, deepspeed=str(tmp_path / "zero2.json"))
