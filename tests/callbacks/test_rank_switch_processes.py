"""A switch to low rank in two processes: one model, one course, and no silent divergence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.switching_runs import logged, train, wide_model

from peft_svdinit.low_rank import LowRankRule
from trainer_callbacks import AtStep, RankSwitchCallback

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    paths = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "tests")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    script = ROOT / "tests/support/rank_switch_process.py"
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(script), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"report-{r}.json").read_text()) for r in range(2)]


@pytest.mark.slow
def test_both_processes_go_on_as_one(reports, tmp_path):
    first, second = ({k: v for k, v in each.items() if k != "rank"} for each in reports)
    assert first == second
    for unused in (None, False):
        assert first[f"wrapper {unused}"] == "DistributedDataParallel"
        assert first[f"layers {unused}"] == 14
    alone = RankSwitchCallback(
        LowRankRule(ratio=0.25),
        AtStep(3),
        rebalance_steps=2,
        shrink=[(AtStep(6), LowRankRule(ratio=0.13))],
    )
    one = train(tmp_path, alone, model=wide_model(), train_sampling_strategy="sequential")
    assert first["losses None"] == pytest.approx(logged(one), abs=1e-3)


@pytest.mark.slow
def test_a_resume_in_both_processes_is_bit_equal(reports):
    for unused in (None, False):
        for step in (2, 3, 5):
            assert reports[0][f"resumed {unused} {step}"] == []


@pytest.mark.slow
def test_processes_that_drift_apart_are_noticed(reports):
    assert "the processes hold different parameters a step after the switch" in reports[1]["apart"]
    assert "model.layers.0.self_attn.q_proj.U is the first of 1" in reports[0]["apart"]


@pytest.mark.slow
def test_a_compiled_model_in_several_processes_is_refused(reports):
    assert "DDP without torch_compile" in reports[0]["compiled"]


@pytest.mark.slow
def test_the_first_process_decides_and_none_waits_for_another(reports):
    assert [each["refused"] for each in reports] == [["process 0 finds nothing"]] * 2
