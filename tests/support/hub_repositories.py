"""What a stand-in of the Hub holds: repositories of commits, refs and large objects, and users."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

LARGE_SUFFIXES = {
    *(".arrow", ".bin", ".gguf", ".gz", ".jpg", ".msgpack", ".npy", ".npz", ".onnx", ".parquet"),
    *(".pickle", ".pkl", ".png", ".pt", ".pth", ".safetensors", ".tar", ".zip"),
}
LARGE_SIZE = 10 * 2**20


@dataclass(frozen=True)
class User:
    """Whom a token stands for, and whether it may write."""

    name: str
    write: bool = True
    organizations: tuple[str, ...] = ()

    def owns(self, repository: str) -> bool:
        return repository.split("/")[0] in (self.name, *self.organizations)


@dataclass(frozen=True)
class File:
    """The bytes of a file, and how git and LFS name them."""

    path: str
    content: bytes

    @property
    def is_large(self) -> bool:
        return is_large(self.path, len(self.content))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
        ).encode()

    @property
    def blob(self) -> str:
        """Git's name of what it stores: the content, or the pointer to a large file."""
        stored = self.pointer if self.is_large else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.blob


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps a file in LFS; an empty one never, its storage takes none."""
    return size > 0 and (size > LARGE_SIZE or PurePosixPath(path).suffix in LARGE_SUFFIXES)


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot of all files."""

    parent: str | None
    summary: str
    files: Mapping[str, bytes]
    sha: str = field(default_factory=lambda: secrets.token_hex(20))

    def file(self, path: str) -> File | None:
        return File(path, self.files[path]) if path in self.files else None

    def folders(self) -> set[str]:
        return {
            parent.as_posix() for path in self.files for parent in PurePosixPath(path).parents
        } - {"."}


@dataclass
class Repository:
    """Commits by sha, refs by full name (`refs/heads/main`, `refs/pr/1`), LFS objects by sha256."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    readers: tuple[str, ...] = ()
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def page(self) -> str:
        return self.name if self.kind == "model" else f"{self.kind}s/{self.name}"

    def may_see(self, user: User | None) -> bool:
        return not self.private or (user is not None and user.owns(self.name))

    def may_download(self, user: User | None) -> bool:
        known = user is not None and (user.owns(self.name) or user.name in self.readers)
        return not self.gated or known

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit | None:
        ref = self.ref(revision)
        return self.commits.get(self.refs[ref] if ref else revision)

    def history(self, revision: str = "main") -> Iterator[Commit]:
        """The commit of a revision and those before it, newest first."""
        commit = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent or "")

    def commit(self, ref: str, summary: str, files: Mapping[str, bytes]) -> Commit:
        """Adds a commit of exactly `files` and moves `ref` to it."""
        commit = Commit(self.refs.get(ref), summary, dict(files))
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        large = [File(path, content) for path, content in files.items()]
        self.objects |= {file.sha256: file.content for file in large if file.is_large}
        return commit

    def next_pull_request(self) -> int:
        return 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
