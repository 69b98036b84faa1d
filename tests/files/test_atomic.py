"""Files that are whole or not there."""

from __future__ import annotations

import json
import math
import stat

import pytest

from peft_svdinit.files import replacing, write_json, write_text


def test_text_is_written_as_utf_8_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "first, and longer")
    write_text(path, "σ²")
    assert path.read_bytes() == "σ²".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "notes.txt", "x")
    assert (tmp_path / "a" / "b" / "notes.txt").read_text() == "x"


def test_json_is_indented_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "value.json", {"b": [1, None], "a": 0.5})
    text = (tmp_path / "value.json").read_text()
    assert json.loads(text) == {"b": [1, None], "a": 0.5}
    assert text.startswith('{\n  "b"') and text.endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}])
def test_values_that_json_has_not_leave_the_old_file(tmp_path, value):
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"value": value})
    assert path.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_midway_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_target_is_untouched_until_the_end(tmp_path):
    path = tmp_path / "notes.txt"
    with replacing(path) as temporary:
        assert temporary.name == path.name
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"


def test_a_file_never_replaces_a_directory(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(IsADirectoryError):
        write_text(path, "new")
    assert [inside.name for inside in path.iterdir()] == ["old.txt"]


def test_files_have_the_permissions_of_a_plain_write(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "atomic", "x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1
