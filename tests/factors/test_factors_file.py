"""The factors file: what is written is read back, and what is wrong with a file is said."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.headed_files import rewrite_headed
from support.strategies import layer_factors, layer_names
from support.tiny_models import truncate
from torch import Tensor

from peft_svdinit import FactorsFile, FactorsMetadata, LowRankFactors, save_factors
from peft_svdinit.factors import FACTORS_FILE_NAME
from peft_svdinit.files import TensorWriter, inside, is_local, resolve_file
from peft_svdinit.files.headed_file import FORMAT_VERSION

HEADER_KEY = "peft_svdinit.factors"
rewrite = partial(rewrite_headed, HEADER_KEY)
METADATA = FactorsMetadata("org/base", "abc", {"kind": "adapter"}, "randomized", 3)


def some_factors(rank: int = 2, layers: int = 3) -> dict[str, LowRankFactors]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{layer}.q_proj": LowRankFactors.from_delta(
            torch.randn(6, 5, generator=generator), rank
        )
        for layer in range(layers)
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    samples = {"layers.0.q_proj": torch.arange(30.0, dtype=torch.bfloat16)}
    return save_factors(tmp_path / "f.safetensors", some_factors(), METADATA, base_samples=samples)


def assert_equal(found: LowRankFactors, expected: LowRankFactors) -> None:
    for part in ("U", "S", "Vh"):
        assert torch.equal(getattr(found, part), getattr(expected, part))
    assert found.norm == expected.norm


@given(factors=st.dictionaries(layer_names, layer_factors(), min_size=1, max_size=4))
def test_what_is_saved_is_read_back(factors, tmp_path_factory):
    path = save_factors(tmp_path_factory.mktemp("factors"), factors, METADATA)
    assert path.name == FACTORS_FILE_NAME
    file = FactorsFile(path.parent)
    assert set(file) == set(factors) and len(file) == len(factors)
    assert file.metadata == METADATA
    for name, layer in factors.items():
        assert_equal(file[name], layer)
        assert file.rank_of(name) == layer.rank
        assert file.base_sample(name) is None


def test_the_same_factors_give_the_same_bytes(tmp_path):
    first, second = (
        save_factors(
            tmp_path / f"{run}.safetensors",
            dict(sorted(some_factors().items(), reverse=bool(run))),
            METADATA,
        )
        for run in (0, 1)
    )
    assert first.read_bytes() == second.read_bytes()


def test_base_samples_are_kept_for_the_layers_that_have_them(file):
    found = FactorsFile(file)
    sample = found.base_sample("layers.0.q_proj")
    assert sample is not None and sample.entries.dtype == torch.bfloat16
    assert torch.equal(sample.entries, torch.arange(30.0, dtype=torch.bfloat16))
    assert found.base_sample("layers.1.q_proj") is None


def test_samples_of_other_layers_are_not_stored(tmp_path):
    path = save_factors(tmp_path, some_factors(), METADATA, base_samples={"other": torch.ones(3)})
    assert not any(key.endswith(".base_entries") for key in load_file(path))


def test_samples_that_are_not_those_of_the_weight_are_refused(tmp_path):
    samples = {"layers.0.q_proj": torch.ones(8)}
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj .*\(8,\).*there are 30"):
        save_factors(tmp_path, some_factors(), METADATA, base_samples=samples)
    assert not list(tmp_path.iterdir())


def test_damaged_samples_are_refused_on_opening(file):
    rewrite(file, lambda tensors: tensors.update({"layers.0.q_proj.base_entries": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"base entries of shape \(3,\)"):
        FactorsFile(file)


def test_factors_are_stored_in_float32(tmp_path):
    delta = torch.randn(6, 5, dtype=torch.float64)
    path = save_factors(tmp_path, {"layer": LowRankFactors.from_delta(delta, 5)}, METADATA)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    assert FactorsFile(path)["layer"].energy() == pytest.approx(1.0)


def test_truncated_views_are_stored_as_themselves(tmp_path):
    layer = some_factors(rank=5, layers=1)["layers.0.q_proj"].truncated(2)
    path = save_factors(tmp_path, {"layer": layer}, METADATA)
    assert_equal(FactorsFile(path)["layer"], layer)


def test_an_unknown_layer_is_a_key_error(file):
    found = FactorsFile(file)
    assert "lm_head" not in found
    with pytest.raises(KeyError, match="lm_head"):
        found["lm_head"]


def test_the_factors_of_no_layer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="factors is empty"):
        save_factors(tmp_path, {}, METADATA)
    assert not list(tmp_path.iterdir())


def damaged(part: str, value: float) -> LowRankFactors:
    (layer,) = some_factors(layers=1).values()
    getattr(layer, part)[-1] = value
    return layer


@pytest.mark.parametrize(
    ("layer", "defect"),
    [
        (damaged("U", math.nan), "NaN or infinite"),
        (damaged("S", math.inf), "NaN or infinite"),
        (damaged("Vh", -math.inf), "NaN or infinite"),
        (damaged("S", -0.1), "not descending and >= 0"),
        (damaged("S", 100.0), "not descending and >= 0"),
        (LowRankFactors(torch.eye(3), torch.ones(3), torch.eye(3), 1.0), "exceed the norm"),
        (LowRankFactors(torch.eye(3), torch.ones(3), torch.eye(3), math.nan), "norm of nan"),
        (LowRankFactors(torch.eye(3), torch.ones(3), torch.eye(3), math.inf), "norm of inf"),
        (LowRankFactors(torch.eye(3), torch.zeros(3), torch.eye(3), -1.0), "norm of -1"),
    ],
)
def test_factors_that_the_reader_would_refuse_are_not_written(tmp_path, layer, defect):
    with pytest.raises(ValueError, match=f"layer layers.7.q_proj has .*{defect}"):
        save_factors(tmp_path, {**some_factors(), "layers.7.q_proj": layer}, METADATA)
    assert not list(tmp_path.iterdir())


def test_metadata_that_json_cannot_hold_leaves_no_file(tmp_path):
    metadata = FactorsMetadata(source={"share": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        save_factors(tmp_path, some_factors(), metadata)
    assert not list(tmp_path.iterdir())


def test_a_write_that_dies_midway_leaves_the_old_file_and_nothing_else(file, tmp_path, monkeypatch):
    before = file.read_bytes()

    def half(writer: TensorWriter, name: str, tensor: Tensor) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(TensorWriter, "write", half)
    with pytest.raises(OSError, match="no space left"):
        save_factors(file, some_factors(rank=1), METADATA)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_one_layer_of_factors_that_are_read_lazily_is_in_memory_at_a_time(tmp_path):
    layers = some_factors(layers=4)
    alive: list[weakref.ref] = []

    class Lazy(Mapping[str, LowRankFactors]):
        def __getitem__(self, name: str) -> LowRankFactors:
            assert sum(tensor() is not None for tensor in alive) <= 1  # that of the layer before
            stored = layers[name]
            layer = LowRankFactors(stored.U.clone(), stored.S, stored.Vh, stored.norm)
            alive.append(weakref.ref(layer.U))
            return layer

        def __iter__(self) -> Iterator[str]:
            return iter(layers)

        def __len__(self) -> int:
            return len(layers)

    lazily = save_factors(tmp_path / "lazily.safetensors", Lazy(), METADATA)
    at_once = save_factors(tmp_path / "at_once.safetensors", layers, METADATA)
    assert len(alive) >= 2 * len(layers)
    assert lazily.read_bytes() == at_once.read_bytes()


def test_one_layer_of_factors_may_stand_under_two_names(tmp_path):
    (layer,) = some_factors(layers=1).values()
    file = FactorsFile(save_factors(tmp_path, {"first": layer, "second": layer}, METADATA))
    assert_equal(file["first"], layer)
    assert_equal(file["second"], layer)


def test_a_tilde_means_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        save_factors("~/made/", some_factors(), METADATA) == tmp_path / "made" / FACTORS_FILE_NAME
    )
    assert (tmp_path / "made" / FACTORS_FILE_NAME).is_file()


def test_writing_again_replaces_the_file(file):
    save_factors(file, some_factors(rank=1, layers=1), METADATA)
    assert list(FactorsFile(file)) == ["layers.0.q_proj"]


def change(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[key] = value(tensors[key]).contiguous()

    return edit


LAYER = "layers.1.q_proj"


@pytest.mark.parametrize("part", ["U", "S", "Vh"])
def test_a_layer_that_lacks_a_part_is_refused_on_opening(file, part):
    rewrite(file, tensors=lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    with pytest.raises(ValueError, match=f"layer {LAYER} lacks U, S or Vh"):
        FactorsFile(file)


@pytest.mark.parametrize(
    ("key", "edit", "message"),
    [
        (f"{LAYER}.U", lambda U: U[:, :1], f"layer {LAYER} has factors of ranks 1, 2 and 2"),
        (f"{LAYER}.S", lambda S: S[:1], f"layer {LAYER} has factors of ranks 2, 1 and 2"),
        (f"{LAYER}.Vh", lambda Vh: Vh[:1], f"layer {LAYER} has factors of ranks 2, 2 and 1"),
        (f"{LAYER}.S", torch.diag, f"layer {LAYER} lacks U, S or Vh, or one has the wrong number"),
    ],
)
def test_factors_that_do_not_fit_together_are_refused_on_opening(file, key, edit, message):
    rewrite(file, tensors=change(key, edit))
    with pytest.raises(ValueError, match=message):
        FactorsFile(file)


@pytest.mark.parametrize("part", ["U", "S", "Vh", "base"])
def test_parts_that_are_no_floating_numbers_are_refused(file, part):
    key = f"{LAYER}.{part}"
    rewrite(file, tensors=lambda t: t.update({key: torch.ones(2, dtype=torch.int64)}))
    with pytest.raises(TypeError, match=f"factors: .*: {key} is stored as I64"):
        FactorsFile(file)


def test_factors_of_rank_zero_are_refused(file):
    def empty(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.U"] = torch.zeros(6, 0)
        tensors[f"{LAYER}.S"] = torch.zeros(0)
        tensors[f"{LAYER}.Vh"] = torch.zeros(0, 5)

    rewrite(file, tensors=empty)
    with pytest.raises(ValueError, match=f"layer {LAYER} has factors of ranks 0"):
        FactorsFile(file)


@pytest.mark.parametrize(
    ("key", "edit", "defect"),
    [
        (f"{LAYER}.U", lambda U: U.fill_(math.nan), "NaN or infinite factors"),
        (f"{LAYER}.Vh", lambda Vh: Vh.fill_(math.inf), "NaN or infinite factors"),
        (f"{LAYER}.S", lambda S: S.flip(0), "not descending"),
        (f"{LAYER}.S", lambda S: -S, "not descending"),
        (f"{LAYER}.S", lambda S: 10 * S, "exceed the norm"),
    ],
)
def test_bad_values_are_refused_when_their_layer_is_read(file, key, edit, defect):
    rewrite(file, tensors=change(key, edit))
    found = FactorsFile(file)
    found["layers.0.q_proj"]
    with pytest.raises(ValueError, match=f"{file.name}: layer {LAYER} has .*{defect}"):
        found[LAYER]


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_a_norm_that_is_none_is_refused(file, norm):
    rewrite(file, header=lambda header: header["norms"].update({LAYER: norm}))
    with pytest.raises(ValueError, match=f"damaged header.*({LAYER}.* of at least 0|no number)"):
        FactorsFile(file)


def test_a_layer_without_its_norm_is_refused(file):
    rewrite(file, header=lambda header: header["norms"].pop(LAYER))
    with pytest.raises(ValueError, match=f"no norm for layer {LAYER}"):
        FactorsFile(file)


@pytest.mark.parametrize("version", [None, 0, FORMAT_VERSION + 1, "1"])
def test_another_format_version_is_refused_with_both_named(file, version):
    rewrite(file, header=lambda header: header.update(format_version=version, extra=1))
    with pytest.raises(
        ValueError,
        match=f"format version {json.dumps(version)}, this peft-svdinit reads {FORMAT_VERSION}",
    ):
        FactorsFile(file)


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header.pop("norms"),
        lambda header: header.update(norms=[1.0]),
        lambda header: header["norms"].update({LAYER: "large"}),
        lambda header: header.update(compression="zip"),
    ],
)
def test_a_damaged_header_is_refused(file, edit):
    rewrite(file, header=edit)
    with pytest.raises(ValueError, match=f"factors: .*{file.name}: damaged header"):
        FactorsFile(file)


@pytest.mark.parametrize("header", ["", "{", "[]", "null", "7"])
def test_a_header_that_is_no_json_object_is_refused(file, header):
    save_file(load_file(file), file, {HEADER_KEY: header})
    with pytest.raises(ValueError, match=f"factors: .*{file.name}: damaged header"):
        FactorsFile(file)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_plain_safetensors_file_is_refused_with_the_command_that_makes_factors(
    tmp_path, metadata
):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2, 2)}, path, metadata)
    with pytest.raises(ValueError, match=r"no factors; make some with .*svdinit extract"):
        FactorsFile(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_truncated_file_is_refused(file, share):
    truncate(file, share)
    with pytest.raises(ValueError, match=r"not a readable safetensors file .*truncated"):
        FactorsFile(file)


@pytest.mark.parametrize("name", ["factors.pth", "factors.bin", "factors.pt", "factors.ckpt"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name):
    path = tmp_path / name
    torch.save({}, path)
    with pytest.raises(ValueError, match="factors must be safetensors") as error:
        FactorsFile(path)
    assert "weights_only=True" in str(error.value)
    assert str(path.with_suffix(".safetensors")) in str(error.value)


def test_what_is_not_there_is_said_without_asking_a_server(tmp_path):
    with pytest.raises(FileNotFoundError, match="factors: there is no file or folder"):
        FactorsFile(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match=f"has no {FACTORS_FILE_NAME}"):
        FactorsFile(tmp_path)


def test_a_hub_id_that_cannot_be_reached_may_be_a_path_misspelt(monkeypatch):
    with pytest.raises(FileNotFoundError, match="factors: 'nobody/nothing' is neither a path"):
        FactorsFile("nobody/nothing")


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("org/model", False),
        ("model-7B", False),
        ("org/Llama-3.1", False),
        ("./model", True),
        ("~/model", True),
        ("/data/model", True),
        ("runs/a/factors", True),
        ("org/factors.safetensors", True),
    ],
)
def test_hub_ids_are_told_from_paths(text, local):
    assert is_local(text) is local


def test_an_existing_path_is_local_whatever_its_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org", "model").mkdir(parents=True)
    assert is_local("org/model")


def test_the_home_directory_is_expanded(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_file("~/f.safetensors", FACTORS_FILE_NAME, argument="svd_factors") == file


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..\\x"])
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of the folder"):
        inside(tmp_path, name, "base")


def test_names_below_a_folder_are_allowed(tmp_path):
    assert inside(tmp_path, "shards/1.safetensors", "base") == tmp_path / "shards" / "1.safetensors"
