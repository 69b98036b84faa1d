"""Scripts of this folder in processes of their own, one or two, and what they report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run_training(script: str, *arguments: str, processes: int = 2) -> str:
    """What a script of this folder said in one or two processes; fails with it."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # Benchmarks last: some are called as modules of others are.
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), *sys.path, str(ROOT / "recipes" / "benchmarks")]
        ),
    }
    launcher = TORCHRUN if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "tests" / "support" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stderr


def reports(folder: Path) -> list[dict[str, Any]]:
    """`report-<rank>.json` of each process."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("report-*.json"))]


def zero3_file(folder: Path) -> str:
    """A configuration of DeepSpeed's own form, whose sizes the Trainer fills in."""
    path = folder / "zero3.json"
    options = {
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": True,
            # By default weights of fewer than 100,000 numbers stay whole.
            "stage3_param_persistence_threshold": 0,
        },
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    path.write_text(json.dumps(options))
    return str(path)
