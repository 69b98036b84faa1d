"""One LoRI training in one of several processes; run by the tests of distributed training.

Arguments: the folder for what it writes, the batch of one process, and, if there is one, the file
of a DeepSpeed configuration. Each process leaves `report-<rank>.json`, the first one the adapter in
`final`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from stages.processes import leave_process_group
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments, set_seed

from support.lori_fixtures import lori_model, off_mask
from support.peft_fixtures import tokens

STEPS = 4


def main(folder: Path, batch: int, deepspeed: str | None, resume: bool) -> None:
    """Train, save, report."""
    torch.set_num_threads(1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        save_steps=STEPS // 2,
        logging_steps=1,
        seed=11,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=deepspeed,
    )
    set_seed(11)
    model = lori_model(lori_scope="matrix")
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens(batch=24, length=6, seed=3)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    report = {
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "trained": sum(
            getattr(weight, "ds_numel", weight.numel())
            for weight in model.parameters()
            if weight.requires_grad
        ),
        "lora_buffers": [name for name, _ in model.named_buffers() if "lora_" in name],
    }
    if isinstance(trainer.model_wrapped, DistributedDataParallel):
        data: Any = trainer.model_wrapped._get_ddp_logging_data()
        report["reduced_bytes"] = data["total_parameter_size_bytes"]
    if deepspeed is None:
        optimizer: Any = trainer.optimizer
        state = optimizer.state
        report["state_sizes"] = sorted({entry["exp_avg"].numel() for entry in state.values()})
        report["sizes"] = sorted({w.numel() for w in model.parameters() if w.requires_grad})
        values = b"".join(w.detach().numpy().tobytes() for w in model.parameters())
        report["hash"] = hashlib.sha256(values).hexdigest()
        report["off_mask_moved"] = [name for name, rest in off_mask(model).items() if rest.any()]
    rank = os.environ.get("RANK", "0")
    (folder / f"report-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    given = sys.argv[1:]
    resuming = "--resume" in given
    given = [argument for argument in given if argument != "--resume"]
    main(Path(given[0]), int(given[1]), given[2] if len(given) > 2 else None, resuming)
    leave_process_group()
