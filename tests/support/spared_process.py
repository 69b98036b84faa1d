"""One LoRI calibration in one of several processes; run by a test.

Argument: the folder. When training ends, the first process finds nothing to write to. Each process
leaves `report-<rank>.json`, the first one the adapter in `final`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from stages.processes import leave_process_group
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_svdinit import LoriConfig
from support.peft_fixtures import tiny_base, tokens
from trainer_callbacks.comparison import ComparisonCallback
from trainer_callbacks.lori_calibration import LoriCalibrationCallback


class TakeAway(TrainerCallback):
    """Puts a file where the folder was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.folder.rename(f"{self.folder}-before")
            self.folder.write_text("taken")


def main(folder: Path) -> None:
    """Train, save, report."""
    torch.set_num_threads(1)
    set_seed(11)
    config = LoriConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", lori_density=1.0)
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens(batch=24, length=6, seed=3)]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=2, per_device_train_batch_size=2,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, ddp_timeout=60,
    )  # fmt: skip
    out = folder / "out"
    callbacks = [
        TakeAway(out),
        ComparisonCallback(output_dir=str(out)),
        LoriCalibrationCallback(output_dir=out, score="magnitude_gradient"),
    ]
    trainer = Trainer(
        get_peft_model(tiny_base(), config), arguments, train_dataset=rows, callbacks=callbacks
    )
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(folder / "final"))
    report = {"world_size": arguments.world_size, "steps": trainer.state.global_step}
    (folder / f"report-{os.environ['RANK']}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
