"""The files of a run directory: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import subprocess

import pytest
import torch

from peft_svdinit.training import (
    RUN_INFO,
    TRAINING_LOG,
    TrainingLog,
    describe_environment,
    read_run,
    read_training_log,
    runs,
    write_run_info,
)
from peft_svdinit.training.environment import git_revision
from peft_svdinit.training.log import COLUMNS

ROWS = [
    {"step": 0, "eval_loss": 4.0},
    {"step": 1, "epoch": 0.1, "tokens": 24, "loss": 0.1 + 0.2, "learning_rate": 1e-05},
    {"step": 2, "epoch": 0.2, "tokens": 48, "loss": math.nan, "grad_norm": math.inf},
    {"step": 2, "epoch": 0.2, "tokens": 48, "eval_loss": 2.5, "seconds": 1.5},
]


def info(**changes):
    values = {key: None for key in runs.INFO_KEYS if key != "format_version"}
    values |= {"status": "completed", "name": "student", "seed": 3, "metrics": {}, "extra": {}}
    values |= {"steps": 2, "max_steps": 2, "world_size": 1, "versions": {}, "hardware": {}}
    return values | changes


def write_run(directory, **changes):
    directory.mkdir(exist_ok=True)
    write_run_info(directory, info(**changes))
    TrainingLog(directory / TRAINING_LOG, ROWS)


def test_rows_come_back_exactly_with_nan_and_empty_cells(tmp_path):
    log = TrainingLog(tmp_path / "log.csv")
    for row in ROWS:
        log.append(row)
    read = read_training_log(tmp_path / "log.csv")
    assert len(read) == len(ROWS)
    for row, expected in zip(read, ROWS, strict=True):
        assert set(row) == {*COLUMNS, "eval_loss"}
        for column, value in row.items():
            assert repr(value) == repr(expected.get(column)), column


def test_a_file_started_with_rows_equals_one_they_were_appended_to(tmp_path):
    TrainingLog(tmp_path / "started.csv", ROWS)
    log = TrainingLog(tmp_path / "appended.csv")
    for row in ROWS:
        log.append(row)
    assert (tmp_path / "started.csv").read_bytes() == (tmp_path / "appended.csv").read_bytes()


def test_a_late_evaluation_column_widens_the_file_and_keeps_the_rows(tmp_path):
    log = TrainingLog(tmp_path / "log.csv", [{"step": 1, "loss": 3.0}])
    log.append({"step": 1, "eval_b_loss": 2.0})
    log.append({"step": 2, 'eval_odd, "name"': 1.0})
    rows = read_training_log(tmp_path / "log.csv")
    assert list(rows[0])[len(COLUMNS) :] == ["eval_b_loss", 'eval_odd, "name"']
    assert [row["loss"] for row in rows] == [3.0, None, None]
    assert [row["eval_b_loss"] for row in rows] == [None, 2.0, None]
    assert [row['eval_odd, "name"'] for row in rows] == [None, None, 1.0]


def test_widening_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch):
    log = TrainingLog(tmp_path / "log.csv", [{"step": 1, "loss": 3.0}])
    before = (tmp_path / "log.csv").read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.append({"step": 2, "eval_loss": 1.0})
    assert (tmp_path / "log.csv").read_bytes() == before
    assert os.listdir(tmp_path) == ["log.csv"]


def test_an_unknown_column_is_refused_and_not_written(tmp_path):
    log = TrainingLog(tmp_path / "log.csv")
    with pytest.raises(ValueError, match="'accuracy'"):
        log.append({"step": 1, "accuracy": 1.0})
    assert read_training_log(tmp_path / "log.csv") == []


def test_a_log_cut_at_any_byte_is_refused_or_gives_its_first_rows(tmp_path):
    path = tmp_path / "log.csv"
    TrainingLog(path, ROWS)
    content = path.read_bytes()
    whole = [repr(row) for row in read_training_log(path)]
    header = content.index(b"\n") + 1
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length < header:
            with pytest.raises(ValueError, match=r"log\.csv"):
                read_training_log(path, drop_torn_line=True)
            continue
        complete = content[:length].count(b"\n") - 1
        kept = [repr(row) for row in read_training_log(path, drop_torn_line=True)]
        assert kept == whole[:complete]
        if content[length - 1 : length] != b"\n":
            with pytest.raises(ValueError, match="torn"):
                read_training_log(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("step,epoch", "epoch,step", "header"),
        ("eval_loss", "accuracy", "header"),
        ("eval_loss", "eval_loss,eval_loss", "header"),
        ("\n1,", "\n1,,", "line 3: 9 cells expected, 10 found"),
        ("\n1,", "\n\n1,", "line 3: 9 cells expected, 0 found"),
        ("\n1,", "\n-1,", "line 3: step"),
        ("\n1,", "\n,", "line 3: step"),
        ("\n1,", "\n9,", "line 4: step must be present and not decrease, got '2'"),
        ("24,", "2.5,", "line 3: tokens must be a number, got '2.5'"),
        ("1e-05", "fast", "line 3: learning_rate must be a number, got 'fast'"),
        ("1e-05", '"1e-05', "not a training log"),
        ("1e-05", "\xff", "not a training log"),
    ],
)
def test_a_malformed_log_is_refused_with_its_place(tmp_path, old, new, message):
    path = tmp_path / "log.csv"
    TrainingLog(path, ROWS)
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode("latin-1"))
    with pytest.raises(ValueError, match=message) as caught:
        read_training_log(path)
    assert str(path) in str(caught.value)


def test_a_run_is_read_back(tmp_path):
    comparison = {"method": "svd_delta", "label": "SVD start"}
    write_run(tmp_path / "run", extra={"comparison": comparison})
    run = read_run(tmp_path / "run")
    assert (run.name, run.seed, run.completed) == ("student", 3, True)
    assert run.comparison == comparison
    assert run.final_eval_loss == 2.5
    assert [row["step"] for row in run.log] == [0, 1, 2, 2]


def test_a_run_may_be_outside_of_a_comparison(tmp_path):
    write_run(tmp_path / "run", status="running")
    TrainingLog(tmp_path / "run" / TRAINING_LOG, [{"step": 1, "loss": 1.0}])
    run = read_run(tmp_path / "run")
    assert (run.comparison, run.completed) == (None, False)
    assert run.final_eval_loss is None


def test_non_finite_numbers_are_null_in_run_json(tmp_path):
    metrics = {"eval_loss": math.nan, "eval_accuracy": 0.5}
    write_run_info(tmp_path, info(metrics=metrics, extra={"list": [math.inf, 1.0]}))
    written = json.loads((tmp_path / RUN_INFO).read_text(), parse_constant=pytest.fail)
    assert written["metrics"] == {"eval_loss": None, "eval_accuracy": 0.5}
    assert written["extra"] == {"list": [None, 1.0]}
    assert written["format_version"] == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / RUN_INFO).unlink(), r"run\.json does not exist"),
        (lambda d: (d / TRAINING_LOG).unlink(), r"training_log\.csv does not exist"),
        (
            lambda d: (d / RUN_INFO).write_bytes((d / RUN_INFO).read_bytes()[:-40]),
            "not readable JSON",
        ),
        (lambda d: (d / RUN_INFO).write_bytes(b"\xff\x00"), "not readable JSON"),
        (lambda d: (d / RUN_INFO).write_text("[]"), "must hold a JSON object, got list"),
        (lambda d: (d / RUN_INFO).write_text("{}"), "format_version 1, got null"),
        (lambda d: (d / RUN_INFO).write_text('{"format_version": 2}'), "format_version 1, got 2"),
        (lambda d: (d / RUN_INFO).write_text('{"format_version": 1}'), "lacks status, name"),
        (lambda d: write_run_info(d, info(status="done")), "status must be .* got 'done'"),
        (lambda d: write_run_info(d, info(extra=None)), "extra must be an object, got null"),
        (lambda d: (d / TRAINING_LOG).write_bytes(b"step,ep"), "torn"),
    ],
)
def test_a_broken_run_is_refused(tmp_path, spoil, message):
    write_run(tmp_path / "run")
    read_run(tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run")


def test_a_directory_that_is_not_there_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_run(tmp_path / "nowhere")


def test_the_environment_is_described_without_naming_the_machine():
    described = describe_environment(torch.device("cpu"))
    assert set(described) == {"versions", "git_revision", "hardware"}
    assert described["versions"]["torch"] == torch.__version__
    assert described["versions"]["python"] == platform.python_version()
    assert set(described["hardware"]) == {"cpu_cores", "device", "memory_gb"}
    assert described["hardware"]["device"] == "cpu"
    assert 1 <= described["hardware"]["cpu_cores"] <= (os.cpu_count() or 1)
    assert socket.gethostname() not in json.dumps(described["hardware"])


def test_git_revision_is_the_commit_of_tracked_files_only(tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            [*command, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert git_revision(tmp_path) is None
    git("init", "--quiet")
    assert git_revision(tmp_path) is None
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").touch()
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    assert git_revision(tmp_path / "package") == git("rev-parse", "HEAD")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "module.py").touch()
    assert git_revision(tmp_path / "site-packages") is None


def test_git_revision_is_none_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(tmp_path) is None
