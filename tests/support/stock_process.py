"""Scripts that run in a process of their own, which cannot import this project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_BLOCKED = """
import importlib.abc
import sys


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("peft_svdinit", "trainer_callbacks"):
            raise ModuleNotFoundError(name)
        return None


sys.meta_path.insert(0, Blocker())
try:
    import peft_svdinit
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("peft_svdinit can be imported: the test would prove nothing")

import torch

torch.set_num_threads(1)
"""

# Arguments: cases.json, which maps names to {"base", "adapter"} and "ids" to a file, and the
# file for the logits of each adapter, and of it merged.
LOGITS_OF_ADAPTERS = """
import json
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

cases = json.load(open(sys.argv[1]))
ids = load_file(cases.pop("ids"))["ids"]
found = {}
for name, case in cases.items():
    base = AutoModelForCausalLM.from_pretrained(case["base"])
    model = PeftModel.from_pretrained(base, case["adapter"]).eval()
    assert type(model.peft_config["default"]).__name__ == "LoraConfig"
    with torch.no_grad():
        found[name] = model(input_ids=ids).logits.contiguous()
        found[name + ".merged"] = model.merge_and_unload()(input_ids=ids).logits.contiguous()
assert "peft_svdinit" not in sys.modules
save_file(found, sys.argv[2])
"""


def run_without_us(folder: Path, script: str, *arguments: str) -> None:
    """Run `script` in `folder`, where `arguments` name files; fails with what it said."""
    path = folder / "stock.py"
    path.write_text(_BLOCKED + script)
    run = subprocess.run(
        [sys.executable, "-I", str(path), *(str(folder / argument) for argument in arguments)],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
