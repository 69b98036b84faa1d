"""Asking the Hub: ids with a revision, what is asked again, and errors that say what to do."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Literal, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Use = Literal["path", "read", "write"]

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before the second, third, … try; the Hub's own Retry-After goes before, if longer."""
# Some calls of huggingface_hub wait themselves; no further try begins after this many seconds.
PATIENCE = 60.0
_AGAIN = (408, 429, 500, 502, 503, 504)
# Of huggingface_hub's HTTP client, which is another one in its next version.
_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # pyright: ignore
_ERRORS = (HFValidationError, EntryNotFoundError, OSError, _CLIENT_ERROR)


def split_revision(path_or_id: str | os.PathLike) -> tuple[str, str | None]:
    """`user/name` and `v1` of `user/name@v1`, the spelling of huggingface_hub's file system."""
    name, at, revision = os.fspath(path_or_id).partition("@")
    return name, (revision or None) if at else None


def ask_hub(
    call: Callable[[], Answer],
    name: str,
    *,
    argument: str,
    what: str = "",
    use: Use = "path",
    again: bool = True,
) -> Answer:
    """What `call` of huggingface_hub returns; a busy or broken Hub is asked again.

    Tried again are 408, 429, 5xx and connections that break, but not a Hub that cannot be reached
    at all. `call` is to be one that may be made twice.

    Args:
        call: to be made, without arguments.
        name: of the repository, with its revision.
        argument: by which the user gave it; the messages of errors begin with it.
        what: is asked of the repository: a file's name.
        use: "path" of a name that may be a path misspelt, "read" of what is a repository for sure,
            "write" of one that is to be changed.
        again: whether `call` may be made twice where its first answer is lost.

    Raises:
        FileNotFoundError: if there is no such repository, revision or file, or the Hub hides it;
            likewise, of a possible path, if the Hub cannot be reached.
        PermissionError: if the repository is gated, or the token wrong or without the right.
        ConnectionError: if the Hub is busy or fails, time and again, or cannot be reached.
        ValueError: if `name` is no Hub id.
    """
    began = time.monotonic()
    for wait in (*WAITS, None):
        try:
            return call()
        except (*_ERRORS, RuntimeError) as error:
            cause = _cause(error)
            if not isinstance(cause, _ERRORS):
                raise
            late = time.monotonic() - began > PATIENCE
            if wait is None or late or not _is_passing(cause, again):
                raise _in_words(cause, f"{argument}: {name!r}", what, use) from error
            wait = min(max(wait, _retry_after(cause)), PATIENCE)
            logger.warning(
                "The Hub did not answer (%s); asking again in %.0f s.", _briefly(cause), wait
            )
            time.sleep(wait)
    raise AssertionError("unreachable")


def _cause(error: BaseException) -> BaseException:
    """What is behind a file that is not in the cache either, or was not sent."""
    hides = isinstance(error, LocalEntryNotFoundError | RuntimeError)
    return error.__cause__ if hides and error.__cause__ is not None else error


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _is_passing(error: BaseException, again: bool) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = _status(error)
    if status is not None:
        return status in _AGAIN
    return again and _is_of_network(error) and not _is_unreachable(error)


def _is_unreachable(error: BaseException) -> bool:
    return type(error).__name__.startswith("Connect")


def _is_of_network(error: BaseException) -> bool:
    # OSErrors of the disk, a full one say, are none of these.
    return isinstance(error, _CLIENT_ERROR | ConnectionError | TimeoutError)


def _retry_after(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:  # A date.
        return 0.0


def _briefly(error: BaseException) -> str:
    status = _status(error)
    return f"HTTP {status}" if status else type(error).__name__


def _in_words(error: BaseException, subject: str, what: str, use: Use) -> Exception:
    status = _status(error)
    sign_in = "set HF_TOKEN, or run `hf auth login`"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        nowhere = "is neither a path on this disk nor in the cache of the Hub, which is not asked"
        if use == "path":
            return FileNotFoundError(
                f"{subject} {nowhere}: unset HF_HUB_OFFLINE, or fetch it first"
            )
        return ConnectionError(f"{subject}: the Hub is not asked, unset HF_HUB_OFFLINE")
    if isinstance(error, HFValidationError):
        return ValueError(f"{subject} is neither a path on this disk nor an id of the Hub: {error}")
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{subject} is gated: ask for access on its page of the Hub, then {sign_in} of the "
            "account that has it"
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{subject} has no such revision on the Hub")
    if isinstance(error, RepositoryNotFoundError):
        found = {
            "path": "neither a path on this disk nor a repository of the Hub that you can see",
            "read": "no repository of the Hub that you can see",
            "write": "no repository of the Hub that you can write to",
        }
        return FileNotFoundError(
            f"{subject} is {found[use]}; check the spelling, and if it is private {sign_in}"
        )
    if isinstance(error, EntryNotFoundError) or status == 404:
        return FileNotFoundError(f"{subject} has no {what or 'such file'} on the Hub")
    if status == 401:
        return PermissionError(
            f"{subject}: the Hub does not take your token, or there is none; {sign_in}"
        )
    if status == 403:
        right = "write to it" if use == "write" else "read it"
        return PermissionError(
            f"{subject}: the Hub does not let your token {right}{_said(error)}; use a token that "
            f"may {right}"
        )
    if status in _AGAIN:
        busy = "asks for fewer requests" if status == 429 else f"fails (HTTP {status})"
        return ConnectionError(
            f"{subject}: the Hub {busy} time and again; try again later: what has arrived is not "
            "sent again"
        )
    if status is not None:
        return ConnectionError(f"{subject}: the Hub refuses (HTTP {status}){_said(error)}")
    if _is_of_network(error) and not _is_unreachable(error):
        return ConnectionError(
            f"{subject}: the connection to the Hub broke off ({_briefly(error)}); try again: what "
            "has arrived is not sent again"
        )
    if _is_of_network(error):
        unreachable = f"the Hub at {constants.ENDPOINT} cannot be reached ({_briefly(error)})"
        if use == "path":
            return FileNotFoundError(f"{subject} is no path on this disk, and {unreachable}")
        return ConnectionError(f"{subject}: {unreachable}")
    return OSError(f"{subject}: {error}")


def _said(error: BaseException) -> str:
    """What the Hub itself gives for a reason."""
    said = getattr(error, "server_message", None)
    return f": {' '.join(str(said).split())}" if said else ""
