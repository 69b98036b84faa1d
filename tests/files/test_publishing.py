"""Several files that appear together, and what killed writers leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from peft_svdinit.files import publishing, read_together, replacing, workspace, write_text
from peft_svdinit.files.workspaces import clean_once, is_workspace

RESULT = {"a.txt": "new a", "b.txt": "new b"}


@pytest.fixture(autouse=True)
def a_new_process():
    """Folders are cleaned once in a process, and every test stands for one."""
    clean_once.cache_clear()


def publish(folder: Path, texts: dict[str, str] = RESULT, **options: Any) -> None:
    with publishing(folder, **options) as new:
        for name, text in texts.items():
            (new / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def filled(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("exists", [False, True])
def test_all_files_appear_in_a_new_and_in_an_empty_folder(tmp_path, exists):
    folder = tmp_path / "deep" / "result"
    if exists:
        folder.mkdir(parents=True)
    with publishing(folder) as new:
        (new / "a.txt").write_text("new a")
        assert not folder.exists() or not (folder / "a.txt").exists()
        (new / "b.txt").write_text("new b")
    assert content(folder) == RESULT
    assert list(folder.parent.iterdir()) == [folder]


def test_other_files_stay_and_those_of_an_earlier_result_go(tmp_path):
    folder = filled(tmp_path / "result", a="old a", figure="old figure", mine="mine")
    publish(folder, replaces=["figure.txt", "never.txt"])
    assert content(folder) == {**RESULT, "mine.txt": "mine"}
    assert sorted(os.listdir(folder)) == ["a.txt", "b.txt", "mine.txt"]


def test_a_link_leads_to_the_folder_that_is_written(tmp_path):
    folder = filled(tmp_path / "real", mine="mine")
    (tmp_path / "link").symlink_to(folder)
    publish(tmp_path / "link")
    assert content(folder) == {**RESULT, "mine.txt": "mine"}
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt()])
def test_an_error_while_files_are_written_leaves_everything_as_it_was(tmp_path, error):
    folder = filled(tmp_path / "result", a="old a")
    for target in (folder, tmp_path / "new"):
        with pytest.raises(type(error)), publishing(target) as new:
            (new / "a.txt").write_text("half")
            raise error
    assert content(tmp_path) == {"result/a.txt": "old a"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("moment", range(4))
def test_an_error_while_files_change_places_leaves_everything_as_it_was(
    tmp_path, monkeypatch, moment
):
    folder = filled(tmp_path / "result", a="old a", b="old b")
    plain, count = os.rename, [0]

    def failing(source: Path, target: Path) -> None:
        if Path(source).suffix == ".txt":
            count[0] += 1
            if count[0] == moment + 1:
                raise OSError("disk gone")
        plain(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk gone"):
        publish(folder)
    assert content(folder) == {"a.txt": "old a", "b.txt": "old b"}
    assert sorted(os.listdir(folder)) == ["a.txt", "b.txt"]


KILLED = """
import os, signal, sys
from peft_svdinit.files import publishing
plain, left = os.rename, [int(sys.argv[2])]
def rename(source, target):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    plain(source, target)
os.rename = rename
with publishing(sys.argv[1]) as new:
    for name in ("a", "b"):
        (new / f"{name}.txt").write_text(f"new {name}")
    if sys.argv[2] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(folder: Path, renames: int) -> None:
    command = [sys.executable, "-c", KILLED, str(folder), str(renames)]
    assert subprocess.run(command, check=False).returncode == -9


@pytest.mark.parametrize("renames", range(5))
def test_a_kill_never_leaves_new_files_beside_old_ones_and_the_next_run_mends(tmp_path, renames):
    folder = filled(tmp_path / "result", a="old a", b="old b", mine="mine")
    killed(folder, renames)
    seen = {text for name, text in content(folder).items() if "/" not in name} - {"mine"}
    assert len({text.split()[0] for text in seen}) <= 1, seen
    clean_once(folder)
    begun = renames > 0
    words = "new" if begun else "old"
    assert content(folder) == {"a.txt": f"{words} a", "b.txt": f"{words} b", "mine.txt": "mine"}
    assert not any(is_workspace(name) for name in os.listdir(folder))


