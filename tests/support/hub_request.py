"""A request to a stand-in of the Hub, what it may see and change, and answers in the Hub's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message

from .hub_repositories import Commit, Repository, User


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(
        status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}
    )


class Refused(Exception):
    """An error as the Hub tells it: a status, a sentence, and a code that the client knows."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = as_json({"error": message}, status, named | headers)


@dataclass
class Shelf:
    """All that routes read and change."""

    url: str = ""
    storage: str = ""
    tokens: dict[str, User] = field(default_factory=dict)
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    shelf: Shelf
    parts: Mapping[str, str]
    query: Mapping[str, str]
    headers: Message
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def user(self) -> User | None:
        given = self.headers.get("Authorization", "")
        if not given:
            return None
        user = self.shelf.tokens.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    @property
    def opens_pull_request(self) -> bool:
        return self.query.get("create_pr") == "1"

    def repository(self, *, write: bool = False) -> Repository:
        kind = "dataset" if self.parts.get("kind", "").startswith("dataset") else "model"
        repository, user = self.shelf.repositories.get((kind, self.parts["name"])), self.user
        if repository is None or not repository.may_see(user):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._refuse_writing(repository)
        return repository

    def _refuse_writing(self, repository: Repository) -> None:
        user = self.user
        if user is None:
            # The Hub sends no code, but the client reads every 401 of a repository's https URL so.
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if not user.write:
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if not (user.owns(repository.name) or self.opens_pull_request):
            raise Refused(403, "Forbidden: Authorization error.")

    def refuse_gated(self, repository: Repository) -> None:
        if not repository.may_download(self.user):
            known = "you are not in the authorized list" if self.user else "you must log in"
            message = f"Access to {repository.kind} {repository.name} is restricted and {known}."
            raise Refused(403 if self.user else 401, message, "GatedRepo")

    def commit(self, repository: Repository) -> Commit:
        revision = self.parts.get("revision", "main")
        commit = repository.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit
