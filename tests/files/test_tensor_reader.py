"""Tensors read one by one are those that safetensors reads, and the header is read once."""

from __future__ import annotations

import copy
import json
import os
import pickle
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

from peft_svdinit import FactorsFile, FactorsMetadata, LowRankFactors, save_factors
from peft_svdinit.factors import LoraAdapter
from peft_svdinit.files import TensorFile, TensorReader, WrongKind, opening
from peft_svdinit.models import Checkpoint

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]
LAYERS = [f"model.layers.{index}.q_proj" for index in range(5)]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def some_file(path: Path, dtypes: list[torch.dtype], seed: int = 0) -> Path:
    """One tensor of each dtype, of 0 to 3 dimensions, empty ones among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, dtype in enumerate(dtypes):
        shape = torch.randint(0, 5, (index % 4,), generator=generator).tolist()
        numbers = torch.randint(1, 9, shape, generator=generator)
        tensors[f"{index}.é"] = numbers.to(dtype)
    save_file(tensors, path, {"format": "pt"})
    return path


@given(dtypes=st.permutations(DTYPES), seed=seeds)
def test_every_tensor_is_the_one_that_safetensors_reads(tmp_path_factory, dtypes, seed):
    path = some_file(tmp_path_factory.mktemp("file") / "a.safetensors", dtypes, seed)
    reader, expected = TensorReader(path, "adapter"), load_file(path)
    assert reader.shapes == {key: tuple(tensor.shape) for key, tensor in expected.items()}
    assert list(reader.shapes) == sorted(expected) and reader.metadata == {"format": "pt"}
    with reader.opened() as file:
        for key, tensor in expected.items():
            found = file.tensor(key)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert bits(found) == bits(tensor)
            for start in range(len(tensor) if tensor.dim() else 0):
                for stop in range(start, len(tensor) + 1):
                    assert bits(file.rows(key, start, stop)) == bits(tensor[start:stop])
            picked = [index for index in range(tensor.numel()) if index % 2]
            assert bits(file.entries(key, picked)) == bits(tensor.reshape(-1)[picked])


def factors_file(folder: Path) -> FactorsFile:
    layer = LowRankFactors(torch.eye(4, 2), torch.tensor([2.0, 1.0]), torch.eye(2, 3), 3.0)
    samples = dict.fromkeys(LAYERS, torch.arange(12.0))
    save_factors(folder, dict.fromkeys(LAYERS, layer), FactorsMetadata(), base_samples=samples)
    return FactorsFile(folder)


def adapter_tensors(folder: Path) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    keys = [f"base_model.model.{name}.lora_{part}.weight" for name in LAYERS for part in "AB"]
    save_file({key: torch.ones(2, 2) for key in keys}, folder / "adapter_model.safetensors")
    return folder


def read_factors(folder: Path) -> Iterator[None]:
    file = factors_file(folder)
    yield
    for name in LAYERS:
        assert file[name].rank == 2 and file.base_sample(name) is not None
    yield


def read_adapter(folder: Path) -> Iterator[None]:
    adapter = LoraAdapter(adapter_tensors(folder / "a"))
    yield
    assert len(dict(adapter)) == len(LAYERS)
    yield


def read_tensors(folder: Path) -> Iterator[None]:
    file = TensorFile(adapter_tensors(folder / "a") / "adapter_model.safetensors")
    yield
    assert all(file.finite(key).all() and file.as_stored(key).all() for key in file.shapes)
    yield


def read_checkpoint(folder: Path) -> Iterator[None]:
    save_file({name: torch.ones(4, 2) for name in LAYERS}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder, argument="base")
    yield
    for name in LAYERS:
        assert checkpoint.tensor(name).all() and checkpoint.entries(name, [(3, 1)]).all()
        assert [start for start, _ in checkpoint.blocks(name)] == [0]
    yield


@pytest.mark.parametrize("reading", [read_factors, read_adapter, read_tensors, read_checkpoint])
def test_the_header_is_parsed_on_opening_and_not_for_every_layer(reading, tmp_path, monkeypatch):
    parsed, stock = [], opening.safe_open

    def counted(path: Path, **options: str) -> safe_open:
        parsed.append(path)
        return stock(path, **options)

    monkeypatch.setattr(opening, "safe_open", counted)
    steps = reading(tmp_path)
    next(steps)
    opened = len(parsed)
    next(steps)
    assert 1 <= opened == len(parsed) <= 2


def test_what_is_done_to_a_tensor_changes_none_that_is_read_later(tmp_path):
    file = factors_file(tmp_path)
    file[LAYERS[0]].U.mul_(5)
    assert torch.equal(file[LAYERS[0]].U, torch.eye(4, 2))


@pytest.mark.parametrize("change", ["replaced", "longer", "shorter", "touched"])
def test_a_file_that_changed_since_it_was_opened_is_refused(tmp_path, change):
    file = factors_file(tmp_path)
    content = file.path.read_bytes()
    if change == "replaced":
        (tmp_path / "other").write_bytes(content)
        os.replace(tmp_path / "other", file.path)
    elif change == "touched":
        os.utime(file.path, ns=(1, 1))
    else:
        file.path.write_bytes(content + b"\0" if change == "longer" else content[:-1])
    with pytest.raises(
        ValueError, match=rf"^factors: {file.path}: it was changed or replaced after"
    ):
        file[LAYERS[0]]


def test_a_file_cut_off_while_it_is_read_is_refused(tmp_path):
    reader = factors_file(tmp_path)._reader
    with pytest.raises(ValueError, match=r"^factors: .*shorter than its header says"):
        with reader.opened() as file:
            os.truncate(reader.path, os.path.getsize(reader.path) - 1)
            for key in reader.shapes:
                file.tensor(key)


def test_a_reader_can_be_copied_and_sent_to_a_process(tmp_path):
    file = factors_file(tmp_path)
    for other in (copy.deepcopy(file), pickle.loads(pickle.dumps(file))):
        assert torch.equal(other[LAYERS[0]].Vh, file[LAYERS[0]].Vh)


def test_a_dtype_that_torch_lacks_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 3)
    with TensorReader(path, "adapter").opened() as file:
        with pytest.raises(WrongKind, match=r"^adapter: w in .* is stored as F6_E2M3"):
            file.tensor("w")
