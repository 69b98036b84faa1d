"""Deltas of two checkpoints against the dense difference, and what the pair refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import (
    ARCHITECTURES,
    SavedPair,
    rewrite_tensors,
    save_pair,
    tiny_model,
    truncate,
    weight_of,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_svdinit.factors import CheckpointPair
from peft_svdinit.models import (
    Checkpoint,
    LinearWeights,
    StoredParameters,
    linear_modules,
    model_skeleton,
    recognition_sample,
    sampled_positions,
)
from peft_svdinit.models import checkpoint as checkpoints

LAYER = "model.layers.0.self_attn.q_proj"
KEY = f"{LAYER}.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def bytes_read() -> int:
    """What this process has asked files for; 0 where the system does not count."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        return 0
    return int(counts.read_text().splitlines()[0].removeprefix("rchar:"))


def dense_delta(pair: SavedPair, name: str) -> Tensor:
    """tuned - base of the models in memory, (out, in)."""
    delta = weight_of(pair.tuned, name).float() - weight_of(pair.base, name).float()
    return delta.mT if isinstance(pair.base.get_submodule(name), Conv1D) else delta


def linear_names(pair: SavedPair) -> set[str]:
    """Linear layers of the model in memory, the head excepted."""
    return {
        name
        for name, module in pair.base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head"
    }


def assert_deltas(found: CheckpointPair, pair: SavedPair) -> None:
    assert set(found) == linear_names(pair) and len(found) == len(linear_names(pair))
    for name in found:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], dense_delta(pair, name))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_deltas_are_the_dense_difference(tmp_path, architecture, dtype, sharded):
    pair = save_pair(tmp_path, architecture, dtype=dtype, sharded=sharded)
    assert (pair.base_folder / INDEX).is_file() is sharded
    assert_deltas(CheckpointPair(pair.base_folder, pair.tuned_folder), pair)


def test_a_sharded_checkpoint_pairs_with_one_in_one_file(tmp_path):
    one, sharded = (save_pair(tmp_path / str(cut), sharded=cut) for cut in (False, True))
    mixed = CheckpointPair(one.base_folder, sharded.tuned_folder)
    same = CheckpointPair(one.base_folder, one.tuned_folder)
    assert all(torch.equal(mixed[name], same[name]) for name in same)


def test_precisions_may_differ(tmp_path):
    pair = save_pair(tmp_path)
    nn.Module.to(pair.tuned, dtype=torch.bfloat16)
    pair.tuned.save_pretrained(str(pair.tuned_folder))
    assert_deltas(CheckpointPair(pair.base_folder, pair.tuned_folder), pair)


def add_or_drop_prefix(folder: Path, prefix: str, *, add: bool) -> None:
    """Respell the keys as checkpoints of the model without its head, or with it, spell them."""

    def respell(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[f"{prefix}{key}" if add else key.removeprefix(prefix)] = tensors.pop(key)

    rewrite_tensors(folder / WEIGHTS, respell)


@pytest.mark.parametrize("side", ["base", "tuned", "both"])
def test_keys_without_the_prefix_of_the_model_are_found(tmp_path, side):
    # As in the gpt2 repository of the Hub, whose names are those of the model without its head.
    pair = save_pair(tmp_path, "gpt2", change=lambda name: True)
    before = CheckpointPair(pair.base_folder, pair.tuned_folder).uncovered()
    for name, folder in (("base", pair.base_folder), ("tuned", pair.tuned_folder)):
        if side in (name, "both"):
            add_or_drop_prefix(folder, "transformer.", add=False)
    found = CheckpointPair(pair.base_folder, pair.tuned_folder)
    assert_deltas(found, pair)
    assert [
        (tensor.key.removeprefix("transformer."), tensor.relative_change)
        for tensor in found.uncovered()
    ] == [(tensor.key.removeprefix("transformer."), tensor.relative_change) for tensor in before]


def test_target_modules_are_chosen_as_in_a_lora_config(tmp_path):
    pair = save_pair(tmp_path)
    folders = (pair.base_folder, pair.tuned_folder)
    assert set(CheckpointPair(*folders, target_modules=["q_proj"])) == {
        f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)
    }
    assert set(CheckpointPair(*folders, target_modules=r".*\.1\.mlp\.(up|down)_proj")) == {
        f"model.layers.1.mlp.{name}_proj" for name in ("up", "down")
    }
    assert set(CheckpointPair(*folders, target_modules=["lm_head"])) == {"lm_head"}
    with pytest.raises(ValueError, match=r"target_modules=\['query'\] matches no linear layer"):
        CheckpointPair(*folders, target_modules=["query"])