def test_what_a_kill_left_beside_a_new_folder_goes_with_the_next_write_there(tmp_path):
    killed(tmp_path / "result", 0)
    assert [is_workspace(path.name) for path in tmp_path.iterdir()] == [True]
    write_text(tmp_path / "notes.txt", "another file")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_workspace_whose_writer_lives_is_left_alone(tmp_path):
    folder = filled(tmp_path / "result", a="old a")
    waiting = (
        "import sys\nfrom peft_svdinit.files import publishing\n"
        "with publishing(sys.argv[1]) as new:\n"
        "    (new / 'a.txt').write_text('of the other')\n"
        "    print(flush=True)\n    sys.stdin.readline()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", waiting, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdin and other.stdout and other.stdout.readline()
    publish(folder)
    assert content(folder)["a.txt"] == "new a"
    other.communicate("\n")
    assert other.returncode == 0
    assert content(folder) == {**RESULT, "a.txt": "of the other"}


def test_folders_of_users_are_no_workspaces(tmp_path):
    for name in (".result", ".result.old", ".result.backup01", "a.writing", ".git.lock"):
        (tmp_path / name).mkdir()
    publish(tmp_path / "result")
    assert len(list(tmp_path.iterdir())) == 6


def test_publications_at_once_never_mix(tmp_path):
    folder = tmp_path / "result"
    names = [f"{n}.txt" for n in range(20)]

    def write(word: str) -> None:
        for _ in range(10):
            publish(folder, dict.fromkeys(names, word))

    threads = [threading.Thread(target=write, args=(word,)) for word in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = content(folder)
    assert found.keys() == set(names) and len(set(found.values())) == 1
    assert sorted(os.listdir(tmp_path)) == ["result"]


@pytest.mark.parametrize("number", [28, 122])
def test_a_full_disk_is_said_by_the_name_of_what_could_not_be_written(tmp_path, number):
    with pytest.raises(OSError, match=r"/result cannot be written, the disk is full \(.Errno"):
        with publishing(tmp_path / "result") as new, replacing(new / "a.txt"):
            raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_leaves_and_names_what_may_be_alive(
    tmp_path, monkeypatch, caplog
):
    killed(tmp_path / "result", 0)
    (left,) = tmp_path.iterdir()

    def acquire(lock: object, **options: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(sys.modules[clean_once.__module__].FileLock, "acquire", acquire)
    publish(tmp_path / "result")
    assert content(tmp_path / "result") == RESULT and left.exists()
    assert str(left) in caplog.text and "delete it" in caplog.text


def test_a_workspace_that_was_taken_for_dead_before_it_was_locked_is_made_again(
    tmp_path, monkeypatch
):
    locks = sys.modules[clean_once.__module__].FileLock
    plain, seen = locks.acquire, []

    def acquire(lock, **options):
        seen.append(Path(lock.lock_file).parent)
        taken = plain(lock, **options)
        if len(seen) == 1:
            shutil.rmtree(seen[0])
        return taken

    monkeypatch.setattr(locks, "acquire", acquire)
    with workspace(tmp_path, "result") as place:
        assert len(seen) == 2 and place == seen[1] != seen[0]
    assert list(tmp_path.iterdir()) == []


def test_files_of_two_results_are_never_read_together(tmp_path):
    publish(tmp_path / "result")
    with read_together(tmp_path / "result" / "a.txt", "adapter"):
        assert content(tmp_path / "result") == RESULT
    with pytest.raises(ValueError, match=r"^adapter: .*/result was changed while it was read"):
        with read_together(tmp_path / "result" / "a.txt", "adapter"):
            publish(tmp_path / "result")
