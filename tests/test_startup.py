"""What is imported when: nothing heavy before it is needed, and PEFT knows us once it is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEFORE = Path(__file__).parent / "data" / "before"
HEAVY = ("torch", "transformers", "peft")


def said_by(script: str) -> str:
    """What a process of its own prints last."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def loaded_after(script: str) -> set[str]:
    """Which of the heavy packages a script imports."""
    return set(
        said_by(f"{script}\nimport sys; print(*(m for m in {HEAVY} if m in sys.modules))").split()
    )


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["extract", "--help"], ["resize", "--rnk", "3"], ["merge", "--method", "catt"]],
)
def test_help_and_a_mistyped_option_are_answered_without_what_is_heavy(arguments):
    run = f"from peft_svdinit.cli import main\ntry: main({arguments})\nexcept SystemExit: pass"
    assert loaded_after(run) == set()


def test_the_package_costs_nothing_until_it_is_used():
    assert loaded_after("import peft_svdinit") == set()
    assert loaded_after("from peft_svdinit.linalg import truncated_svd") == {"torch"}
    assert "peft" not in loaded_after("from peft_svdinit import FactorsFile, weight_factors")


def test_work_on_factors_and_masks_needs_no_model_library(tmp_path):
    verbs = [
        ["analyze", "--factors", str(BEFORE / "factors"), "--lora_r", "1"],
        ["export", "--adapter", str(BEFORE / "compact")],
    ]
    for argv in verbs:
        argv += ["--output_dir", str(tmp_path / argv[0])]
    verbs[0] += ["--plots", "false"]
    run = f"from peft_svdinit.cli import main\nfor argv in {verbs}: main(argv)"
    assert loaded_after(run) == {"torch"}


TUNER = (
    "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners; print(tuners['LORA'].__name__)"
)


@pytest.mark.parametrize(
    ("script", "tuner"),
    [
        ("import peft_svdinit; import peft", "SvdLoraModel"),
        ("import peft; import peft_svdinit", "SvdLoraModel"),
        ("from peft_svdinit.tuner.config.svd import SvdLoraConfig", "SvdLoraModel"),
        ("import peft_svdinit; peft_svdinit.unregister(); import peft", "LoraModel"),
    ],
)
def test_peft_knows_us_whichever_is_imported_first(script, tuner):
    assert said_by(f"{script}\n{TUNER}") == tuner


@pytest.mark.parametrize(
    "other",
    [
        "from peft_svdinit.tuner.config.svd import SvdLoraConfig",
        "from peft_svdinit import LoriConfig",
    ],
)
def test_threads_that_import_peft_and_us_at_once_do_not_wait_for_each_other(other):
    script = f"""
import threading
import peft_svdinit
failed, together = [], threading.Barrier(2)
def run(statement):
    together.wait()
    try:
        exec(statement)
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=run, args=[each]) for each in ("import peft", {other!r})]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
"""
    assert said_by(f"{script}\n{TUNER}") == "SvdLoraModel"