@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_embeddings_are_one_change_outside_the_factors(tmp_path, stored_twice):
    pair = save_pair(tmp_path, change=lambda name: True, tie_word_embeddings=True)
    if stored_twice:

        def duplicate(tensors: dict[str, Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

        rewrite_tensors(pair.base_folder / WEIGHTS, duplicate)
    found = CheckpointPair(pair.base_folder, pair.tuned_folder)
    assert_deltas(found, pair)
    keys = [tensor.key for tensor in found.uncovered()]
    assert keys.count("model.embed_tokens.weight") == 1
    assert not any("proj" in key or "lm_head" in key for key in keys)


def test_uncovered_names_what_changed_outside_the_linear_layers_by_its_share(tmp_path):
    changed = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    pair = save_pair(tmp_path, change=lambda name: name in changed)
    found = CheckpointPair(pair.base_folder, pair.tuned_folder).uncovered()
    assert {tensor.key for tensor in found} == changed
    for tensor in found:
        before, after = (dict(m.named_parameters())[tensor.key] for m in (pair.base, pair.tuned))
        expected = (after - before).norm() / before.norm()
        assert tensor.relative_change == pytest.approx(expected.item(), rel=1e-5)
    shares = [tensor.relative_change for tensor in found]
    assert shares == sorted(shares, reverse=True)


def test_nothing_is_uncovered_if_only_linear_layers_changed(tmp_path):
    pair = save_pair(tmp_path)
    assert CheckpointPair(pair.base_folder, pair.tuned_folder).uncovered() == []


def test_a_layer_left_out_of_the_targets_counts_as_uncovered(tmp_path):
    pair = save_pair(tmp_path)
    found = CheckpointPair(pair.base_folder, pair.tuned_folder, target_modules=["q_proj"])
    keys = {tensor.key for tensor in found.uncovered()}
    assert KEY not in keys and KEY.replace("q_proj", "v_proj") in keys


def test_a_tensor_that_was_zero_has_changed_by_its_norm(tmp_path):
    pair = save_pair(tmp_path, "gpt2", change=lambda name: "ln_f.bias" in name)
    (tensor,) = CheckpointPair(pair.base_folder, pair.tuned_folder).uncovered()
    assert tensor.key == "transformer.ln_f.bias"
    assert tensor.relative_change == pytest.approx(
        pair.tuned.get_parameter(tensor.key).norm().item()
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_vocabulary_is_refused_with_the_remedy(tmp_path, architecture):
    pair = save_pair(tmp_path, architecture)
    pair.tuned.resize_token_embeddings(70, mean_resizing=False)
    pair.tuned.save_pretrained(str(pair.tuned_folder))
    with pytest.raises(ValueError, match=r"tuned: .*\(70, 16\).*\(64, 16\).*[Rr]esize both models"):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


def edited(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite_tensors(folder / WEIGHTS, edit)


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(KEY), f"has no weight for layer {LAYER}"),
        (
            lambda tensors: tensors.update({KEY: torch.ones(16, 8)}),
            rf"layer {LAYER} has shape \(16, 8\), but \(out, in\) = \(16, 16\)",
        ),
        (
            lambda tensors: tensors.update({KEY: torch.ones(16)}),
            rf"layer {LAYER} has shape \(16,\), but",
        ),
    ],
    ids=["missing", "shape", "dimensions"],
)
def test_a_layer_that_does_not_fit_is_refused_on_opening(tmp_path, side, edit, message):
    pair = save_pair(tmp_path)
    rewrite_tensors(getattr(pair, f"{side}_folder") / WEIGHTS, edit)
    with pytest.raises(ValueError, match=f"{side}: .*{message}.*another architecture"):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


def test_a_transposed_weight_is_checked_in_its_own_orientation(tmp_path):
    pair = save_pair(tmp_path, "gpt2")
    key = "transformer.h.0.attn.c_attn.weight"
    edited(lambda tensors: tensors.update({key: tensors[key].mT.contiguous()}))(pair.tuned_folder)
    with pytest.raises(
        ValueError, match=r"c_attn has shape \(48, 16\), but \(out, in\) = \(48, 16\)"
    ):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_side_and_layer(tmp_path, side, value):
    pair = save_pair(tmp_path)
    edit = edited(lambda tensors: tensors[KEY][3, 2:3].fill_(value))
    edit(getattr(pair, f"{side}_folder"))
    found = CheckpointPair(pair.base_folder, pair.tuned_folder)
    with pytest.raises(ValueError, match=f"{side}: the weight of layer {LAYER} has NaN or inf"):
        found[LAYER]
    assert torch.isfinite(found[LAYER.replace(".0.", ".1.")]).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_weight_is_a_type_error_that_names_the_layer(tmp_path, dtype):
    pair = save_pair(tmp_path)
    edited(lambda tensors: tensors.update({KEY: tensors[KEY].to(dtype)}))(pair.tuned_folder)
    with pytest.raises(TypeError, match=f"tuned: the weight of layer {LAYER} is stored as .*quant"):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("entries", [1, 40, 1000])
def test_deltas_read_in_blocks_of_any_size_are_the_same(
    tmp_path, monkeypatch, architecture, entries
):
    pair = save_pair(tmp_path, architecture, sharded=True, change=lambda name: True)
    whole = CheckpointPair(pair.base_folder, pair.tuned_folder).uncovered()
    monkeypatch.setattr(checkpoints, "BLOCK_ENTRIES", entries)
    found = CheckpointPair(pair.base_folder, pair.tuned_folder)
    assert_deltas(found, pair)
    for one, other in zip(found.uncovered(), whole, strict=True):
        assert one.key == other.key
        assert one.relative_change == pytest.approx(other.relative_change, rel=1e-6)


def test_excluded_layers_are_not_compared_at_all(tmp_path):
    pair = save_pair(tmp_path, change=lambda name: True)
    edited(lambda tensors: tensors.update({KEY: torch.ones(3, 3)}))(pair.tuned_folder)
    folders = (pair.base_folder, pair.tuned_folder)
    found = CheckpointPair(*folders, exclude_modules=["layers.0.self_attn.q_proj", "norm"])
    assert set(found) == linear_names(pair) - {LAYER}
    keys = {tensor.key for tensor in found.uncovered()}
    assert KEY not in keys and "model.norm.weight" not in keys
    assert "model.embed_tokens.weight" in keys
    assert set(CheckpointPair(*folders, exclude_modules=r".*self_attn.*")) == {
        name for name in linear_names(pair) if "self_attn" not in name
    }
    with pytest.raises(ValueError, match=r"exclude_modules=.* leaves no linear layer"):
        CheckpointPair(*folders, exclude_modules=r".*")


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_longer_vocabulary_the_rows_of_both_are_compared_on_demand(tmp_path, tied):
    pair = save_pair(tmp_path, change=lambda name: True, tie_word_embeddings=tied)
    uncovered = CheckpointPair(pair.base_folder, pair.tuned_folder).uncovered()
    pair.tuned.resize_token_embeddings(70, mean_resizing=False)
    pair.tuned.save_pretrained(str(pair.tuned_folder))
    folders = (pair.base_folder, pair.tuned_folder)
    with pytest.raises(ValueError, match=r"\(70, 16\).*exclude_modules.*slice_modules"):
        CheckpointPair(*folders)
    named = ["embed_tokens", "lm_head"]
    sliced = CheckpointPair(*folders, slice_modules=named)
    assert sliced.uncovered() == uncovered
    whole = sliced.whole_tensors(["embed_tokens"])["model.embed_tokens.weight"]
    assert torch.equal(whole, weight_of(pair.tuned, "model.embed_tokens")[:64])
    left_out = CheckpointPair(*folders, exclude_modules=named).uncovered()
    assert not any("embed" in tensor.key or "head" in tensor.key for tensor in left_out)
    if not tied:
        head = CheckpointPair(*folders, slice_modules=named, target_modules=["lm_head"])
        assert torch.equal(head["lm_head"], before_head(pair))


def before_head(pair: SavedPair) -> Tensor:
    return (weight_of(pair.tuned, "lm_head")[:64] - weight_of(pair.base, "lm_head")).float()


def test_a_shorter_vocabulary_cannot_be_sliced(tmp_path):
    pair = save_pair(tmp_path)
    pair.tuned.resize_token_embeddings(60, mean_resizing=False)
    pair.tuned.save_pretrained(str(pair.tuned_folder))
    with pytest.raises(ValueError, match=r"\(60, 16\).*\(64, 16\)"):
        CheckpointPair(pair.base_folder, pair.tuned_folder, slice_modules=["embed_tokens"])


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_tensor_that_one_side_lacks_is_refused_by_name(tmp_path, side):
    pair = save_pair(tmp_path)
    edited(lambda tensors: tensors.pop("model.norm.weight"))(getattr(pair, f"{side}_folder"))
    folders = (pair.base_folder, pair.tuned_folder)
    with pytest.raises(ValueError, match=f"{side}: it has no tensor model.norm.weight, which"):
        CheckpointPair(*folders)
    assert set(CheckpointPair(*folders, exclude_modules=["model.norm"])) == linear_names(pair)


def test_a_tensor_that_only_tuned_has_is_refused_by_name(tmp_path):
    pair = save_pair(tmp_path)
    extra = KEY.replace("weight", "bias")
    edited(lambda tensors: tensors.update({extra: torch.ones(16)}))(pair.tuned_folder)
    folders = (pair.base_folder, pair.tuned_folder)
    with pytest.raises(ValueError, match=f"tuned: it has a tensor {extra} that the base's arch"):
        CheckpointPair(*folders)
    CheckpointPair(*folders, exclude_modules=[LAYER])


def test_a_head_that_fine_tuning_untied_is_a_change_of_its_own(tmp_path):
    pair = save_pair(tmp_path, tie_word_embeddings=True)

    def untie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    rewrite_tensors(pair.tuned_folder / WEIGHTS, untie)
    found = CheckpointPair(pair.base_folder, pair.tuned_folder).uncovered()
    assert [tensor.key for tensor in found] == ["lm_head.weight"]


def test_whole_tensors_are_those_of_the_modules_named_or_of_all_that_changed(tmp_path):
    changed = {"model.embed_tokens.weight", "model.norm.weight"}
    pair = save_pair(tmp_path, change=lambda name: name in changed, dtype=torch.bfloat16)
    found = CheckpointPair(pair.base_folder, pair.tuned_folder)
    assert set(found.whole_tensors(["changed"])) == changed
    named = found.whole_tensors(["norm", "lm_head"])
    assert set(named) == {"model.norm.weight", "lm_head.weight"}
    for name, tensor in named.items():
        assert torch.equal(tensor, pair.tuned.get_parameter(name))
    with pytest.raises(ValueError, match="modules_to_save: q_proj is no module of"):
        found.whole_tensors(["q_proj"])


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    pair = save_pair(tmp_path, sharded=True)
    path = pair.tuned_folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"][KEY] = name
    path.write_text(json.dumps(index))
    save_file({KEY: torch.ones(16, 16)}, tmp_path / "secret.safetensors")
    with pytest.raises(ValueError, match="leads out of the folder"):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


def test_missing_shards_are_all_named(tmp_path):
    pair = save_pair(tmp_path, sharded=True)
    shards = sorted(pair.tuned_folder.glob("model-*.safetensors"))
    for shard in shards[:2]:
        shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"tuned: .* lacks the shards") as error:
        CheckpointPair(pair.base_folder, pair.tuned_folder)
    assert all(shard.name in str(error.value) for shard in shards[:2])
    assert shards[2].name not in str(error.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_truncated_file_is_refused_by_its_path(tmp_path, sharded):
    pair = save_pair(tmp_path, sharded=sharded)
    path = min(pair.tuned_folder.glob("model*.safetensors"))
    truncate(path)
    with pytest.raises(ValueError, match=f"tuned: .*{path.name} is not a readable safetensors"):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


@pytest.mark.parametrize("text", ["", '{"weight_map": {', "[]"])
def test_a_damaged_index_is_refused_by_its_path(tmp_path, text):
    pair = save_pair(tmp_path, sharded=True)
    (pair.base_folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=rf"base: .*{INDEX} (is not|must hold)"):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["pytorch_model-00001-of-00002.bin"]])
