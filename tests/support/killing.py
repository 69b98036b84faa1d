"""Functions run in forks of this process that die, stop or find the disk full when they are told.

A fork, for a process of its own would take ten seconds to import what a verb needs.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import io
import mmap
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import safetensors

# Audit events of what changes a folder, and which of their arguments are paths.
_CHANGES = {
    "open": (0,),
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.link": (0, 1),
    "os.symlink": (1,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
}
_SAFE_OPEN = "safetensors.safe_open"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NEED_SPACE = ("open", "os.mkdir")
_SECONDS = 900
_LOG_BYTES = 1 << 20


@dataclass(frozen=True)
class Fate:
    """What befalls a process, and when.

    Attributes:
        deed: "kill" as by SIGKILL; "stop" until it is told to go on; "full": from then on the disk
            is full.
        event: before which event in the watched folder, counted from 0.
        size: or within a write, when a file reaches this many bytes; not to be stopped then.
        of: whether events are changes, or files that are opened to be read.
    """

    deed: Literal["kill", "stop", "full"]
    event: int | None = None
    size: int | None = None
    of: Literal["changes", "reads"] = "changes"


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit status, or minus the signal that killed it.
        said: on stdout and stderr together.
        events: in the watched folder, in order; before the last one it ended, if it was killed.
    """

    code: int
    said: str
    events: list[str]

    @property
    def killed(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGXFSZ)


class Child:
    """A fork of this process that runs a function; nothing of this process is cleaned up there.

    Args:
        run: the function; an exception is its traceback and status 1, as of any program.
        watched: the folder whose events count.
        fate: what befalls it.
        seconds: after which it is ended, with a traceback.
    """

    def __init__(
        self,
        run: Callable[[], Any],
        watched: Path,
        fate: Fate | None = None,
        seconds: float = _SECONDS,
    ) -> None:
        self._status: int | None = None
        self._said, said = os.pipe()
        self._log = mmap.mmap(-1, _LOG_BYTES)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        gc.freeze()  # Or the first collection of the child would copy all memory.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Of the test runner's threads.
            self.pid = os.fork()
        if not self.pid:
            _become(run, _Watch(watched, fate, self._log), said, seconds)
        gc.unfreeze()
        os.close(said)

    def stops(self, seconds: float | None = None) -> bool:
        """Wait until the process stops, True, or ends or some seconds are over, False."""
        end = None if seconds is None else time.monotonic() + seconds
        while self._status is None and (end is None or time.monotonic() < end):
            found, status = os.waitpid(self.pid, os.WUNTRACED | (os.WNOHANG if end else 0))
            if found and os.WIFSTOPPED(status):
                return True
            self._status = status if found else None
            time.sleep(0.001)
        return False

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def ended(self) -> Ended:
        """Wait for the end."""
        with open(self._said, "rb") as said:
            text = said.read().decode(errors="replace")
        self.stops()
        code = os.waitstatus_to_exitcode(self._status or 0)
        events = self._log[:].split(b"\0", 1)[0].decode(errors="replace").splitlines()
        self._log.close()
        return Ended(code, text, events)


def in_child(run: Callable[[], Any], watched: Path, seconds: float = _SECONDS) -> Ended:
    """Run a function in a fork of this process."""
    return Child(run, watched, seconds=seconds).ended()


class _Watch:
    """Counts the events in a folder and brings about what is to happen at one of them."""

    def __init__(self, folder: Path, fate: Fate | None, log: mmap.mmap) -> None:
        self._folder, self._fate, self._log = str(folder), fate, log
        self._seen = 0

    def begin(self) -> None:
        if self._fate and self._fate.size is not None:
            action = signal.SIG_DFL if self._fate.deed == "kill" else signal.SIG_IGN
            signal.signal(signal.SIGXFSZ, action)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._fate.size, self._fate.size))
        reads = self._fate is not None and self._fate.of == "reads"
        if reads:
            _audit_safe_open()
        sys.addaudithook(self._read if reads else self._change)

    def _change(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES or (event == "open" and not (arguments[2] or 0) & _WRITING):
            return
        paths = [_text(arguments[position]) for position in _CHANGES[event]]
        # What is named relative to an open folder is removed by shutil.rmtree.
        below = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if event == "os.mkdir" and os.path.isdir(paths[0]):
            return
        if below or any(path.startswith(self._folder) for path in paths):
            self._strike(event, paths)

    def _read(self, event: str, arguments: tuple[Any, ...]) -> None:
        plain = event == "open" and not (arguments[2] or 0) & _WRITING
        if plain or event == _SAFE_OPEN:
            path = _text(arguments[0])
            if path.startswith(self._folder):
                self._strike(event, [path])

    def _strike(self, event: str, paths: list[str]) -> None:
        line = f"{event} {' '.join(path.removeprefix(self._folder) for path in paths)}\n".encode()
        if self._log.tell() + len(line) < len(self._log):
            self._log.write(line)
        number, self._seen = self._seen, self._seen + 1
        fate = self._fate
        if fate is None or fate.event is None or number < fate.event:
            return
        if fate.deed == "full" and event in _NEED_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), paths[0])
        if fate.deed != "full" and number == fate.event:
            os.kill(os.getpid(), signal.SIGKILL if fate.deed == "kill" else signal.SIGSTOP)


def _audit_safe_open() -> None:
    """Let safetensors raise an event, as Python's own functions do."""

    plain = safetensors.safe_open

    def audited(path: Any, *arguments: Any, **options: Any) -> Any:
        sys.audit(_SAFE_OPEN, path)
        return plain(path, *arguments, **options)

    for module in list(sys.modules.values()):
        if vars(module).get("safe_open") is plain:
            vars(module)["safe_open"] = audited


def _text(path: Any) -> str:
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)


def _become(run: Callable[[], Any], watch: _Watch, said: int, seconds: float) -> NoReturn:
    """Be a program that runs a function, with its output in a pipe."""
    code = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        output = io.TextIOWrapper(io.FileIO(said, "w"), encoding="utf-8", write_through=True)
        sys.stdout = sys.stderr = output
        faulthandler.dump_traceback_later(seconds, exit=True, file=said)
        watch.begin()
        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                output.write(f"{end.code}\n")
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)
