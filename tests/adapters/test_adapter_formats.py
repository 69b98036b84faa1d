"""Reading adapters of the ecosystem as factored deltas, and writing LoRA in their styles."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig
from safetensors.torch import save_file
from support.adapter_files import (
    LAYERS,
    RANK,
    kohya_lora,
    lycoris_peft,
    peft_deltas,
    random_tensors,
)
from support.tiny_models import trained_adapter, truncate
from torch import Tensor

from peft_svdinit.adapters.formats.forms import LayerDelta
from peft_svdinit.adapters.formats.loha import LOHA, DenseDelta
from peft_svdinit.adapters.formats.lokr import LOKR, KroneckerDelta
from peft_svdinit.adapters.formats.opening import open_adapter
from peft_svdinit.factors import LoraProduct

TARGETS = ["q_proj", "down_proj"]


def deltas(path: Path) -> dict[str, LayerDelta]:
    adapter = open_adapter(path)
    return {name: adapter.delta(name) for name in adapter.layers}


def assert_is(delta: LayerDelta, expected: Tensor) -> None:
    """The product and the triplets both give the dense delta, and the norm is its norm."""
    expected = expected.double().flatten(1)
    left, right = delta.product()
    factors = delta.factors()
    assert delta.shape == tuple(expected.shape) == factors.shape
    atol = 2e-6 * float(expected.norm())
    torch.testing.assert_close(left.double() @ right.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(factors.dense().double(), expected, rtol=0, atol=atol)
    assert math.isclose(factors.norm, float(expected.norm()), rel_tol=1e-5)


# Formats


@pytest.mark.parametrize("alpha", [2.0, None])
def test_kohya_layers_and_convolutions_are_their_products(tmp_path, alpha):
    expected = kohya_lora(tmp_path / "x.safetensors", alpha=alpha)
    found = deltas(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert_is(delta, expected[name])


def test_a_fractional_alpha_of_kohya_scales_and_zero_is_refused(tmp_path):
    halves = kohya_lora(tmp_path / "x.safetensors", alpha=0.5)
    wholes = kohya_lora(tmp_path / "y.safetensors", alpha=1.0)
    name = next(iter(LAYERS))
    assert torch.allclose(2 * halves[name], wholes[name])
    assert_is(deltas(tmp_path / "x.safetensors")[name], halves[name])
    kohya_lora(tmp_path / "z.safetensors", alpha=0.0)
    with pytest.raises(ValueError, match=r"alpha in .* must be positive, got 0\.0"):
        open_adapter(tmp_path / "z.safetensors")


DIFFUSERS_ENDS = [
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
]


def diffusers_file(path: Path, ends: tuple[str, str], metadata=None, alpha=None) -> Tensor:
    down, up = (f"unet.mid.attn1.to_q{end}" for end in ends)
    tensors = random_tensors({down: (RANK, 9), up: (12, RANK)})
    if alpha is not None:
        tensors["unet.mid.attn1.to_q.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return tensors[up].double() @ tensors[down].double()


@pytest.mark.parametrize("ends", DIFFUSERS_ENDS)
def test_every_spelling_of_diffusers_is_read_with_a_scaling_of_one(tmp_path, ends):
    product = diffusers_file(tmp_path / "x.safetensors", ends)
    ((name, delta),) = deltas(tmp_path / "x.safetensors").items()
    assert name == "unet.mid.attn1.to_q"
    assert_is(delta, product)


def test_diffusers_scales_by_alpha(tmp_path):
    product = diffusers_file(tmp_path / "x.safetensors", DIFFUSERS_ENDS[0], alpha=1.0)
    (delta,) = deltas(tmp_path / "x.safetensors").values()
    assert_is(delta, product / RANK)


@pytest.mark.parametrize(("rslora", "divisor"), [(False, RANK), (True, RANK**0.5)])
def test_diffusers_scales_by_the_configuration_in_the_header(tmp_path, rslora, divisor):
    config = {
        "unet.r": 99,
        "unet.lora_alpha": 99,
        "unet.rank_pattern": {"mid.attn1.to_q": RANK},
        "unet.alpha_pattern": {"to_q": 6},
        "unet.use_rslora": rslora,
        "text_encoder.r": 1,
    }
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    product = diffusers_file(tmp_path / "x.safetensors", DIFFUSERS_ENDS[0], metadata)
    (delta,) = deltas(tmp_path / "x.safetensors").values()
    assert_is(delta, product * 6 / divisor)


def test_a_header_of_another_rank_or_with_dora_that_is_not_there_is_refused(tmp_path):
    for config, message in (
        ({"unet.r": 8, "unet.lora_alpha": 8}, "has rank 4, but its header says 8"),
        ({"unet.use_dora": True}, "uses DoRA in unet, but stores no magnitudes"),
    ):
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        diffusers_file(tmp_path / "x.safetensors", DIFFUSERS_ENDS[0], metadata)
        with pytest.raises(ValueError, match=message):
            open_adapter(tmp_path / "x.safetensors")
    diffusers_file(tmp_path / "x.safetensors", DIFFUSERS_ENDS[0], {"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="metadata in its header: Expecting"):
        open_adapter(tmp_path / "x.safetensors")


def test_a_peft_lora_is_what_peft_says(tmp_path):
    model = trained_adapter(
        tmp_path, use_rslora=True, rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 5}
    )
    expected = peft_deltas(model)
    found = deltas(tmp_path)
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert_is(delta, expected[name])


# r² below min(out, in) = 16 is factored, above it dense.
@pytest.mark.parametrize(("rank", "form"), [(3, LoraProduct), (5, DenseDelta)])
def test_a_loha_of_peft_is_what_peft_says(tmp_path, rank, form):
    config = LoHaConfig(
        r=rank, alpha=7, target_modules=TARGETS, alpha_pattern={"down_proj": 2}, rank_dropout=0.3
    )
    expected = peft_deltas(lycoris_peft(tmp_path, config).eval())
    found = deltas(tmp_path)
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert isinstance(delta, form)
        assert_is(delta, expected[name])


@pytest.mark.parametrize(
    "options",
    [{"r": 8}, {"r": 1}, {"r": 1, "decompose_both": True}, {"r": 2, "decompose_factor": 2}],
)
def test_a_lokr_of_peft_is_what_peft_says(tmp_path, options):
    config = LoKrConfig(
        alpha=5, target_modules=TARGETS, rank_pattern={"q_proj": options["r"]}, **options
    )
    expected = peft_deltas(lycoris_peft(tmp_path, config).eval())
    found = deltas(tmp_path)
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert isinstance(delta, KroneckerDelta)
        assert_is(delta, expected[name])


def lycoris_file(path: Path, shapes: dict[str, tuple[int, ...]], alpha: float) -> dict[str, Tensor]:
    """One LyCORIS layer; its tensors by part in float64."""
    tensors = random_tensors(shapes)
    keyed = {f"lycoris_mid_to_q.{part}": tensor for part, tensor in tensors.items()}
    save_file({**keyed, "lycoris_mid_to_q.alpha": torch.tensor(alpha)}, path)
    return {part: tensor.double() for part, tensor in tensors.items()}


def test_a_loha_of_lycoris_scales_by_alpha_over_rank(tmp_path):
    shapes = dict(zip(LOHA.parts, [(20, 2), (2, 15), (20, 2), (2, 15)], strict=True))
    w1_a, w1_b, w2_a, w2_b = lycoris_file(tmp_path / "x.safetensors", shapes, 3.0).values()
    (delta,) = deltas(tmp_path / "x.safetensors").values()
    assert_is(delta, (w1_a @ w1_b) * (w2_a @ w2_b) * 3 / 2)


def test_a_lokr_of_lycoris_divides_alpha_by_the_factored_rank(tmp_path):
    shapes = {"lokr_w1": (3, 4), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, 6)}
    w1, w2_a, w2_b = lycoris_file(tmp_path / "x.safetensors", shapes, 3.0).values()
    (delta,) = deltas(tmp_path / "x.safetensors").values()
    assert_is(delta, torch.kron(w1, w2_a @ w2_b) * 3 / 2)


def test_a_lokr_of_lycoris_with_whole_factors_ignores_alpha_and_keeps_its_kernel(tmp_path):
    shapes = {"lokr_w1": (3, 4), "lokr_w2": (5, 6, 3, 3)}
    w1, w2 = lycoris_file(tmp_path / "x.safetensors", shapes, 3.0).values()
    adapter = open_adapter(tmp_path / "x.safetensors")
    assert adapter.layers["lycoris_mid_to_q"].header.kernel == (3, 3)
    (delta,) = deltas(tmp_path / "x.safetensors").values()
    assert_is(delta, torch.kron(w1[:, :, None, None], w2))


# Laws of the factored forms

sides = st.integers(1, 6)


@given(sides, sides, sides, sides, st.integers(0, 99), st.sampled_from([1.5, -0.5]))
def test_a_kronecker_product_has_its_leading_triplets(a, b, c, d, seed, scaling):
    parts = random_tensors({"lokr_w1": (a, b), "lokr_w2": (c, d)}, seed=seed)
    delta = LOKR.delta(parts, scaling)
    dense = scaling * torch.kron(parts["lokr_w1"].double(), parts["lokr_w2"].double())
    assert_is(delta, dense)
    rank = max(1, min(dense.shape) // 2)
    values = torch.linalg.svdvals(dense)
    leading = delta.factors(rank)
    # Fewer than `rank` where both factors together have no more.
    held = min(rank, min(a, b) * min(c, d))
    assert leading.rank == held
    atol = 1e-5 * float(values[0])
    torch.testing.assert_close(leading.S.double(), values[:held], rtol=0, atol=atol)
    lost = float((dense - leading.dense().double()).norm())
    assert abs(lost - float(values[held:].norm())) < 1e-5 * float(dense.norm())
    assert math.isclose(leading.norm, float(dense.norm()), rel_tol=1e-5)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99))
def test_a_hadamard_product_is_the_same_factored_and_dense(out, inputs, rank, seed):
    shapes = dict(zip(LOHA.parts, [(out, rank), (rank, inputs)] * 2, strict=True))
    parts = random_tensors(shapes, seed=seed)
    w1_a, w1_b, w2_a, w2_b = (part.double() for part in parts.values())
    assert_is(LOHA.delta(parts, -0.5), -0.5 * (w1_a @ w1_b) * (w2_a @ w2_b))


# Wrong inputs


def assert_refused(path: Path, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        open_adapter(path)


def test_a_file_without_layers_is_refused_with_its_keys(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({}, file)
    assert_refused(file, "holds no tensor")
    save_file({"model.embed.weight": torch.zeros(2, 2)}, file)
    assert_refused(file, r"no layer in the key styles .* model\.embed\.weight")


def test_a_mixture_of_styles_is_refused(tmp_path):
    shapes = {f"a.{part}.weight": (2, 2) for part in ("lora_down", "lora_up", "lora_A", "lora_B")}
    save_file(random_tensors(shapes), tmp_path / "x.safetensors")
    assert_refused(tmp_path / "x.safetensors", "mixes key styles")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lora_down.weight": (2, 3)}, "layer a .* no complete LoRA: it has lora_down"),
        ({"lora_down.weight": (2, 3), "lora_up.weight": (3, 4)}, "do not form a product"),
        ({"lora_down.weight": (2, 3), "lora_up.weight": (3, 2, 3)}, "do not form a product"),
        ({"lora_down.weight": (0, 3), "lora_up.weight": (3, 0)}, "do not form a product"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4)}, "no complete LoHa: it needs hada_w1_a"),
        (
            dict(zip(LOHA.parts, [(4, 2), (2, 4), (5, 2), (2, 4)], strict=True)),
            "must have one shape",
        ),
        ({"lokr_w1": (4, 2), "lokr_w2_a": (2, 4)}, "it needs lokr_w2, or lokr_w2_a and lokr_w2_b"),
        ({"lokr_w1": (4, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 3)}, "do not form a product"),
    ],
)
def test_incomplete_layers_are_refused_by_name(tmp_path, shapes, message):
    keyed = {f"a.{part}": shape for part, shape in shapes.items()}
    save_file(random_tensors(keyed), tmp_path / "x.safetensors")
    assert_refused(tmp_path / "x.safetensors", message)


def test_not_a_number_is_refused_by_name_when_it_is_read(tmp_path):
    file = tmp_path / "x.safetensors"
    for value in (math.nan, -math.inf):
        tensors = random_tensors({"a.lora_down.weight": (2, 3), "a.lora_up.weight": (3, 2)})
        tensors["a.lora_up.weight"][1, 1] = value
        save_file(tensors, file)
        with pytest.raises(ValueError, match=r"a\.lora_up\.weight in .* NaN or infinite"):
            deltas(file)


def test_quantised_truncated_and_pickled_files_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a.lora_down.weight": torch.zeros(2, 2, dtype=torch.int8)}, file)
    assert_refused(file, "stored as I8", TypeError)
    kohya_lora(file)
    truncate(file)
    assert_refused(file, "not a readable safetensors file")
    for suffix in ("pt", "bin", "ckpt"):
        pickle = tmp_path / f"x.{suffix}"
        pickle.write_bytes(b"")
        assert_refused(pickle, "must be safetensors")
    assert_refused(tmp_path / "none.safetensors", "no file", FileNotFoundError)


def test_a_folder_is_opened_if_it_holds_one_file(tmp_path):
    assert_refused(tmp_path, "neither adapter_config.json nor", FileNotFoundError)
    kohya_lora(tmp_path / "x.safetensors")
    assert set(open_adapter(tmp_path).layers) == set(LAYERS)
    kohya_lora(tmp_path / "y.safetensors")
    assert_refused(tmp_path, r"several files \(x\.safetensors, y\.safetensors\)")


def test_the_weights_of_a_peft_folder_alone_are_refused(tmp_path):
    trained_adapter(tmp_path)
    assert_refused(tmp_path / "adapter_model.safetensors", "give the folder that holds both")


def test_a_configuration_that_is_not_of_the_weights_is_refused(tmp_path):
    lycoris_peft(tmp_path, LoHaConfig(r=3, target_modules=TARGETS))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "r": 2}))
    assert_refused(tmp_path, "has rank 3, but adapter_config.json says 2")
    path.write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert_refused(tmp_path, "type IA3")