def test_a_pickled_checkpoint_is_refused_with_the_command_that_converts_it(tmp_path, names):
    pair = save_pair(tmp_path)
    (pair.base_folder / WEIGHTS).unlink()
    for name in names:
        torch.save({}, pair.base_folder / name)
    with pytest.raises(ValueError, match=r"base: .* as a pickle") as error:
        CheckpointPair(pair.base_folder, pair.tuned_folder)
    assert f"from_pretrained('{pair.base_folder}').save_pretrained(" in str(error.value)


def test_the_command_that_converts_a_pickled_checkpoint_does(tmp_path):
    pair = save_pair(tmp_path)
    torch.save(load_file(pair.base_folder / WEIGHTS), pair.base_folder / "pytorch_model.bin")
    (pair.base_folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="as a pickle") as error:
        CheckpointPair(pair.base_folder, pair.tuned_folder)
    exec(str(error.value).partition('python -c "')[2].rstrip('"'))
    assert_deltas(CheckpointPair(pair.base_folder, pair.tuned_folder), pair)


def test_a_folder_without_weights_is_refused_by_what_it_lacks(tmp_path):
    pair = save_pair(tmp_path)
    (pair.tuned_folder / WEIGHTS).unlink()
    (pair.tuned_folder / "training_args.bin").write_bytes(b"what the Trainer leaves")
    with pytest.raises(FileNotFoundError, match=f"tuned: .* has neither {WEIGHTS} nor {INDEX}"):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


