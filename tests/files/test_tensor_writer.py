"""A safetensors file written tensor by tensor is the file that safetensors itself writes."""

from __future__ import annotations

import random
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.strategies import seeds
from torch import Tensor

from peft_svdinit.files import HeadedFile, TensorWriter, replacing

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def layout_of(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path: Path, tensors: dict[str, Tensor], *, order: list[str] | None = None) -> None:
    with TensorWriter(path, layout_of(tensors), {"format": "pt"}) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of every dtype and of 0 to 3 dimensions, empty ones and odd sizes included."""
    names = draw(st.lists(st.text("aß.\"\\ 'é0", min_size=1, max_size=6), max_size=8, unique=True))
    generator = torch.Generator().manual_seed(draw(seeds))
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        values = torch.randint(-100, 100, shape, generator=generator)
        tensors[name] = values.to(draw(st.sampled_from(DTYPES)))
    return tensors


@given(tensors=tensor_sets(), seed=seeds)
def test_the_bytes_are_those_of_safetensors_whatever_the_order(tmp_path_factory, tensors, seed):
    folder = tmp_path_factory.mktemp("written")
    order = list(tensors)
    random.Random(seed).shuffle(order)
    write(folder / "ours", tensors, order=order)
    save_file(tensors, folder / "theirs", {"format": "pt"})
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    loaded = load_file(folder / "ours")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_the_metadata_is_read_back_and_may_be_left_out(tmp_path):
    metadata = {"format": "pt", "norms": '{"layer": 1.5}', "ß": "é"}
    for name, given_metadata in (("with", metadata), ("without", None)):
        with TensorWriter(tmp_path / name, {"x": (torch.float32, (2,))}, given_metadata) as writer:
            writer.write("x", torch.ones(2))
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == given_metadata


def test_any_strides_and_shared_memory_are_written_as_values(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": matrix.mT,
        "every second": matrix[:, ::2],
        "expanded": torch.ones(1).expand(5, 2),
        "trained": torch.nn.Parameter(matrix),
        "scalar": torch.tensor(7.0),
    }
    write(tmp_path / "file", tensors)
    loaded = load_file(tmp_path / "file")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


def test_no_tensor_is_kept_once_it_is_written(tmp_path):
    layout = {f"layer {index}": (torch.float32, (64, 64)) for index in range(4)}
    with TensorWriter(tmp_path / "file", layout) as writer:
        for name in sorted(layout, reverse=True):
            tensor = torch.randn(64, 64)
            alive = weakref.ref(tensor)
            writer.write(name, tensor)
            del tensor
            assert alive() is None


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("y", torch.ones(2), r"the layout has no tensor y"),
        (
            "x",
            torch.ones(3),
            r"tensor x is torch.float32 of shape \(3,\), but the layout",
        ),
        ("x", torch.ones(2).half(), r"tensor x is torch.float16 of shape \(2,\), but the layout"),
    ],
)
def test_a_tensor_that_the_layout_does_not_have_is_refused(tmp_path, name, tensor, message):
    with (
        pytest.raises(ValueError, match=message),
        TensorWriter(tmp_path / "file", {"x": (torch.float32, (2,))}) as writer,
    ):
        writer.write(name, tensor)


def test_a_tensor_is_written_once_and_none_is_forgotten(tmp_path):
    layout = {name: (torch.float32, (2,)) for name in "abc"}
    with (
        pytest.raises(ValueError, match="tensor a is written a second time"),
        TensorWriter(tmp_path / "file", layout) as writer,
    ):
        writer.write("a", torch.ones(2))
        writer.write("a", torch.ones(2))
    with (
        pytest.raises(ValueError, match="2 tensors of the layout were not written, b among them"),
        TensorWriter(tmp_path / "file", layout) as writer,
    ):
        writer.write("a", torch.ones(2))


@pytest.mark.parametrize(
    ("layout", "metadata", "error", "message"),
    [
        ({"x": (torch.complex64, (1,))}, {}, TypeError, "x is torch.complex64, which must be one"),
        ({"__metadata__": (torch.float32, (1,))}, {}, ValueError, "safetensors reserves it"),
        ({}, {"rank": 3}, TypeError, "metadata must map text to text, the value of 'rank'"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_a_file_exists(
    tmp_path, layout, metadata, error, message
):
    with pytest.raises(error, match=message):
        TensorWriter(tmp_path / "file", layout, metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"other.kind": "{}"}])
def test_a_file_of_another_kind_is_no_target(tmp_path, metadata):
    path, kind = tmp_path / "model.safetensors", HeadedFile("our.kind", "ours.safetensors", "such")
    save_file({"weight": torch.ones(3)}, path, metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors is a file of another kind"):
        kind.target(path)
    path.write_text("no safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is a file of another kind"):
        kind.target(path)
    save_file({"weight": torch.ones(3)}, path, {"our.kind": "{}"})
    assert kind.target(path) == path
    new = tmp_path / "new.safetensors"
    assert kind.target(new) == new
    assert kind.target(tmp_path) == tmp_path / "ours.safetensors"


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files of this process cannot grow beyond 64 KiB; writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("rows", [1 << 15, (1 << 14) + 1])
def test_a_full_disk_is_an_os_error_and_leaves_the_old_file_alone(tmp_path, small_disk, rows):
    path = tmp_path / "file"
    path.write_text("old")
    layout = {"x": (torch.float32, (rows,))}
    with (
        pytest.raises(OSError, match="too large"),
        replacing(path) as temporary,
        TensorWriter(temporary, layout) as writer,
    ):
        writer.write("x", torch.ones(rows))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
