"""Trainings with a switch to low rank in one of several processes; run by the tests of DDP.

Argument: the folder for what it writes. Each process leaves `report-<rank>.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from stages.processes import leave_process_group

from peft_svdinit.low_rank import LowRankRule, low_rank_layers
from support.switching_runs import differences, logged, make_trainer, train, wide_model
from trainer_callbacks import AtStep, RankSwitchCallback, layer_switching
from trainer_callbacks.agreement import check_equal


def switch() -> RankSwitchCallback:
    return RankSwitchCallback(
        LowRankRule(ratio=0.25),
        lambda seen: seen.step >= 3,
        rebalance_steps=2,
        shrink=[(AtStep(6), LowRankRule(ratio=0.13))],
    )


def naive(folder: Path) -> str:
    """What is said when one process trains on with other parameters than the rest."""

    class Apart(RankSwitchCallback):
        def on_step_end(self, args, state, control, **kwargs):  # pyright: ignore
            if state.global_step == 4 and args.process_index:
                with torch.no_grad():
                    next(iter(low_rank_layers(kwargs["model"]).values())).U.add_(1e-6)
            super().on_step_end(args, state, control, **kwargs)

    try:
        train(folder, Apart(LowRankRule(ratio=0.25), AtStep(3)), per_device_train_batch_size=2)
    except RuntimeError as error:
        return str(error)
    return ""


def refused(folder: Path, rank: int) -> list[str]:
    """The reasons in each process when the first one alone finds that nothing can be switched."""

    def fails(*arguments: object) -> None:
        raise ValueError(f"process {rank} finds nothing")

    made = layer_switching.make_plan
    layer_switching.make_plan = fails  # pyright: ignore[reportAttributeAccessIssue]
    callback = RankSwitchCallback(LowRankRule(energy=0.5), AtStep(3))
    trainer = train(folder, callback, per_device_train_batch_size=2)
    layer_switching.make_plan = made
    assert trainer.state.global_step == 7
    return [each["reason"] for each in callback._memory.done]


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    report: dict = {"rank": rank}
    for unused in (None, False):
        options = {
            "per_device_train_batch_size": 2,
            "ddp_find_unused_parameters": unused,
            "train_sampling_strategy": "sequential",
        }
        whole = train(folder / str(unused), switch(), model=wide_model(), **options)
        check_equal(dict(whole.model.named_parameters()), "parameters")  # pyright: ignore
        report[f"losses {unused}"] = logged(whole)
        report[f"wrapper {unused}"] = type(whole.model_wrapped).__name__
        report[f"layers {unused}"] = len(low_rank_layers(whole.model))  # pyright: ignore
        for step in (2, 3, 5):
            checkpoint = folder / str(unused) / f"checkpoint-{step}"
            again = {"resume": checkpoint, "model": wide_model(), **options}
            resumed = train(folder / f"r{unused}{step}", switch(), **again)
            report[f"resumed {unused} {step}"] = differences(whole, resumed)
            del resumed
        del whole
    report["apart"] = naive(folder / "apart")
    report["refused"] = refused(folder / "refused", rank)
    compiled = make_trainer(
        folder / "compiled",
        switch(),
        model=wide_model(),
        torch_compile=True,
        torch_compile_backend="eager",
    )
    try:
        compiled.train()
    except ValueError as error:
        report["compiled"] = str(error)
    del compiled
    dist.barrier()
    (folder / f"report-{rank}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
    leave_process_group()