@pytest.mark.parametrize("name", ["missing", "base/model.safetensors"])
def test_what_is_no_folder_is_refused_by_its_argument(tmp_path, name):
    pair = save_pair(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"tuned: .*{name} is not a folder"):
        CheckpointPair(pair.base_folder, tmp_path / name)


def test_the_architecture_is_that_of_the_base(tmp_path):
    # A tuned folder may come without a configuration, as an export of weights alone does.
    pair = save_pair(tmp_path)
    (pair.tuned_folder / "config.json").unlink()
    assert_deltas(CheckpointPair(pair.base_folder, pair.tuned_folder), pair)


def test_another_architecture_is_refused(tmp_path):
    pair = save_pair(tmp_path / "llama")
    other = save_pair(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ValueError, match=r"tuned: model_type is 'gpt2' in its config.json, of the"):
        CheckpointPair(pair.base_folder, other.tuned_folder)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"]])
def test_a_configuration_without_a_known_architecture_is_refused(tmp_path, architectures):
    pair = save_pair(tmp_path)
    path = pair.base_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures}))
    with pytest.raises(ValueError, match="names no architecture that transformers"):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_skeleton_takes_no_memory_and_has_the_layers_of_the_model(tmp_path, architecture):
    pair = save_pair(tmp_path, architecture)
    skeleton = model_skeleton(pair.base_folder)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert linear_modules(skeleton) == linear_modules(tiny_model(architecture))


