"""`svdinit push` killed before or after any of its requests, and then run again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from huggingface_hub import get_session
from support.hub import WRITE, StandInHub, stand_in_hub
from support.killing import Ended, in_child

from peft_svdinit.cli import main

pytestmark = pytest.mark.slow

Files = dict[str, bytes]


def push(folder: Path, *, killed_at: int | None = None, answered: bool = False) -> Ended:
    """Push in a process that is killed before a request, or when its answer has come."""
    argv = [
        "push",
        "--folder",
        str(folder),
        "--repo_id",
        "user/shared",
        "--base_model",
        "user/base",
    ]
    session: Any = type(get_session())
    send, sent = session.send, -1

    def mortal(client: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += 1
        if sent == killed_at and not answered:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = send(client, *arguments, **options)
        if sent == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    with patch.object(session, "send", mortal):
        return in_child(lambda: main(argv), folder)


def begun(hub: StandInHub, inputs: Path) -> Files:
    """A repository with another adapter in it; its files."""
    hub.add("user/base", {"config.json": b"{}", "README.md": b"# Base\n"})
    made = push(inputs / "two")
    assert made.code == 0, made.said
    return hub.files("user/shared")


def test_a_killed_push_leaves_the_old_files_or_the_new_and_goes_through_run_again(
    inputs, tmp_path, thorough
):
    with stand_in_hub() as hub, hub.in_this_process(tmp_path / "cache", WRITE):
        old, before = begun(hub, inputs), len(hub.log)
        made = push(inputs / "one")
        assert made.code == 0, made.said
        new, requests = hub.files("user/shared"), len(hub.log) - before
        commit = [entry.route for entry in hub.log[before:]].index("commit")
    faults = []
    for at in range(requests) if thorough else [commit]:
        for answered in (False, True):
            with stand_in_hub() as hub, hub.in_this_process(tmp_path / f"{at}{answered}", WRITE):
                begun(hub, inputs)
                killed = push(inputs / "one", killed_at=at, answered=answered)
                left = hub.files("user/shared")
                again = push(inputs / "one")
                if not killed.killed or left not in (old, new):
                    faults.append(f"{at}: {killed.code}, {killed.said}, {sorted(left)}")
                if again.code or hub.files("user/shared") != new:
                    faults.append(f"{at}: run again {again.code}: {again.said}")
    assert not faults, "\n".join(faults)
