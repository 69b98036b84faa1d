"""The Hub's routes that tell of users, repositories and files, and hand out the files' bytes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import yaml

from .hub_repositories import Commit, File
from .hub_request import Answer, Refused, Request, as_json


def whoami(request: Request) -> Answer:
    user = request.user
    if user is None:
        raise Refused(401, "Invalid username or password.")
    token = {"displayName": "test", "role": "write" if user.write else "read"}
    organizations = [{"type": "org", "name": name} for name in user.organizations]
    return as_json(
        {"type": "user", "name": user.name, "orgs": organizations, "auth": {"accessToken": token}}
    )


def check_access(request: Request) -> Answer:
    repository = request.repository(write=bool(request.parts.get("write")))
    request.refuse_gated(repository)
    return as_json({})


def info(request: Request) -> Answer:
    repository = request.repository()
    at = request.commit(repository)
    siblings = []
    for path in sorted(at.files):
        file = File(path, at.files[path])
        blobs = {"size": len(file.content), "blobId": file.blob, "lfs": _lfs(file, "sha256")}
        siblings.append({"rfilename": path} | (blobs if "blobs" in request.query else {}))
    gated = "manual" if repository.gated else False
    return as_json(
        {"id": repository.name, "author": repository.name.split("/")[0], "sha": at.sha}
        | {"private": repository.private, "gated": gated, "tags": [], "siblings": siblings}
        | {"cardData": _metadata(at.files.get("README.md", b"").decode())}
    )


def _metadata(card: str) -> dict[str, Any] | None:
    _, *parts = re.split("^---$", card, maxsplit=2, flags=re.MULTILINE)
    try:
        return yaml.safe_load(parts[0]) if len(parts) == 2 else None
    except yaml.YAMLError:
        return None


def tree(request: Request) -> Answer:
    at = request.commit(request.repository())
    under = request.parts.get("path", "").strip("/")
    if under and under not in at.folders():
        raise _no_entry(at)
    prefix = f"{under}/" if under else ""
    inside = [path for path in sorted({*at.files, *at.folders()}) if path.startswith(prefix)]
    if request.query.get("recursive", "").lower() not in ("true", "1"):
        inside = [path for path in inside if "/" not in path.removeprefix(prefix)]
    return as_json([_entry(at, path) for path in inside])


def paths_info(request: Request) -> Answer:
    at = request.commit(request.repository())
    asked = parse_qs(request.body.decode())["paths"]
    return as_json([_entry(at, path) for path in asked if path in {*at.files, *at.folders()}])


def refs(request: Request) -> Answer:
    repository = request.repository()

    def under(prefix: str, strip: str) -> list[dict]:
        return [
            {"name": ref.removeprefix(strip), "ref": ref, "targetCommit": sha}
            for ref, sha in repository.refs.items()
            if ref.startswith(prefix)
        ]

    found = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
    listed = {name: under(prefix, prefix) for name, prefix in found.items()}
    if request.query.get("include_prs") == "1":
        listed["pullRequests"] = under("refs/pr/", "refs/")
    return as_json(listed)


def resolve(request: Request) -> Answer:
    repository = request.repository()
    request.refuse_gated(repository)
    at = request.commit(repository)
    file = at.file(request.parts["path"])
    if file is None:
        raise _no_entry(at)
    headers = {"X-Repo-Commit": at.sha, "ETag": f'"{file.etag}"'}
    if not file.is_large:
        return _content(file.content, request, headers)
    storage = f"{request.shelf.storage}/storage/{repository.kind}s/{repository.name}/{file.sha256}"
    linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": f'"{file.sha256}"'}
    return Answer(302, b"", {"X-Repo-Commit": at.sha, "Location": storage, **linked})


def stored_object(request: Request) -> Answer:
    """A signed URL's other end: whoever has the URL may read or write, no token is asked for."""
    kind, name, oid = (request.parts[part] for part in ("kind", "name", "oid"))
    objects = request.shelf.repositories[kind, name].objects
    if oid not in objects:
        raise Refused(404, "NoSuchKey")
    return _content(objects[oid], request, {"ETag": f'"{oid}"'})


def _no_entry(at: Commit) -> Refused:
    return Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": at.sha})


def _entry(at: Commit, path: str) -> dict:
    file = at.file(path)
    if file is None:
        oid = hashlib.sha1(path.encode()).hexdigest()
        return {"type": "directory", "path": path, "oid": oid, "size": 0}
    found = {"type": "file", "path": path, "oid": file.blob, "size": len(file.content)}
    return found | ({"lfs": lfs} if (lfs := _lfs(file, "oid")) else {})


def _lfs(file: File, name: str) -> dict | None:
    size, pointer = len(file.content), len(file.pointer)
    return {name: file.sha256, "size": size, "pointerSize": pointer} if file.is_large else None


def _content(content: bytes, request: Request, headers: Mapping[str, str]) -> Answer:
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Answer(200, content, headers)
    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if first > last:
        raise Refused(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
    span = f"bytes {first}-{last}/{len(content)}"
    return Answer(206, content[first : last + 1], {**headers, "Content-Range": span})