def test_all_linear_is_every_layer_but_the_head():
    model = tiny_model("gpt2")
    assert "lm_head" not in linear_modules(model)
    assert linear_modules(model, ["lm_head"])["lm_head"].out_features == 64
    conv = linear_modules(model)["transformer.h.0.mlp.c_fc"]
    assert (conv.out_features, conv.in_features, conv.transposed) == (64, 16, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_has_entries_of_the_oriented_weight_in_its_dtype(tmp_path, architecture, dtype):
    tiny_model(architecture).to(dtype).save_pretrained(tmp_path)
    weights = LinearWeights(StoredParameters(Checkpoint(tmp_path, argument="base")))
    for name in weights:
        sample = weights.sample(name)
        assert sample.dtype == dtype
        assert torch.equal(sample.float(), recognition_sample(weights[name]))


def test_sampling_reads_the_sampled_entries_alone(tmp_path):
    """Of a file of 1 GB, which is a hole but for them. Around a mapped entry much is read ahead."""
    shape, dtype = (128256, 4096), torch.bfloat16
    size = 2 * math.prod(shape)
    header = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}})
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        first = file.tell()
        for index, (row, col) in enumerate(sampled_positions(shape)):
            file.seek(first + 2 * (row * shape[1] + col))
            file.write(torch.tensor([index], dtype=dtype).view(torch.uint8).numpy().tobytes())
        file.truncate(first + size)
    checkpoint = Checkpoint(tmp_path, argument="base")
    before = bytes_read()
    entries = checkpoint.entries("w", sampled_positions(shape))
    assert torch.equal(entries, torch.arange(64).to(dtype))
    assert bytes_read() - before < 10_000


