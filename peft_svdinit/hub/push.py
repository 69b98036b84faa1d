"""Putting a folder on the Hub, in one commit."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..files import ask_hub, fetched_file
from .artefact import OWN_FILES
from .card import PLOT
from .card_merge import is_unfilled, without_our_part
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
        left_out: what of the folder stayed here, with the reason.
    """

    repo_id: str
    url: str
    commit: str
    files: tuple[str, ...]
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
    paths their last part. What an earlier push left and this one lacks is deleted. A card that is
    there is kept, but for our part of it.

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
            public although `private` is set, or the cards contradict each other.
    """
    if create_pr and revision is not None:
        raise ValueError("create_pr opens a request against the default branch; leave revision out")
    shared = Shared.of(
        folder, base_model=base_model, comparison=comparison, evaluation=evaluation, token=token
    )
    api = _api(token)
    repo_id = prepare_repository(repo_id, private, create_pr=create_pr, token=token)
    if revision is not None and not revision.startswith("refs/"):
        _asked(repo_id, lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    with shared.staged() as files:
        for _ in range(_ATTEMPTS):
            head = _asked(repo_id, lambda: api.model_info(repo_id, revision=revision))
            there = [entry.rfilename for entry in head.siblings or []]
            existing = _read_card(repo_id, head.sha, token) if CARD in there else None
            text = shared.card(_kept(existing, shared.own_card, card), repo_id)
            operations = [CommitOperationAdd(CARD, text.encode())]
            operations += [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            try:
                commit = _commit(
                    api, repo_id, [*operations, *_stale(there, files)],
                    commit_message=commit_message or f"Push {shared.artefact.kind.name}",
                    revision=revision, create_pr=create_pr, parent_commit=head.sha,
                )  # fmt: skip
            except _HeadMoved:
                logger.warning("%s has changed meanwhile; its card is read again.", repo_id)
                continue
            url = commit.pr_url or commit.commit_url
            left_out = shared.artefact.left_out
            return Pushed(repo_id, str(url), commit.oid, (CARD, *files), left_out)
    raise ConnectionError(f"repo_id: {repo_id!r} changes all the time; push again later")


def prepare_repository(
    repo_id: str, private: bool | None = None, *, create_pr: bool = False, token: str | None = None
) -> str:
    """Make a repository to push to, if it is not there; its id with the namespace.

    Args:
        repo_id, private, token: as of `push_to_hub`.
        create_pr: whether a pull request will be opened, which needs a repository that is there.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `push_to_hub`.
    """
    api = _api(token)
    if not create_pr:
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
    return repo_id


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="peft-svdinit")


def _asked(repo_id: str, call: Callable[[], Answer]) -> Answer:
    return ask_hub(call, repo_id, argument="repo_id", write=True)


def _commit(api: HfApi, repo_id: str, operations: list[Any], **options: Any) -> CommitInfo:
    """Raises `_HeadMoved` if the parent is not the last commit any more."""

    def commit() -> CommitInfo:
        try:
            return api.create_commit(repo_id, operations, **options)
        except HfHubHTTPError as error:
            if error.response.status_code in _MOVED:
                raise _HeadMoved from error
            raise

    return _asked(repo_id, commit)


def _read_card(repo_id: str, commit: str | None, token: str | None) -> str:
    path = fetched_file(repo_id, CARD, argument="repo_id", revision=commit, token=token)
    return path.read_text(encoding="utf-8")


def _kept(on_hub: str | None, own: str | None, keep: Keep | None) -> str | None:
    """The card that others wrote; of two that differ the one that the user keeps."""
    cards = {
        name: text
        for name, text in (("hub", on_hub), ("folder", own))
        if text is not None and not is_unfilled(text)
    }
    if len(cards) < 2:
        return next(iter(cards.values()), None)
    if keep is None and len({without_our_part(text) for text in cards.values()}) > 1:
        raise ValueError(
            "card: the README.md in the folder and the one on the Hub differ; card=hub keeps that "
            "of the Hub, card=folder the other"
        )
    return cards[keep or "hub"]


def _stale(there: Collection[str], files: Collection[str]) -> list[CommitOperationDelete]:
    """What an earlier push left, and this one has not."""
    own = (*OWN_FILES, PLOT)
    return [
        CommitOperationDelete(name)
        for name in there
        if name not in files and any(fnmatchcase(name, pattern) for pattern in own)
    ]
