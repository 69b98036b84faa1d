"""The Hub's routes that change a repository, as huggingface_hub's `_commit_api.py` calls them."""

from __future__ import annotations

import base64
import json
import re

import yaml

from .hub_repositories import Commit, File, Repository, is_large
from .hub_request import Answer, Refused, Request, as_json


def create(request: Request) -> Answer:
    user, asked, shelf = request.user, request.json, request.shelf
    if user is None:
        raise Refused(401, "Invalid username or password.")
    namespace, kind = asked.get("organization") or user.name, asked.get("type") or "model"
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repository = Repository(kind, f"{namespace}/{asked['name']}", private)
    if not (user.write and user.owns(repository.name)):
        raise Refused(
            403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"'
        )
    found = {"url": f"{shelf.url}/{repository.page}", "name": repository.name}
    if (kind, repository.name) in shelf.repositories:
        message = f"You already created this {kind} repo: {repository.name}"
        return as_json({"error": message, **found}, 409)
    repository.commit(
        "refs/heads/main",
        "initial commit",
        {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"},
    )
    shelf.repositories[kind, repository.name] = repository
    return as_json(found)


def validate_yaml(request: Request) -> Answer:
    front = re.match(r"---\s*\n(.*?)\n---", request.json["content"], re.DOTALL)
    try:
        metadata = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    missing = {"message": "empty or missing yaml metadata in repo card"}
    return as_json({"errors": [], "warnings": [] if metadata else [missing]})


def preupload(request: Request) -> Answer:
    repository = request.repository(write=True)
    commit = request.commit(repository)
    files = []
    for file in request.json["files"]:
        there = commit.file(file["path"])
        mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
        known = {"oid": there.etag} if there else {}
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
    return as_json({"files": files, "commitOid": commit.sha})


def batch(request: Request) -> Answer:
    repository = request.repository(write=True)
    objects = []
    for item in request.json["objects"]:
        href = f"{request.shelf.storage}/storage/{repository.kind}s/{repository.name}/{item['oid']}"
        missing = item["oid"] not in repository.objects
        objects.append(item | ({"actions": {"upload": {"href": href}}} if missing else {}))
    return as_json({"transfer": "basic", "objects": objects})


def store_object(request: Request) -> Answer:
    kind, name, oid = (request.parts[part] for part in ("kind", "name", "oid"))
    if File("", request.body).sha256 != oid:
        raise Refused(400, "The content does not have the sha256 of its name")
    request.shelf.repositories[kind, name].objects[oid] = request.body
    return Answer()


def commit(request: Request) -> Answer:
    repository = request.repository(write=True)
    tip = request.commit(repository)
    header, *lines = (json.loads(line) for line in request.body.splitlines())
    if header["value"].get("parentCommit", tip.sha) != tip.sha:
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    ref = repository.ref(request.parts["revision"])
    if ref is None or ref.startswith("refs/tags/"):
        raise Refused(400, f"Invalid branch: {request.parts['revision']}")
    files = dict(tip.files)
    for line in lines:
        _change(files, repository, line["key"], line["value"])
    pull_request = {}
    if request.opens_pull_request:
        number = repository.next_pull_request()
        ref = f"refs/pr/{number}"
        repository.refs[ref] = tip.sha
        url = f"{request.shelf.url}/{repository.page}/discussions/{number}"
        pull_request = {"pullRequestUrl": url}
    made = repository.commit(ref, header["value"]["summary"], files)
    url = f"{request.shelf.url}/{repository.page}/commit/{made.sha}"
    return as_json({"success": True, "commitOid": made.sha, "commitUrl": url, **pull_request})


def _change(files: dict[str, bytes], repository: Repository, key: str, value: dict) -> None:
    path = value["path"]
    if key == "file":
        files[path] = base64.b64decode(value["content"])
    elif key == "lfsFile" and value["oid"] in repository.objects:
        files[path] = repository.objects[value["oid"]]
    elif key == "lfsFile":
        raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
    elif key == "deletedFile" and path in files:
        del files[path]
    elif key == "deletedFolder" and any(name.startswith(f"{path.rstrip('/')}/") for name in files):
        for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
            del files[name]
    else:
        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")


def branch(request: Request) -> Answer:
    repository, name = request.repository(write=True), request.parts["revision"]
    asked = request.json if request.body else {}
    start = repository.at(asked.get("startingPoint", "main"))
    if start is None:
        raise Refused(404, f"Invalid rev id: {asked['startingPoint']}", "RevisionNotFound")
    return _new_ref(repository, f"refs/heads/{name}", start)


def tag(request: Request) -> Answer:
    repository = request.repository(write=True)
    return _new_ref(repository, f"refs/tags/{request.json['tag']}", request.commit(repository))


def _new_ref(repository: Repository, ref: str, commit: Commit) -> Answer:
    if ref in repository.refs:
        raise Refused(409, f"Reference already exists: {ref}")
    repository.refs[ref] = commit.sha
    return as_json({"success": True}, 201)
