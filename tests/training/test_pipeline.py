"""Tasks are done once, redone when their inputs change, and restarted after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_svdinit.training import Task, run_tasks, selected_steps

STEPS = ("train", "extract", "compare")


def two_tasks(root: Path, log: list[str], **changed: int) -> list[Task]:
    def work(name: str):
        return lambda folder: (log.append(name), (folder / "result").write_text(name))[0]

    first = Task("train", "first", {"a": changed.get("a", 1)}, work("first"), root=root, cost=1)
    second = Task(
        "extract", "second", {"b": changed.get("b", 1)}, work("second"), [first], root=root, cost=1
    )
    return [first, second]


def run(tasks: list[Task], *steps: str) -> list[str]:
    lines: list[str] = []
    run_tasks(tasks, steps or STEPS, report=lines.append)
    return lines


def test_a_second_run_skips_what_is_done(tmp_path):
    log: list[str] = []
    run(two_tasks(tmp_path, log))
    lines = run(two_tasks(tmp_path, log))
    assert log == ["first", "second"]
    assert all("done before" in line for line in lines)


def test_changed_inputs_redo_the_task_and_what_comes_after(tmp_path):
    log: list[str] = []
    run(two_tasks(tmp_path, log))
    run(two_tasks(tmp_path, log, b=2))
    assert log == ["first", "second", "second"]
    run(two_tasks(tmp_path, log, a=2))
    assert log[3:] == ["first", "second"]


def test_a_failed_task_is_not_done_and_is_tried_again_in_its_folder(tmp_path):
    found: list[bool] = []

    def fail_once(folder: Path) -> None:
        found.append((folder / "half").exists())
        (folder / "half").touch()
        if len(found) == 1:
            raise KeyboardInterrupt

    task = Task("train", "fragile", {}, fail_once, root=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run([task])
    assert not task.done
    run([task])
    assert task.done and found == [False, True]


def test_a_step_whose_inputs_are_missing_is_refused_before_any_work(tmp_path):
    log: list[str] = []
    with pytest.raises(RuntimeError, match="second needs first of step train"):
        run(two_tasks(tmp_path, log), "extract")
    assert not log


def test_equal_tasks_run_once(tmp_path):
    log: list[str] = []
    run([*two_tasks(tmp_path, log), *two_tasks(tmp_path, log)])
    assert log == ["first", "second"]


def test_other_processes_join_collective_tasks_only(tmp_path):
    log: list[str] = []
    tasks = [
        Task("train", "together", {}, lambda folder: log.append("together"), collective=True,
             root=tmp_path),
        Task("train", "alone", {}, lambda folder: log.append("alone"), root=tmp_path),
    ]  # fmt: skip
    run_tasks(tasks, STEPS, report=lambda line: None, is_main=False)
    assert log == ["together"] and not any(task.done for task in tasks)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, STEPS),
        ({"from_step": "extract"}, ("extract", "compare")),
        ({"to_step": "2"}, ("train", "extract")),
        ({"only": "3"}, ("compare",)),
        ({"from_step": "2", "to_step": "extract"}, ("extract",)),
    ],
)
def test_steps_are_chosen_by_name_or_number(options, expected):
    chosen = {"from_step": None, "to_step": None, "only": None, **options}
    assert tuple(selected_steps(STEPS, **chosen)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from_step": "4"}, "from_step must be one of 1 train, 2 extract, 3 compare; got '4'"),
        ({"only": "fit"}, "only must be one of"),
        ({"from_step": "compare", "to_step": "train"}, "comes after"),
        ({"only": "train", "from_step": "train"}, "cannot be combined"),
    ],
)
def test_wrong_steps_are_refused(options, message):
    chosen = {"from_step": None, "to_step": None, "only": None, **options}
    with pytest.raises(ValueError, match=message):
        selected_steps(STEPS, **chosen)
