"""Activations as a source: exact covariances, shared by the layers that share an input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from peft import get_peft_model
from support.gradient_batches import batches, layer_inputs
from support.peft_fixtures import adapted_layers, logits, tiny_base
from support.reference import array, frobenius, principal_cosines
from support.strategies import seeds
from support.tiny_models import weight_of
from torch import nn
from torch.testing import assert_close

from peft_svdinit import FactorsMetadata, SvdLoraConfig, activation_factors, save_factors
from peft_svdinit.factors.sources import shared_inputs
from peft_svdinit.factors.sources.covariance import InputCovariance


def config(**options) -> SvdLoraConfig:
    defaults = {"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return SvdLoraConfig(**{**defaults, **options})


def centred_directions(rows: torch.Tensor, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Right singular vectors of the centred rows, and the singular values over √rows."""
    values = array(rows)
    _, S, Vh = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    return Vh[:rank], S[:rank] / len(values) ** 0.5


@drawn(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    width=st.integers(1, 6),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    seed=seeds,
    centred=st.booleans(),
)
def test_a_covariance_of_parts_is_that_of_the_whole(sizes, width, offset, seed, centred):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, width, generator=generator) + offset for size in sizes]
    covariance = InputCovariance(centred=centred)
    for part in parts:
        covariance.add(part)
    rows = array(torch.cat(parts))
    deviations = rows - rows.mean(axis=0) if centred else rows
    expected = deviations.T @ deviations / len(rows)
    # About the mean the offset itself costs nothing, its rounding in float32 rows apart.
    scale = (1e-5 if centred else 1e-6) * (np.abs(expected).max() + (1.0 if centred else 0.0))
    assert abs(array(covariance.take()) - expected).max() <= max(scale, 1e-9)


def test_a_covariance_of_nothing_is_refused():
    with pytest.raises(RuntimeError, match="no rows"):
        InputCovariance(centred=True).take()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_directions_are_the_right_singular_vectors_of_the_centred_inputs(architecture, padded):
    base, given = tiny_base(architecture), batches(3, padded=padded)
    found = activation_factors(base, given, rank=3)
    inputs = layer_inputs(base, given)
    assert set(found) == set(inputs)
    for name, layer in found.items():
        directions, S = centred_directions(inputs[name], 3)
        assert not layer.U.any() and layer.U.shape[0] == layer.shape[0]
        assert abs(array(layer.S) - S).max() < 1e-4 * S[0]
        cosines = np.abs((directions * array(layer.Vh)).sum(axis=1))
        assert cosines.min() > 1 - 1e-4, name
        centred = array(inputs[name]) - array(inputs[name]).mean(axis=0)
        assert layer.norm == pytest.approx(frobenius(centred) / len(centred) ** 0.5, rel=1e-4)


def test_positions_with_a_label_can_count_alone():
    base, given = tiny_base(), batches(2, padded=True)
    found = activation_factors(base, given, rank=2, positions="labelled")
    inputs = layer_inputs(base, given, mask_key="labels")
    for name, layer in found.items():
        directions, _ = centred_directions(inputs[name], 2)
        assert principal_cosines(layer.Vh.mT, torch.from_numpy(directions.T)).min() > 1 - 1e-4


def counted_covariances(monkeypatch) -> list[InputCovariance]:
    made: list[InputCovariance] = []

    class Counted(InputCovariance):
        def __init__(self, *, centred: bool) -> None:
            super().__init__(centred=centred)
            made.append(self)

    monkeypatch.setattr(shared_inputs, "InputCovariance", Counted)
    return made


def forwards_of(model: nn.Module) -> list[int]:
    seen: list[int] = []
    model.get_submodule("model.embed_tokens").register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def test_layers_that_share_an_input_share_a_covariance(monkeypatch):
    made = counted_covariances(monkeypatch)
    base = tiny_base()
    forwards = forwards_of(base)
    found = activation_factors(base, batches(3), rank=3)
    # q, k and v; o; gate and up; down; in two blocks. One pass over the batches.
    assert len(made) == 8 and len(forwards) == 3
    block = "model.layers.0.self_attn"
    assert torch.equal(found[f"{block}.q_proj"].Vh, found[f"{block}.k_proj"].Vh)
    assert not torch.equal(found[f"{block}.q_proj"].Vh, found[f"{block}.o_proj"].Vh)


@pytest.mark.parametrize(("memory_gb", "passes"), [(4 * 3 * 16**2 / 2**30, None), (1e-9, 8)])
def test_less_memory_means_more_passes_and_the_same_bits(memory_gb, passes, monkeypatch):
    base = tiny_base()
    whole = activation_factors(base, batches(2), rank=3)
    made = counted_covariances(monkeypatch)
    forwards = forwards_of(base)
    parts = activation_factors(base, iter(batches(2)), rank=3, memory_gb=memory_gb)
    assert len(made) == 8
    assert len(forwards) == 2 * passes if passes else 2 < len(forwards) < 16
    assert list(parts) == list(whole)
    for name, layer in parts.items():
        assert torch.equal(layer.Vh, whole[name].Vh) and torch.equal(layer.S, whole[name].S)


