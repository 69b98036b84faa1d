"""What is imported when: nothing heavy before it is needed, and PEFT knows us once it is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


TUNER = (
    "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners; print(tuners['LORA'].__name__)"
)


@pytest.mark.parametrize(
    ("script", "tuner"),
    [
        ("import peft_svdinit; import peft", "SvdLoraModel"),
        ("import peft; import peft_svdinit", "SvdLoraModel"),
        ("from peft_svdinit import LoriConfig", "SvdLoraModel"),
        ("from peft_svdinit.tuner.config.svd import SvdLoraConfig", "SvdLoraModel"),
        ("import peft_svdinit; peft_svdinit.unregister(); import peft", "LoraModel"),
        ("import peft", "LoraModel"),
    ],
)
def test_peft_knows_us_whichever_is_imported_first(script, tuner):
    assert said_by(f"{script}\n{TUNER}") == tuner