def test_a_copy_of_the_folder_is_the_same_checkpoint(tmp_path):
    pair = save_pair(tmp_path)
    shutil.copytree(pair.base_folder, tmp_path / "copy")
    found = CheckpointPair(pair.base_folder, tmp_path / "copy")
    assert all(not found[name].any() for name in found)
    assert found.uncovered() == []


def test_experts_that_are_stored_one_by_one_are_changes_outside_the_layers(tmp_path):
    pair = save_pair(tmp_path)
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    for folder, value in ((pair.base_folder, 1.0), (pair.tuned_folder, 1.5)):
        edited(lambda tensors, value=value: tensors.update({key: torch.full((4, 4), value)}))(
            folder
        )
    found = CheckpointPair(pair.base_folder, pair.tuned_folder)
    assert [(t.key, t.relative_change) for t in found.uncovered()] == [(key, 0.5)]
    assert not found.is_parameter(key) and found.is_parameter("model.norm.weight")
    assert (
        CheckpointPair(
            pair.base_folder, pair.tuned_folder, exclude_modules=r".*experts.*"
        ).uncovered()
        == []
    )


def test_a_tied_embedding_and_an_untied_head_are_saved_each_on_its_own(tmp_path):
    pair = save_pair(tmp_path, tie_word_embeddings=True)

    def untie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    rewrite_tensors(pair.tuned_folder / WEIGHTS, untie)
    whole = CheckpointPair(pair.base_folder, pair.tuned_folder).whole_tensors(["changed"])
    assert set(whole) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"] + 1)


