"""A Hub on this machine: real HTTP for huggingface_hub, with faults on demand and a log.

    with stand_in_hub() as hub:
        hub.add("user/base", folder)
        hub.fail("commit", status=503, times=2, headers={"Retry-After": "0"})
        with hub.in_this_process(tmp_path, token=WRITE):
            upload_folder(repo_id="user/new", folder_path=folder)
        assert len(hub.requests("commit")) == 3

Large files live on a second port, as the real Hub's live with another host: a token sent there
would show in the log.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

from .hub_repositories import Repository, User, files_of
from .hub_request import Answer, Shelf, as_json
from .hub_routes import called

WRITE, READ, STRANGER = "hf_writes", "hf_reads", "hf_stranger"
"""Tokens: of `user`, who may write with the first, and of `stranger`, who owns nothing here."""


@dataclass
class Logged:
    """One request; `status` is None if its answer was never sent. Bytes are those of bodies."""

    method: str
    path: str
    route: str
    authorized: bool
    received: int = 0
    sent: int = 0
    status: int | None = None


@dataclass
class Fault:
    """Meets the next `times` requests of a route (every one if None), after the first `skip`."""

    route: str
    method: str = ""
    path: str = ""
    times: int | None = 1
    skip: int = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after_bytes: int | None = None
    answer_is_lost: bool = False

    def meets(self, request: Logged, length: int) -> bool:
        """Whether it is for a request whose body, or whose answer's, has `length` bytes."""
        if self.route != request.route or self.method not in ("", request.method):
            return False
        if self.path not in request.path or self.times == 0:
            return False
        if self.after_bytes is not None and self.after_bytes >= length:
            return False
        self.skip -= 1
        return self.skip < 0


class StandInHub:
    def __init__(self) -> None:
        self.tokens = {WRITE: User("user"), READ: User("user", write=False)}
        self.tokens[STRANGER] = User("stranger")
        self.shelf = Shelf(tokens=self.tokens)
        self.log: list[Logged] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return self.shelf.url

    def add(
        self,
        name: str,
        files: Path | Mapping[str, bytes],
        *,
        kind: str = "model",
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
        readers: Iterable[str] = (),
    ) -> str:
        """Commits exactly `files`, or a folder's, to a branch, and makes what is missing.

        Returns:
            The commit's sha.
        """
        with self.lock:
            new = Repository(kind, name, private, gated, tuple(readers))
            repository = self.shelf.repositories.setdefault((kind, name), new)
            content = files_of(files) if isinstance(files, Path) else files
            return repository.commit(f"refs/heads/{revision}", "Added by a test", content).sha

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.shelf.repositories[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Of a repository that the client created, `.gitattributes` is one of them."""
        commit = self.repository(name, kind).at(revision)
        if commit is None:
            raise KeyError(f"{name} has no revision {revision}")
        return dict(commit.files)

    def fail(self, route: str, *, status: int, times: int | None = 1, **more) -> None:
        """Answers the next requests of a route with an error; see `Fault` for `more`."""
        self.faults.append(Fault(route, status=status, times=times, **more))

    def cut(self, route: str, *, after_bytes: int, times: int | None = 1, **more) -> None:
        """Closes the connection within the body of a request, or of the answer to a GET."""
        self.faults.append(Fault(route, after_bytes=after_bytes, times=times, **more))

    def lose_answer(self, route: str, *, times: int | None = 1, **more) -> None:
        """Does what a request asks for and closes the connection without an answer."""
        self.faults.append(Fault(route, answer_is_lost=True, times=times, **more))

    def next_fault(self, request: Logged, length: int) -> Fault | None:
        with self.lock:
            fault = next((fault for fault in self.faults if fault.meets(request, length)), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
            return fault

    def requests(self, route: str, method: str = "") -> list[Logged]:
        """Those logged, in the order in which they came."""
        return [
            entry for entry in self.log if entry.route == route and method in ("", entry.method)
        ]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """This process' environment with this Hub in place of the other, for a new process."""
        elsewhere = ("HF_", "HUGGING", "TRANSFORMERS_", "DO_NOT_TRACK")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(elsewhere)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            **({"HF_TOKEN": token} if token else {}),
        }

    @contextmanager
    def in_this_process(self, home: Path, token: str | None = None) -> Iterator[None]:
        """huggingface_hub of this process, already imported, asks this Hub until the end."""
        from huggingface_hub import constants, hf_api
        from huggingface_hub.utils import close_session

        with ExitStack() as undo:
            undo.callback(close_session)
            # It reads its environment once, when imported.
            undo.callback(importlib.reload, constants)
            undo.enter_context(patch.dict(os.environ, self.environment(home, token), clear=True))
            importlib.reload(constants)
            close_session()
            undo.enter_context(patch.object(hf_api.api, "endpoint", self.url))
            if "datasets" in sys.modules:
                config = sys.modules["datasets"].config
                cache = home / "datasets"
                undo.enter_context(
                    patch.multiple(
                        config, HF_ENDPOINT=self.url, HF_HUB_OFFLINE=False, HF_DATASETS_CACHE=cache
                    )
                )
            yield


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: StandInHub

    def serve(self) -> None:
        hub, call = self.hub, called(self.command, self.path)
        size = int(self.headers.get("Content-Length", 0))
        route = call.route.name if call.route else "other"
        request = Logged(self.command, self.path, route, "Authorization" in self.headers)
        hub.log.append(request)
        answer = None
        if self.command in ("GET", "HEAD"):
            with hub.lock:
                answer = call.answer(hub.shelf, self.headers, b"")
        fault = hub.next_fault(request, size if answer is None else len(self.body_of(answer)))
        cut = fault.after_bytes if fault else None
        body = self.rfile.read(size if cut is None or answer else cut)
        request.received = len(body)
        if len(body) < size:
            self.close_connection = True
            return
        if fault and fault.status is not None:
            error = {"error": HTTPStatus(fault.status).phrase}
            answer = as_json(error, fault.status, fault.headers)
        elif answer is None:
            with hub.lock:
                answer = call.answer(hub.shelf, self.headers, body)
        if fault and fault.answer_is_lost:
            self.close_connection = True
            return
        self.send(answer, request, cut)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def body_of(self, answer: Answer) -> bytes:
        return b"" if self.command == "HEAD" else answer.body

    def send(self, answer: Answer, request: Logged, cut: int | None) -> None:
        body = self.body_of(answer)[:cut]
        request.status, request.sent = answer.status, len(body)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(body)
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def stand_in_hub(folder: Path | None = None) -> Iterator[StandInHub]:
    """Serves a Hub on two free ports of 127.0.0.1, with `folder`'s `<user>/<name>` as models.

    Raises:
        AssertionError: at its end, if a fault met fewer requests than it was for.
    """
    hub = StandInHub()
    for path in sorted(folder.glob("*/*")) if folder else ():
        hub.add(path.relative_to(path.parents[1]).as_posix(), path)
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    # By another name, for clients that tell hosts apart by it alone.
    hub.shelf.url, hub.shelf.storage = (
        f"http://{name}:{server.server_port}"
        for name, server in zip(("127.0.0.1", "localhost"), servers, strict=True)
    )
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
    unmet = [fault for fault in hub.faults if fault.times]
    assert not unmet, f"no request met {unmet}"
