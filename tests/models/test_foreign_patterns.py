"""Regular expressions of a stranger's configuration: broken, endless, or those that PEFT takes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from peft_svdinit.models import check_adapter_config, foreign_patterns, refuse_endless_patterns

NAMES = [f"model.layers.{block}.self_attn.{end}_proj" for block in range(3) for end in "qkv"]
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}


@pytest.mark.parametrize(
    "option",
    ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "modules_to_save"],
)
@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("((", "no regular expression .*unterminated"),
        ("a**", "no regular expression .*multiple repeat"),
        ("a{99999999999999999999}", "no regular expression .*too large"),
        ("(" * 4000 + ")" * 4000, "no regular expression"),
        (".*.*" * 5000, "more than 10,000 characters"),
    ],
)
def test_an_expression_that_is_none_is_named(option, expression, reason):
    value = {"rank_pattern": {expression: 4}, "modules_to_save": [expression]}
    config = {**LORA, option: value.get(option, expression)}
    with pytest.raises(ValueError, match=f"adapter: x: {option}: .*{reason}"):
        check_adapter_config(config, "adapter: x: ")


@pytest.mark.parametrize(
    "expression",
    ["([a-z.0-9_]+)+=", "(.*)*x", r"(?:\w|.)+\Z!", ".*" * 9 + "=", "(.|.)" * 30 + "="],
)
def test_an_expression_without_end_is_refused_after_seconds(monkeypatch, expression):
    monkeypatch.setattr(foreign_patterns, "_SECONDS", 0.2)
    config = {**LORA, "alpha_pattern": {"q_proj": 2, r".*\.v_(proj)": 1, expression: 4}}
    check_adapter_config(config, "")
    with pytest.raises(ValueError, match=r"^here: alpha_pattern: .* takes longer than 0\.2 s"):
        refuse_endless_patterns(config, NAMES, "here: ")


def test_what_layers_are_chosen_by_is_taken_and_simple_choices_cost_no_process(monkeypatch):
    intricate = r"^(?!.*visual)(?:.*\.)?(?:self_attn|mlp)\.(?:q|k|v)_proj$"
    refuse_endless_patterns({**LORA, "target_modules": intricate}, NAMES, "")
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    refuse_endless_patterns({**LORA, "target_modules": intricate}, NAMES, "")  # Once is enough.
    simple = {
        "target_modules": r".*\.(q|v)_proj",
        "rank_pattern": {"q_proj": 4, r"^(?:model\.layers\.0\.a|model\.layers\.1\.[ab])": 2},
        "alpha_pattern": {f"model.layers.{block}.self_attn.q_proj": 2 for block in range(600)},
        "modules_to_save": ["lm_head"],
        "layers_pattern": None,
    }
    config = {**LORA, **simple}
    check_adapter_config(config, "")
    refuse_endless_patterns(config, NAMES, "")


def test_a_trial_ends_where_whoever_began_it_is_gone():
    given = json.dumps([[["(a+)+=", True]], ["a" * 40], 1])
    trial = [sys.executable, "-I", "-S", "-c", foreign_patterns._TRIAL]
    done = subprocess.run(trial, input=given, text=True, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGALRM
