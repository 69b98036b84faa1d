"""Putting a folder on the Hub, in one commit."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError

from ..files import ask_hub, fetched_file
from .artefact import is_own
from .card_merge import Card
from .shared import CARD, Shared

logger = logging.getLogger(__name__)

Keep = Literal["hub", "folder"]
Answer = TypeVar("Answer")
# The repository has moved on since its card was read.
_MOVED, _ATTEMPTS = (409, 412), 3


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now.

    Attributes:
        repo_id: with its namespace.
        url: of the commit, or of the pull request.
        commit: its hash; `user/name@hash` names just this.
        files: that it holds.
        deleted: what the last push had put there, and this one has not.
        left_out: what of the folder stayed here, with the reason.
    """

    repo_id: str
    url: str
    commit: str
    files: tuple[str, ...]
    deleted: tuple[str, ...]
    left_out: dict[str, str]


class _HeadMoved(Exception):
    pass


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    comparison: str | os.PathLike | None = None,
    evaluation: str | os.PathLike | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    card: Keep | None = None,
    token: str | None = None,
) -> Pushed:
    """Share an adapter, a LoRI adapter, a mask, factors or a (low-rank) model, with a model card.

    One commit holds everything, so that nobody loads a half; one that breaks is resumed by the same
    call: large files that have arrived are not sent again. The files are those of their kind, never
    a pickle. In their configurations the base model has its name on the Hub, and other absolute
    paths their last part. What the last push put there and this one lacks is deleted, and nothing
    else. A card that is there is kept, but for our part of it.

    Args:
        folder: as `save_pretrained`, a recipe, or a verb wrote it.
        repo_id: `user/name`, or `name` for one of your own; made if it does not exist.
        base_model: the base's id on the Hub, where the folder records none or a path of this disk;
            `user/name@revision` says which one.
        comparison: folder of a comparison, whose figures the card shows in place of the run's own.
        evaluation: folder of `recipes/evaluate_adapter.py`, whose table the card shows beside them.
        private: whether a new repository is; one that exists must be so if True.
        revision: branch to push to, made if it does not exist; `refs/pr/N` of a pull request.
        create_pr: open a pull request in place of a commit.
        commit_message: by default it says what is pushed.
        card: where the Hub and the folder both have a README.md, and these differ beyond our part,
            whose is kept.
        token: by default that of HF_TOKEN or of `hf auth login`.

    Raises:
        FileNotFoundError: if the folder, or a repository that it needs, does not exist.
        PermissionError: if there is no token, or it may not write.
        ConnectionError: if the Hub cannot be reached, or fails.
        ValueError: if the base is not known, the folder holds pickles, an existing repository is
            public although `private` is set or holds another kind, or the cards differ.
    """
    if card not in (None, "hub", "folder"):
        raise ValueError(f"card must be hub or folder, got {card!r}")
    if create_pr and revision is not None:
        raise ValueError("create_pr opens a request against the default branch; leave revision out")
    for name, given in {"revision": revision, "repo_id": repo_id}.items():
        if given == "":
            raise ValueError(f"{name} must not be empty")
    api = _api(token)
    shared = Shared.of(
        folder, base_model=base_model, comparison=comparison, evaluation=evaluation, token=token
    )
    repo_id = prepare_repository(
        repo_id, private, revision=revision, create_pr=create_pr, token=token
    )
    with shared.staged() as files:
        for _ in range(_ATTEMPTS):
            at = f"{repo_id}@{revision}" if revision else repo_id
            head = _asked(at, lambda: api.model_info(repo_id, revision=revision))
            there = {entry.rfilename for entry in head.siblings or []}
            on_hub = Card.read(_read_card(repo_id, head.sha, token)) if CARD in there else None
            kind, before = on_hub.holds if on_hub else (None, [])
            if kind not in (None, shared.artefact.kind.name):
                raise ValueError(
                    f"repo_id: {repo_id} holds a {kind}, and {shared.artefact.folder} a "
                    f"{shared.artefact.kind.name}; choose another repository"
                )
            existing = _kept(on_hub, shared.own_card, card)
            text = shared.card(existing, repo_id, files, None if create_pr else revision)
            deleted = tuple(sorted(there & set(filter(is_own, before)) - set(files)))
            operations = [CommitOperationAdd(CARD, text.encode())]
            operations += [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            try:
                commit = _commit(
                    api, repo_id, [*operations, *map(CommitOperationDelete, deleted)],
                    commit_message=commit_message or f"Push {shared.artefact.kind.name}",
                    revision=revision, create_pr=create_pr, parent_commit=head.sha,
                )  # fmt: skip
            except _HeadMoved:
                logger.warning("%s has changed meanwhile; its card is read again.", repo_id)
                continue
            url = str(commit.pr_url or commit.commit_url)
            left_out = shared.artefact.left_out
            return Pushed(repo_id, url, commit.oid, (CARD, *files), deleted, left_out)
    raise ConnectionError(f"repo_id: {repo_id!r} changes all the time; push again later")


def prepare_repository(
    repo_id: str,
    private: bool | None = None,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Make a repository and a branch to push to, if they are not there; its id with the namespace.

    Args:
        repo_id, private, revision, token: as of `push_to_hub`.
        create_pr: whether a pull request will be opened, which needs a repository that is there.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `push_to_hub`.
    """
    api = _api(token)
    # To a pull request of one's own, nobody needs the right to write to the rest.
    if not create_pr and not (revision or "").startswith("refs/"):
        repo_id = _asked(
            repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        )
        if "write" in signature(api.auth_check).parameters:  # of huggingface_hub 2
            _asked(repo_id, lambda: api.auth_check(repo_id, write=True))
    if _asked(repo_id, lambda: api.model_info(repo_id)).private is False and private:
        raise ValueError(
            f"private is set, but {repo_id} exists and is public; make it private on its page, or "
            "choose another repo_id"
        )
    if revision is not None and revision.startswith("refs/"):
        _asked(f"{repo_id}@{revision}", lambda: api.model_info(repo_id, revision=revision))
    elif revision is not None:
        _asked(repo_id, lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    return repo_id


def _api(token: str | None) -> HfApi:
    found = token or get_token()
    if found and not re.fullmatch(r"[!-~]+", found):
        # The HTTP client would print it.
        raise ValueError("token: what is set has characters that no token has; set it again")
    return HfApi(token=token, library_name="peft-svdinit")


def _asked(repo_id: str, call: Callable[[], Answer], again: bool = True) -> Answer:
    return ask_hub(call, repo_id, argument="repo_id", use="write", again=again)


def _commit(api: HfApi, repo_id: str, operations: list[Any], **options: Any) -> CommitInfo:
    """Raises `_HeadMoved` if the parent is not the last commit any more."""

    def commit() -> CommitInfo:
        try:
            return api.create_commit(repo_id, operations, **options)
        except HfHubHTTPError as error:
            if error.response.status_code in _MOVED:
                raise _HeadMoved from error
            raise

    # A second request would open a second pull request.
    return _asked(repo_id, commit, again=not options["create_pr"])


def _read_card(repo_id: str, commit: str | None, token: str | None) -> str:
    path = fetched_file(repo_id, CARD, argument="repo_id", revision=commit, token=token)
    return path.read_text(encoding="utf-8")


def _kept(on_hub: Card | None, own: Card | None, keep: Keep | None) -> Card:
    """The card that others wrote; of two that differ the text that the user keeps."""
    cards = {"hub": on_hub or Card(), "folder": own or Card()}
    written = [name for name, found in cards.items() if not found.is_unfilled]
    if len(written) > 1 and keep is None:
        if cards["hub"].of_others != cards["folder"].of_others:
            raise ValueError(
                "card must say whose README.md is kept, hub or folder: the one in the folder and "
                "the one on the Hub differ"
            )
    chosen = keep if keep and len(written) > 1 else (written or ["hub"])[0]
    metadata = cards["folder"].metadata | cards["hub"].metadata
    if chosen == "folder" and keep:
        metadata = cards["hub"].metadata | cards["folder"].metadata
    return Card(metadata, cards[chosen].body)
