"""The file of a mask: what is written is read back, and what is wrong with a file is said."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.headed_files import rewrite_headed
from support.strategies import seeds
from support.tiny_models import truncate
from torch import Tensor

from peft_svdinit.files import HeadedFile, TensorWriter
from peft_svdinit.masks import (
    COMPACT_FILE_NAME,
    MASK_FILE_NAME,
    CompactAdapter,
    LoriMask,
    MaskedLayer,
    load_compact,
    load_mask,
    load_scores,
    save_compact,
    save_mask,
)
from peft_svdinit.masks.mask_file import pack, unpack

HEADER_KEY = "peft_svdinit.lori"
rewrite = partial(rewrite_headed, HEADER_KEY)
LAYERS = ("layers.2.q", "layers.10.q", "layers.10.up")


def some_mask(seed: int = 0) -> LoriMask:
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for place, name in enumerate(LAYERS):
        masks[name] = torch.rand(3 + place, 5, generator=generator) < 0.4
        masks[name][0, 0] = True
    return LoriMask.over(
        masks,
        dict.fromkeys(LAYERS, 7),
        seed=11,
        density=0.4,
        scope="matrix",
        floor=0.1,
        source={"kind": "magnitude", "steps": 3},
        base_model_name_or_path="org/base",
    )


def some_adapter(dtype: torch.dtype = torch.bfloat16) -> CompactAdapter:
    mask = some_mask()
    values = {
        name: torch.arange(1.0, layer.kept + 1).to(dtype) for name, layer in mask.layers.items()
    }
    return CompactAdapter(mask, values, {"r": 5, "lora_alpha": 10})


def same(found: LoriMask, expected: LoriMask) -> bool:
    """Everything but the order of the attributes' types: bits, shapes, hashes and origin."""
    alike = list(found.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        other = found.layers[name]
        alike &= torch.equal(other.mask, layer.mask) and other.mask.dtype == torch.bool
        alike &= (other.in_features, other.hash_A) == (layer.in_features, layer.hash_A)
    details = ("density", "seed", "scope", "floor", "source", "base_model_name_or_path")
    return alike and all(getattr(found, key) == getattr(expected, key) for key in details)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_mask(tmp_path / "m.safetensors", some_mask())


@given(seed=seeds, rows=st.integers(1, 9), rank=st.integers(1, 11))
def test_bits_are_the_entries_row_by_row_the_first_the_highest(seed, rows, rank):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, rank, generator=generator) < 0.5
    bits = pack(mask)
    text = "".join(str(int(entry)) for entry in mask.flatten())
    text += "0" * (-len(text) % 8)
    assert bits.tolist() == [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    assert torch.equal(unpack(bits, (rows, rank)), mask)


def test_a_mask_is_read_back_from_a_file_and_from_a_folder(tmp_path, file):
    assert same(load_mask(file), some_mask())
    assert save_mask(tmp_path / "folder", some_mask()) == tmp_path / "folder" / MASK_FILE_NAME
    assert same(load_mask(tmp_path / "folder"), some_mask())
    # Eight entries a byte, and a header.
    names = sum(len(pack(layer.mask)) for layer in some_mask().layers.values())
    with open(file, "rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    assert file.stat().st_size == 8 + header + names


def test_the_same_mask_gives_the_same_bytes_whatever_the_order_of_its_layers(tmp_path, file):
    mask = some_mask()
    shuffled = LoriMask(
        dict(reversed(list(mask.layers.items()))),
        density=0.4,
        seed=11,
        scope="matrix",
        floor=0.1,
        source={"steps": 3, "kind": "magnitude"},
        base_model_name_or_path="org/base",
    )
    other = save_mask(tmp_path / "other.safetensors", shuffled)
    assert other.read_bytes() == file.read_bytes()
    assert save_mask(tmp_path / "z.safetensors", some_mask(1)).read_bytes() != file.read_bytes()


def test_masks_of_transposed_memory_are_written_by_their_entries(tmp_path):
    tall = (torch.arange(12).reshape(3, 4) % 5 == 0).mT
    mask = LoriMask({"a": MaskedLayer(tall, 7, "h")}, density=0.25, seed=0)
    assert torch.equal(load_mask(save_mask(tmp_path, mask)).layers["a"].mask, tall)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_truncated_file_is_one_clear_error(file, share):
    truncate(file, share)
    with pytest.raises(ValueError, match=r"not a readable safetensors file .*truncated"):
        load_mask(file)


def test_a_flipped_bit_a_swap_and_a_cut_are_noticed(file):
    name = f"{LAYERS[1]}.mask"
    original = file.read_bytes()
    for damage in (
        lambda t: t.update({name: t[name] ^ torch.tensor([0, 0, 1], dtype=torch.uint8)}),
        lambda t: t.update({name: t[name].flip(0)}),
    ):
        file.write_bytes(original)
        rewrite(file, damage)
        with pytest.raises(ValueError, match="not those of the header's checksum"):
            load_mask(file)
    file.write_bytes(original)
    rewrite(file, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(ValueError, match=f"mask of layer {LAYERS[1]} is .*not that of 4 x 5 bits"):
        load_mask(file)
    rewrite(file, lambda tensors: tensors.update({name: torch.zeros(3, dtype=torch.float32)}))
    with pytest.raises(ValueError, match=f"mask of layer {LAYERS[1]} is torch.float32"):
        load_mask(file)
    rewrite(file, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=name):
        load_mask(file)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h.update(format_version=2), "format version 2, this peft-svdinit reads 1"),
        (lambda h: h.pop("format_version"), "format version null"),
        (lambda h: h.pop("density"), "damaged header: density is missing"),
        (lambda h: h.update(density="0.4"), 'damaged header: density must be a number, got "0.4"'),
        (lambda h: h.update(density=4.0), r"density must be in \(0, 1\], got 4.0"),
        (lambda h: h.update(density=True), "damaged header: density must be a number, got true"),
        (lambda h: h.update(seed=1.5), "damaged header: seed must be an integer, got 1.5"),
        (lambda h: h.update(scope="all"), "scope must be one of"),
        (lambda h: h.update(floor=math.nan), "damaged header .NaN is no number"),
        (lambda h: h.update(floor=0.9), "floor must be in .* got 0.9"),
        (lambda h: h.update(source=None), "damaged header: source must be an object, got null"),
        (lambda h: h.pop("checksum"), "damaged header: checksum is missing"),
        (lambda h: h.update(layers={}), "not those of the header's checksum"),
        (lambda h: h.update(layers=[1]), "damaged header"),
        (
            lambda h: h["layers"].update({LAYERS[0]: [-3, -5, 7, "h"]}),
            r"layers\[.*\]\[0\] .*least 1",
        ),
        (lambda h: h["layers"].update({LAYERS[0]: [3, 5, 7]}), r"layers\[.*\] .*length 4"),
        (lambda h: h["layers"].update({LAYERS[0]: [3, 5, 7, 1]}), r"layers\[.*\]\[3\] .* text"),
        (lambda h: h["layers"].update({LAYERS[0]: [3, 9, 7, "h"]}), "not that of 3 x 9 bits"),
    ],
)
def test_a_header_of_another_version_or_damaged_is_one_clear_error(file, edit, message):
    rewrite(file, header=edit)
    with pytest.raises(ValueError, match=message):
        load_mask(file)


