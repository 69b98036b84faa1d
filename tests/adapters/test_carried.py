"""What adapters store beside their factors goes along: into files of one, and into sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapter_files import random_tensors
from torch import Tensor

from peft_svdinit.adapters import resize
from peft_svdinit.adapters.formats.opening import open_adapter
from peft_svdinit.factors import RankRule

Tensors = dict[str, Tensor]
ALL = RankRule(rank=4)
# Ends of the two factors, by who writes them.
SPELLINGS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "old diffusers": (".lora.down.weight", ".lora.up.weight"),
    "DiffSynth": (".lora_A.default.weight", ".lora_B.default.weight"),
    "DiffSynth by another name": (".lora_A.style.weight", ".lora_B.style.weight"),
}
by_spelling = pytest.mark.parametrize("ends", SPELLINGS.values(), ids=list(SPELLINGS))
KOHYA = SPELLINGS["kohya"]
LAYERS = ("blocks.0.q", "blocks.1.q")


def lora(ends: tuple[str, str] = KOHYA, *, seed: int = 0, alpha: Any = 2.0) -> Tensors:
    """Two layers of rank 4 that map 6 inputs to 5 outputs."""
    shapes = {}
    for layer in LAYERS:
        shapes |= {f"{layer}{ends[0]}": (4, 6), f"{layer}{ends[1]}": (5, 4)}
    tensors = random_tensors(shapes, seed=seed)
    if alpha is None:
        return tensors
    return tensors | {f"{layer}.alpha": torch.as_tensor(alpha).clone() for layer in LAYERS}


def deltas(tensors: Tensors, ends: tuple[str, str] = KOHYA) -> Tensors:
    """Dense deltas by their definition."""
    found = {}
    for layer in LAYERS:
        down, up = (tensors[f"{layer}{end}"].double() for end in ends)
        alpha = tensors.get(f"{layer}.alpha", torch.tensor(float(len(down))))
        found[layer] = up @ down * alpha.double().reshape(()) / len(down)
    return found


def resized(tmp_path: Path, files: list[Tensors], rule: RankRule = ALL, **options: Any) -> Tensors:
    paths = [tmp_path / f"{index}.safetensors" for index in range(len(files))]
    for path, tensors in zip(paths, files, strict=True):
        save_file(tensors, path)
    output = tmp_path / "out.safetensors"
    resize(paths, output, rule, **options)
    return load_file(output)


def same_bits(one: Tensor, other: Tensor) -> bool:
    raw = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


def assert_deltas(found: Tensors, expected: Tensors, ends: tuple[str, str] = KOHYA) -> None:
    for layer, delta in deltas(found, ends).items():
        torch.testing.assert_close(delta, expected[layer], rtol=0, atol=1e-5)


# By who reads them: names, and what they are.
BESIDE: dict[str, Tensors] = {
    "Wan's differences": {
        "blocks.0.q.diff_b": torch.randn(5),
        "blocks.0.norm_q.diff": torch.ones(6),
    },
    "norms of LyCORIS": {
        "blocks.0.norm.w_norm": torch.ones(6),
        "blocks.0.norm.b_norm": torch.ones(6),
    },
    "a whole layer of LyCORIS": {"conv.diff": torch.ones(3, 2), "conv.alpha": torch.tensor(2)},
    "embeddings in a bundle": {"bundle_emb.word.clip_l": torch.ones(2, 8, dtype=torch.bfloat16)},
    "Flux control": {
        "norm.scale.set_weight": torch.ones(4),
        "blocks.0.q.reshape_weight": torch.tensor([5, 6]),
    },
    "DoRA of kohya": {f"{layer}.dora_scale": torch.ones(5, 1) for layer in LAYERS},
    "DoRA of diffusers": {f"{layer}.lora_magnitude_vector": torch.ones(5) for layer in LAYERS},
    "a base's bias": {"blocks.0.q.bias": torch.ones(5)},
    "not a number": {"table": torch.tensor([1.0, float("nan")])},
    "bytes": {"table": torch.arange(4, dtype=torch.uint8)},
}
by_beside = pytest.mark.parametrize("beside", BESIDE.values(), ids=list(BESIDE))


@by_beside
@by_spelling
@pytest.mark.parametrize("rank", [4, 2])
def test_one_file_keeps_the_bits_of_what_has_no_rank(tmp_path, ends, beside, rank):
    source = lora(ends)
    found = resized(tmp_path, [source | beside], RankRule(rank=rank))
    for name, tensor in beside.items():
        assert same_bits(found[name], tensor), name
    kept = {name for name in found if name not in beside and not name.endswith(".alpha")}
    assert kept == {f"{layer}{end}" for layer in LAYERS for end in ends}
    if rank == 4:
        assert_deltas(found, deltas(source, ends), ends)


@by_beside
def test_only_differences_have_a_weight(tmp_path, beside):
    source = lora()
    differs = all(name.endswith(("diff", "diff_b", "w_norm", "b_norm")) for name in beside)
    if not differs:
        with pytest.raises(ValueError, match=r"0.safetensors has weight 2, but .* use weight 1"):
            resized(tmp_path, [source | beside], weights=[2.0])
        return
    found = resized(tmp_path, [source | beside], weights=[-0.5])
    for name, tensor in beside.items():
        assert same_bits(found[name], -0.5 * tensor)
    assert_deltas(found, {name: -0.5 * delta for name, delta in deltas(source).items()})


@given(
    weights=st.lists(st.sampled_from([1.0, -0.5, 2.0]), min_size=2, max_size=3),
    having=st.lists(st.booleans(), min_size=3, max_size=3),
    end=st.sampled_from([".diff_b", ".b_norm"]),
)
def test_differences_of_several_are_summed_where_they_are(tmp_path_factory, weights, having, end):
    files, expected = [], torch.zeros(5, dtype=torch.float64)
    for index, weight in enumerate(weights):
        tensors = lora(seed=index)
        if having[index]:
            tensors[f"blocks.0.q{end}"] = random_tensors({"x": (5,)}, seed=9 + index)["x"]
            expected += weight * tensors[f"blocks.0.q{end}"].double()
        files.append(tensors)
    found = resized(tmp_path_factory.mktemp("sum"), files, RankRule(rank=5), weights=weights)
    assert (f"blocks.0.q{end}" in found) == any(having[: len(weights)])
    if f"blocks.0.q{end}" in found:
        torch.testing.assert_close(found[f"blocks.0.q{end}"].double(), expected, rtol=0, atol=1e-6)
    summed = [
        {layer: w * delta for layer, delta in deltas(f).items()}
        for w, f in zip(weights, files, strict=True)
    ]
    for layer, delta in deltas(found).items():
        total = torch.stack([one[layer] for one in summed]).sum(dim=0)
        torch.testing.assert_close(delta, total, rtol=0, atol=1e-5)


def change(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "kind", ["embeddings in a bundle", "Flux control", "a base's bias", "bytes"]
)
def test_a_tensor_that_takes_a_place_is_carried_if_all_have_the_same(tmp_path, kind):
    beside = BESIDE[kind]
    found = resized(tmp_path, [lora() | beside, lora(seed=1) | beside])
    assert all(same_bits(found[name], tensor) for name, tensor in beside.items())
    name = "|".join(beside)
    for other, where in (
        (change(beside), "another one in each of"),
        ({}, "in .*0.safetensors only"),
    ):
        message = rf"({name}) is {where}.* into every adapter, or delete it from all"
        with pytest.raises(ValueError, match=message):
            resized(tmp_path, [lora() | beside, lora(seed=1) | other])


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"blocks.0.q.dora_scale": torch.ones(5, 1)}, "is a magnitude of DoRA"),
        ({"blocks.0.q.lora_mid.weight": torch.ones(4, 4)}, "is no product of two factors"),
        ({"other.oft_blocks": torch.ones(2, 2, 2)}, "is no product of two factors"),
        ({"blocks.0.q.scalar": torch.ones(())}, "is no product of two factors"),
    ],
)
def test_what_has_no_sum_is_refused_by_name_also_if_all_have_it(tmp_path, beside, message):
    with pytest.raises(
        ValueError, match=f"{next(iter(beside))} in .*{message}.* resize each alone"
    ):
        resized(tmp_path, [lora() | beside, lora() | beside])


def test_a_layer_is_not_a_difference_of_one_and_factors_of_another(tmp_path):
    other = {"blocks.0.q.diff": torch.ones(5, 6)}
    one = {name: tensor for name, tensor in lora().items() if name.startswith("blocks.1")}
    with pytest.raises(ValueError, match=r"blocks\.0\.q as a difference, another one has its fact"):
        resized(tmp_path, [lora(), one | other])


def test_differences_of_other_shapes_are_refused(tmp_path):
    files = [lora() | {"blocks.0.q.diff_b": torch.ones(size)} for size in (5, 1)]
    with pytest.raises(ValueError, match=r"blocks\.0\.q\.diff_b is of another shape in each"):
        resized(tmp_path, files)


def test_a_sum_that_overflows_is_refused_by_name(tmp_path):
    beside = {"blocks.0.q.diff_b": torch.full((5,), 6e4, dtype=torch.float16)}
    with pytest.raises(ValueError, match=r"diff_b has an entry .* beyond what torch.float16"):
        resized(tmp_path, [lora() | beside, lora() | beside])


# The layer whose tensors these are stays; blocks.1.q is resized.
OTHERS: dict[str, Tensors] = {
    "Tucker": {"blocks.0.q.lora_mid.weight": torch.ones(4, 4)},
    "OFT": {"other.oft_blocks": torch.ones(2, 2, 2), "other.alpha": torch.tensor(0.0)},
    "IA3": {"other.on_input": torch.tensor(True), "other.weight": torch.ones(3)},
    "GLoRA": {f"other.{part}.weight": torch.ones(2, 2) for part in ("a1", "a2", "b1", "b2")},
    "a part without a meaning": {"blocks.0.q.scalar": torch.ones(())},
    "a factor without a meaning": {"blocks.0.q.lora_C.weight": torch.ones(4, 4)},
}


@pytest.mark.parametrize("others", OTHERS.values(), ids=list(OTHERS))
def test_a_layer_that_is_no_product_is_left_as_it_is_and_named(tmp_path, others):
    source = lora() | others
    layer = "other" if "other" in next(iter(others)) else "blocks.0.q"
    save_file(source, tmp_path / "a.safetensors", {"ss_network_module": "lycoris.kohya"})
    output = tmp_path / "b.safetensors"
    report = resize([tmp_path / "a.safetensors"], output, RankRule(rank=2))
    found = load_file(output)
    for name, tensor in source.items():
        if name.startswith(f"{layer}."):
            assert same_bits(found[name], tensor), name
    assert found["blocks.1.q.lora_down.weight"].shape == (2, 6)
    said = f"Left as they are, at their rank, for they are no product of two factors: {layer}."
    assert said in report.summary()
    assert report.as_dict()["layers_kept"] == [layer]
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert metadata["ss_network_dim"] == "Dynamic"


def test_a_file_without_a_product_is_refused(tmp_path):
    tensors = lora() | {f"{layer}.lora_mid.weight": torch.ones(4, 4) for layer in LAYERS}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has no layer whose update is a product of two factors"):
        open_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("count", [1, 2])
def test_tensors_of_unknown_meaning_are_named_in_a_warning(tmp_path, caplog, count):
    resized(tmp_path, [lora() | {"table": torch.ones(2)} for _ in range(count)])
    assert "1 tensors are carried over as they are, for their meaning is not known: table" in (
        caplog.text
    )
    caplog.clear()
    resized(tmp_path, [lora() | BESIDE["Wan's differences"]])
    assert not caplog.text


def test_the_report_counts_what_was_carried(tmp_path):
    beside = BESIDE["Wan's differences"] | BESIDE["DoRA of kohya"]
    save_file(lora() | beside, tmp_path / "a.safetensors")
    report = resize([tmp_path / "a.safetensors"], tmp_path / "b.safetensors", ALL)
    assert "Tensors carried over beside the factors: " in report.summary()
    assert "2 magnitude" in report.summary() and "2 difference" in report.summary()
    assert "the errors are those of B A before them" in report.summary()
    assert {n for names in report.as_dict()["carried"].values() for n in names} == set(beside)


# Scalings


DTYPES = [torch.int64, torch.int32, torch.uint8, torch.float16, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_alpha_is_one_number_of_any_dtype(tmp_path, dtype, shape):
    source = lora(alpha=torch.full(shape, 3, dtype=dtype))
    assert_deltas(resized(tmp_path, [source]), deltas(source))


def test_integer_factors_are_refused_as_quantised(tmp_path):
    source = lora(alpha=torch.tensor(2))
    source["blocks.0.q.lora_up.weight"] = torch.ones(5, 4, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"blocks\.0\.q\.lora_up\.weight .* as I8, .* dequantise"):
        resized(tmp_path, [source])


@pytest.mark.parametrize("spelling", ["diffusers", "DiffSynth"])
def test_a_bias_of_the_up_factor_is_scaled_as_the_product_is(tmp_path, spelling):
    ends = SPELLINGS[spelling]
    name = "blocks.0.q" + ends[1].removesuffix("weight") + "bias"
    files = [lora(ends, seed=seed, alpha=6.0) for seed in (0, 1)]
    bias = random_tensors({"x": (5,)})["x"]
    files[0][name] = bias
    torch.testing.assert_close(resized(tmp_path, files[:1])[name], 6 / 4 * bias)
    found = resized(tmp_path, files, weights=[2.0, 1.0])
    torch.testing.assert_close(found[name], 2 * 6 / 4 * bias)
    # Readers give a bias to all layers, or to none.
    assert not found[name.replace("blocks.0", "blocks.1")].any()


def test_two_names_of_an_adapter_in_one_file_are_refused(tmp_path):
    ends = [SPELLINGS[name] for name in ("DiffSynth", "DiffSynth by another name")]
    with pytest.raises(ValueError, match="mixes key styles"):
        resized(tmp_path, [lora(ends[0]) | lora(ends[1])])