class Doubled(nn.Module):
    """Two layers that share an input in one of two calls."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x) + self.second(x)
        z = self.second(y.tanh())
        z += self.third(z)
        return self.third(z)


def test_layers_that_share_an_input_now_and_then_do_not_share_a_covariance():
    model = Doubled()
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))
    found = activation_factors(model, [{"x": x}, {"x": 2 * x}], rank=2)
    rows: dict[str, list[torch.Tensor]] = {}

    def keep(name: str):
        return lambda module, args: rows.setdefault(name, []).append(args[0].clone().reshape(-1, 4))

    for name in ("first", "second", "third"):
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(x)
        model(2 * x)
    for name, layer in found.items():
        directions, _ = centred_directions(torch.cat(rows[name]), 2)
        assert principal_cosines(layer.Vh.mT, torch.from_numpy(directions.T)).min() > 1 - 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("part", ["principal", "minor"])
def test_the_weighted_part_is_corda_by_its_definition(architecture, part):
    base, given = tiny_base(architecture), batches(3)
    found = activation_factors(base, given, rank=3, weighting="weight", part=part)
    for name, rows in layer_inputs(base, given).items():
        weight = array(weight_of(base, name))
        weight = weight.T if architecture == "gpt2" else weight
        moments = array(rows).T @ array(rows) / len(rows)
        moments += 0.01 * np.diag(moments).mean() * np.eye(len(moments))
        U, S, Vh = np.linalg.svd(weight @ moments, full_matrices=False)
        chosen = slice(0, 3) if part == "principal" else slice(len(S) - 3, len(S))
        expected = (U[:, chosen] * S[chosen]) @ Vh[chosen] @ np.linalg.inv(moments)
        layer = found[name]
        assert abs(array(layer.dense()) - expected).max() < 2e-3 * frobenius(weight), name
        assert layer.norm == pytest.approx(frobenius(weight), rel=1e-5)
        assert abs(array(layer.U).T @ array(layer.U) - np.eye(3)).max() < 1e-4


def test_the_model_is_left_as_it_was():
    base = tiny_base().train()
    state = copy.deepcopy(base.state_dict())
    activation_factors(base, batches(1), rank=2, weighting="weight")
    assert base.training and all(p.requires_grad and p.grad is None for p in base.parameters())
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert not [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_directions_start_at_the_base_and_are_refused_as_a_delta(tmp_path):
    base = tiny_base()
    factors = activation_factors(base, batches(2), rank=3)
    path = str(save_factors(tmp_path, factors, FactorsMetadata(source={"kind": "activation"})))
    for start in ("delta", "reference"):
        with pytest.raises(ValueError, match=r'directions of inputs.*svd_start="subspace"'):
            get_peft_model(copy.deepcopy(base), config(svd_factors=path, svd_start=start))
    started = config(svd_factors=path, svd_start="subspace")
    model = get_peft_model(copy.deepcopy(base), started)
    assert_close(logits(model), logits(base), rtol=0, atol=1e-6)
    for name, layer in adapted_layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight, factors[name].Vh)


def test_the_weighted_part_starts_as_a_reference(tmp_path):
    base = tiny_base()
    factors = activation_factors(base, batches(2), rank=3, weighting="weight")
    path = str(save_factors(tmp_path, factors, FactorsMetadata(source={"kind": "activation"})))
    model = get_peft_model(
        copy.deepcopy(base), config(svd_factors=path, svd_start="reference", svd_split="balanced")
    )
    assert_close(logits(model), logits(base), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "both"}, "weighting must be one of none, weight, got 'both'"),
        ({"part": "middle"}, "part must be one of principal, minor, got 'middle'"),
        ({"positions": "odd"}, "positions must be one of attended, labelled, got 'odd'"),
        ({"part": "minor"}, 'needs weighting="weight"'),
        ({"memory_gb": 0}, "memory_gb must be positive"),
        ({"target_modules": ["nothing"]}, "matches no linear layer"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        activation_factors(tiny_base(), batches(1), **{"rank": 2, **options})


def test_labelled_positions_need_labels():
    batch = {"input_ids": torch.ones(1, 4).long()}
    with pytest.raises(ValueError, match="must hold labels"):
        activation_factors(tiny_base(), [batch], rank=2, positions="labelled")


def test_padding_that_cannot_be_told_apart_is_refused_by_layer():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.layer(x.mean(dim=1))

    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match="layer layer is given 2 rows for a batch of 6 positions"):
        activation_factors(Pooled(), [{"x": torch.ones(2, 3, 4), "attention_mask": mask}], rank=2)


def test_a_layer_that_no_batch_reaches_is_named():
    base = tiny_base()
    base.add_module("unused", nn.Linear(16, 16))
    with pytest.raises(RuntimeError, match="layer unused was given no input"):
        activation_factors(base, batches(1), rank=2, target_modules=["q_proj", "unused"])
