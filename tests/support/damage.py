"""Kinds of damage to files that users give: each changes one file on the disk."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

Damage = Callable[[Path], None]


def _removed(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def damaged(path: Path, damage: Damage) -> Iterator[bool]:
    """The file is damaged within the context, which is told whether it changed."""
    content = path.read_bytes()
    try:
        damage(path)
        yield not path.is_file() or path.read_bytes() != content
    finally:
        _removed(path)
        path.write_bytes(content)


def _bytes(content: bytes) -> Damage:
    return lambda path: _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _cut(share: float, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def _pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    return buffer.getvalue()


def _in_place(make: Callable[[Path], Any], path: Path) -> None:
    path.unlink()
    make(path)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / path.name).write_text("in a folder")


# Of any file, whatever it holds.
FILES: dict[str, Damage] = {
    "missing": _removed,
    "empty": _bytes(b""),
    "cut in half": partial(_cut, 0.5),
    "cut at 7 bytes": lambda path: _replace(path, path.read_bytes()[:7]),
    "without its last byte": lambda path: _replace(path, path.read_bytes()[:-1]),
    "zeros": lambda path: _replace(path, bytes(len(path.read_bytes()))),
    "text": _bytes(b"<!DOCTYPE html><p>404</p>"),
    "a Git LFS pointer": _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "a pickle": _bytes(_pickle()),
    "a folder": partial(_in_place, _folder),
    "a dangling link": partial(_in_place, lambda path: path.symlink_to("nowhere")),
    "a link to itself": partial(_in_place, lambda path: path.symlink_to(path.name)),
    "a pipe": partial(_in_place, os.mkfifo),
}
# Of JSON and CSV.
TEXTS: dict[str, Damage] = {
    "a list": _bytes(b"[1, 2]"),
    "null": _bytes(b"null"),
    "no UTF-8": lambda path: _replace(
        path, path.read_bytes()[:9] + b"\xff" + path.read_bytes()[9:]
    ),
    "UTF-16": lambda path: _replace(path, path.read_text().encode("utf-16")),
    "deep": _bytes(b"[" * 100_000),
    "NUL": lambda path: _replace(path, path.read_bytes()[:-9] + b"\0" * 9),
}


def _with_header(edit: Callable[[dict[str, Any]], Any], path: Path) -> None:
    """Rewrite the header of a safetensors file, whatever the format makes of it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = edit(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(name for name in header if name != "__metadata__")]