def test_a_file_that_is_no_mask_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"no LoRI mask; make one with `svdinit mask`"):
        load_mask(path)
    save_file({"a": torch.zeros(2)}, path, {HEADER_KEY: "{"})
    with pytest.raises(ValueError, match="damaged header"):
        load_mask(path)
    save_file({"a": torch.zeros(2)}, path, {HEADER_KEY: "[]"})
    with pytest.raises(ValueError, match="damaged header"):
        load_mask(path)
    with pytest.raises(ValueError, match=r"must be safetensors, got .*x\.pt"):
        load_mask(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match=f"has no {MASK_FILE_NAME}"):
        load_mask(tmp_path)


def test_a_mask_that_keeps_nothing_in_a_layer_is_neither_written_nor_read(tmp_path, file):
    empty = some_mask()
    empty.layers[LAYERS[1]].mask.zero_()
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"keeps nothing in layer {LAYERS[1]}.*floor=0.01"):
        save_mask(file, empty)
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="the mask has no layer"):
        save_mask(tmp_path, LoriMask({}, density=0.1, seed=0))


def test_a_kill_while_writing_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()
    written = TensorWriter.write

    def killed(self: TensorWriter, name: str, tensor: Tensor) -> None:
        if name == f"{LAYERS[2]}.mask":
            raise KeyboardInterrupt
        written(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        save_mask(file, some_mask(1))
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]
    with pytest.raises(KeyboardInterrupt):
        save_mask(file.parent / "new", some_mask(1))
    assert not list((file.parent / "new").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_compact_adapter_is_read_back_bit_by_bit(tmp_path, dtype):
    adapter = some_adapter(dtype)
    assert save_compact(tmp_path, adapter) == tmp_path / COMPACT_FILE_NAME
    found = load_compact(tmp_path)
    assert same(found.mask, adapter.mask) and found.config == adapter.config
    assert found.values.keys() == adapter.values.keys()
    for name, values in adapter.values.items():
        assert found.values[name].dtype == dtype and torch.equal(found.values[name], values)


def test_values_that_do_not_fit_their_mask_are_refused(tmp_path):
    adapter = some_adapter()
    name = LAYERS[0]
    broken = [
        ({**adapter.values, name: adapter.values[name][1:]}, f"layer {name}: the mask keeps"),
        ({**adapter.values, name: adapter.values[name] * torch.nan}, f"layer {name}: values have"),
        ({key: v for key, v in adapter.values.items() if key != name}, f"layer {name} has a mask"),
        ({**adapter.values, "z": torch.ones(1)}, "layer z has a mask without values, or"),
    ]
    for values, message in broken:
        with pytest.raises(ValueError, match=message):
            save_compact(tmp_path, CompactAdapter(adapter.mask, values, {}))
    assert not (tmp_path / COMPACT_FILE_NAME).exists()
    path = save_compact(tmp_path, adapter)
    rewrite(path, lambda t: t.update({f"{name}.values": t[f"{name}.values"][:-1]}))
    with pytest.raises(ValueError, match=f"layer {name} needs .* finite values"):
        load_compact(path)
    rewrite(path, lambda t: t.update({f"{name}.values": t[f"{name}.values"].char()}))
    with pytest.raises(TypeError, match=f"{name}.values is stored as I8"):
        load_compact(path)


def test_a_mask_does_not_take_the_place_of_a_compact_adapter(tmp_path):
    path = save_compact(tmp_path / "adapter.safetensors", some_adapter())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"path: .* is a compact adapter and would be lost"):
        save_mask(path, some_mask())
    assert path.read_bytes() == before