def test_biases_of_linear_layers_are_not_saved_whole(tmp_path):
    pair = save_pair(tmp_path, "gpt2", change=lambda name: True)
    found = CheckpointPair(pair.base_folder, pair.tuned_folder)
    assert "transformer.h.0.attn.c_attn.bias" in {tensor.key for tensor in found.uncovered()}
    assert not any("c_attn" in name for name in found.whole_tensors(["changed"]))
    with pytest.raises(ValueError, match="modules_to_save: c_attn is no module of"):
        found.whole_tensors(["c_attn"])


def rewrite_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_settings_that_differ_are_named_and_other_heads_refused(tmp_path):
    pair = save_pair(tmp_path)
    folders = (pair.base_folder, pair.tuned_folder)
    assert CheckpointPair(*folders).changed_settings == {}
    rewrite_config(pair.tuned_folder, rms_norm_eps=0.01, hidden_act="gelu", use_cache=False)
    found = CheckpointPair(*folders).changed_settings
    assert found == {"hidden_act": ("silu", "gelu"), "rms_norm_eps": (1e-6, 0.01)}
    rewrite_config(pair.tuned_folder, num_attention_heads=4, head_dim=4)
    with pytest.raises(ValueError, match=r"head.* in its config.json, of the base it is"):
        CheckpointPair(*folders)


def test_one_file_comes_before_an_index_as_in_transformers(tmp_path):
    pair = save_pair(tmp_path)
    stale = {"weight_map": {KEY: "model-00001-of-00001.safetensors"}}
    (pair.tuned_folder / INDEX).write_text(json.dumps(stale))
    assert_deltas(CheckpointPair(pair.base_folder, pair.tuned_folder), pair)


@pytest.mark.parametrize("map_", [None, [KEY], {KEY: 3}])
def test_an_index_without_a_map_of_names_is_refused(tmp_path, map_):
    pair = save_pair(tmp_path, sharded=True)
    (pair.tuned_folder / INDEX).write_text(json.dumps({"weight_map": map_}))
    with pytest.raises(ValueError, match=r"index.json: weight_map.* must be"):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path):
    pair = save_pair(tmp_path)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edited(lambda tensors: tensors.update({old: torch.ones(4)}))(pair.tuned_folder)
    assert_deltas(CheckpointPair(pair.base_folder, pair.tuned_folder), pair)


def test_a_packed_weight_is_a_type_error_that_names_the_layer(tmp_path):
    pair = save_pair(tmp_path)

    def pack(tensors: dict[str, Tensor]) -> None:
        tensors[KEY.replace("weight", "qweight")] = tensors.pop(KEY).to(torch.int32)

    edited(pack)(pair.tuned_folder)
    with pytest.raises(TypeError, match=f"tuned: the weight of layer {LAYER} is stored as qweight"):
        CheckpointPair(pair.base_folder, pair.tuned_folder)


@pytest.mark.parametrize("argument", ["exclude_modules", "slice_modules"])
def test_a_choice_that_matches_nothing_is_refused(tmp_path, argument):
    pair = save_pair(tmp_path)
    folders = (pair.base_folder, pair.tuned_folder)
    open_pair: Any = CheckpointPair
    with pytest.raises(ValueError, match=rf"{argument}=\['lm_haed'\] matches no module"):
        open_pair(*folders, **{argument: ["lm_head", "lm_haed"]})


def test_nan_outside_the_layers_is_refused_by_side_and_name(tmp_path):
    pair = save_pair(tmp_path)
    edited(lambda tensors: tensors["model.norm.weight"][3:4].fill_(math.nan))(pair.tuned_folder)
    with pytest.raises(ValueError, match=r"tuned: model.norm.weight has NaN or infinite entries"):
        CheckpointPair(pair.base_folder, pair.tuned_folder).uncovered()


def test_a_tied_head_can_be_a_target(tmp_path):
    pair = save_pair(tmp_path, change=lambda name: True, tie_word_embeddings=True)
    found = CheckpointPair(pair.base_folder, pair.tuned_folder, target_modules=["lm_head"])
    assert torch.equal(found["lm_head"], dense_delta(pair, "lm_head"))