def _header(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    return partial(_with_header, edit)


def _twice(header: dict[str, Any]) -> bytes:
    name = next(name for name in header if name != "__metadata__")
    return json.dumps(header)[:-1].encode() + f", {json.dumps({name: header[name]})[1:]}".encode()


HEADERS: dict[str, Damage] = {
    "a header longer than can be": lambda path: _replace(path, b"\xff" * 8 + path.read_bytes()[8:]),
    "a header longer than the file": lambda path: _replace(
        path, (1 << 20).to_bytes(8, "little") + path.read_bytes()[8:]
    ),
    "a header of text": _header(lambda header: b"no JSON"),
    "a header of a list": _header(lambda header: b"[]"),
    "a deep header": _header(lambda header: b"[" * 100_000),
    "a header that is no UTF-8": _header(lambda header: b'{"\xff\xfe": 1}'),
    "a shape of 2**60": _header(lambda header: _first(header).update(shape=[1 << 30, 1 << 30])),
    "a shape beyond 64 bits": _header(lambda header: _first(header).update(shape=[10**30])),
    "a negative shape": _header(lambda header: _first(header).update(shape=[-1, -1])),
    "a shape of text": _header(lambda header: _first(header).update(shape="large")),
    "offsets beyond the file": _header(
        lambda header: _first(header).update(shape=[1 << 40], data_offsets=[0, 4 << 40])
    ),
    "offsets backwards": _header(lambda header: _first(header)["data_offsets"].reverse()),
    "overlapping tensors": _header(
        lambda header: [
            entry.update(data_offsets=_first(header)["data_offsets"], shape=_first(header)["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    ),
    "an unknown dtype": _header(lambda header: _first(header).update(dtype="F13")),
    "no dtype": _header(lambda header: _first(header).pop("dtype")),
    "metadata of numbers": _header(lambda header: header.update(__metadata__={"format": 1})),
    "metadata of a list": _header(lambda header: header.update(__metadata__=[])),
    "a name twice": _header(_twice),
    "more bytes than it says": lambda path: _replace(path, path.read_bytes() + b"\0" * 64),
}


def _with_tensors(edit: Callable[[dict[str, Tensor]], Any], path: Path) -> None:
    """Rewrite the tensors; the metadata stays."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = load(content)
    edit(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save(contiguous, header.get("__metadata__")))


def _tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Damage:
    return partial(_with_tensors, edit)


def _last(tensors: dict[str, Tensor]) -> str:
    """The name of a tensor that every command needs; the first might be all that is looked at."""
    return max((name for name in tensors if "q_proj" in name), default=max(tensors))


def _one(change: Callable[[Tensor], Tensor]) -> Damage:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = _last(tensors)
        tensors[name] = change(tensors[name])

    return _tensors(edit)


def _all(change: Callable[[Tensor], Tensor]) -> Damage:
    return _tensors(lambda tensors: tensors.update({k: change(v) for k, v in tensors.items()}))


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    def fill(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        if tensor.is_floating_point():
            changed.view(-1)[-1] = value
        return changed

    return fill


def _renamed(name: str) -> Damage:
    return _tensors(lambda tensors: tensors.update({name: tensors.pop(_last(tensors))}))


def _added(name: str) -> Damage:
    return _tensors(lambda tensors: tensors.update({name: torch.ones(2, 2)}))


# That change nothing, or nothing that is wrong for every reader.
HARMLESS = {
    *("a name twice", "one of float8", "one of float64", "all of bfloat16", "one row less"),
    *("all zero", "another tensor", "another tensor with the name /etc/x"),
}
TENSORS: dict[str, Damage] = {
    "NaN": _one(_filled(float("nan"))),
    "an infinity": _one(_filled(float("inf"))),
    "all of int8": _all(lambda tensor: tensor.to(torch.int8)),
    "all of bool": _all(lambda tensor: tensor.to(torch.bool)),
    "all of int64": _all(lambda tensor: tensor.to(torch.int64)),
    "one of int64": _one(lambda tensor: tensor.to(torch.int64)),
    "one of uint8": _one(lambda tensor: tensor.to(torch.uint8)),
    "one of float8": _one(lambda tensor: tensor.float().to(torch.float8_e4m3fn)),
    "one of complex64": _one(lambda tensor: tensor.to(torch.complex64)),
    "one of float64": _one(lambda tensor: tensor.double()),
    "all of bfloat16": _all(lambda tensor: tensor.bfloat16()),
    "one turned": _one(lambda tensor: tensor.reshape(-1, 1)),
    "one of three dimensions": _one(lambda tensor: tensor[None]),
    "one flat": _one(lambda tensor: tensor.reshape(-1)),
    "one a number": _one(lambda tensor: tensor.reshape(-1)[0]),
    "one without rows": _one(lambda tensor: tensor[:0]),
    "one row less": _one(lambda tensor: tensor[:-1]),
    "all zero": _all(torch.zeros_like),
    "one missing": _tensors(lambda tensors: tensors.pop(_last(tensors))),
    "none": _tensors(lambda tensors: tensors.clear()),
    "one with the name ../../out": _renamed("../../out"),
    "one with a name in two lines": _renamed("base_model.model.a\nb.lora_A.weight"),
    "one without a name": _renamed(""),
    "one with the name ./ü☃": _renamed("./ü☃"),
    "another tensor": _added("base_model.model.more.weight"),
    "another tensor with the name /etc/x": _added("/etc/x"),
}


def kinds_of(path: Path) -> dict[str, Damage]:
    """The kinds of damage that a file can have."""
    if path.suffix == ".safetensors":
        return {**FILES, **HEADERS, **TENSORS}
    return {**FILES, **TEXTS}