def test_a_mask_is_no_compact_adapter(tmp_path):
    path = save_mask(tmp_path / "m.safetensors", some_mask())
    with pytest.raises(ValueError, match="is a mask without trained values"):
        load_compact(path)


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({"seed": "x"}, (4, 2), 'seed must be an integer, got "x"'),
        (
            {"base_model_name_or_path": 3},
            (4, 2),
            "name_or_path must be text or null, got 3",
        ),
        ({"in_features": ["a"]}, (4, 2), "damaged header: in_features must be an object"),
        ({"in_features": {"a": "7"}}, (4, 2), r'in_features\["a"\] must be an integer, got "7"'),
        ({"in_features": {"a": 0}}, (4, 2), r'in_features\["a"\] must be .* at least 1, got 0'),
        ({}, (4,), r"layer a has scores of shape \(4,\), which"),
    ],
)
def test_a_file_of_scores_of_no_b_is_one_clear_error(tmp_path, change, shape, message):
    path = tmp_path / "s.safetensors"
    header = {"in_features": {"a": 7}, "seed": 0, "source": {}, "base_model_name_or_path": None}
    kind = HeadedFile("peft_svdinit.lori_scores", "scores.safetensors", "scores")
    kind.write(path, header, {"a.scores": torch.ones(4, 2)})
    assert load_scores(path).in_features == {"a": 7}
    kind.write(path, {**header, **change}, {"a.scores": torch.ones(shape)})
    with pytest.raises(ValueError, match=message):
        load_scores(path)
    kind.write(path, header, {"a.scores": torch.ones(4, 2, dtype=torch.int32)})
    with pytest.raises(TypeError, match=r"scores: .*: a\.scores is stored as I32"):
        load_scores(path)
