"""Cells of the grid against PEFT's own implementations of the methods they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from support.gradient_batches import batches
from support.peft_fixtures import adapted_layers, tiny_base
from support.reference import principal_cosines
from support.tiny_models import TARGETS, weight_of
from torch import Tensor
from torch.testing import assert_close

from peft_svdinit import (
    SvdLoraConfig,
    activation_factors,
    gradient_factors,
    initialize_lora_from_factors,
    lora_ga_factors,
)

RANK, ALPHA = 4, 8


def options(**others: Any) -> dict[str, Any]:
    return {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": TARGETS["llama"],
        "task_type": "CAUSAL_LM",
        **others,
    }


def from_factors(base: Any, factors: Any, start: Any, split: Any) -> Any:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options()))
    initialize_lora_from_factors(model, factors, start=start, split=split)
    return model


def weights(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in adapted_layers(model).items()
    }


def signs_aligned(found: Tensor, expected: Tensor, dim: int) -> Tensor:
    """`found` with its vectors flipped to point as those of `expected`."""
    return found * torch.sign((found * expected).sum(dim=dim, keepdim=True))


def assert_same_factors(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    for name in found:
        (A, B), (their_A, their_B) = found[name], expected[name]
        assert_close(
            signs_aligned(A, their_A, 1), their_A, rtol=0, atol=tolerance * float(their_A.norm())
        )
        assert_close(
            signs_aligned(B, their_B, 0), their_B, rtol=0, atol=tolerance * float(their_B.norm())
        )


def assert_base_moved_by_theirs_alone(ours: Any, theirs: Any, base: Any) -> None:
    for name, layer in adapted_layers(ours).items():
        weight = base.get_submodule(name).weight
        assert torch.equal(layer.get_base_layer().weight, weight)
        assert not torch.equal(adapted_layers(theirs)[name].get_base_layer().weight, weight)


def test_the_principal_part_is_pissa():
    base = tiny_base()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**options(init_lora_weights="pissa")))
    ours = get_peft_model(
        copy.deepcopy(base),
        SvdLoraConfig(
            **options(), svd_source="weight", svd_start="reference", svd_split="balanced"
        ),
    )
    assert_same_factors(ours, theirs)
    assert_base_moved_by_theirs_alone(ours, theirs, base)


def test_the_minor_part_is_milora():
    """By its definition (arXiv:2406.09044): the last triplets, their roots in A and B."""
    base = tiny_base()
    ours = get_peft_model(
        copy.deepcopy(base),
        SvdLoraConfig(
            **options(),
            svd_source="weight",
            svd_part="minor",
            svd_start="reference",
            svd_split="balanced",
        ),
    )
    for name, (A, B) in weights(ours).items():
        weight = weight_of(base, name).double()
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        root = (S[-RANK:] / (ALPHA / RANK)).sqrt()
        their_A, their_B = root[:, None] * Vh[-RANK:], U[:, -RANK:] * root
        assert_close(signs_aligned(A.double(), their_A, 1), their_A, rtol=0, atol=1e-4)
        assert_close(signs_aligned(B.double(), their_B, 0), their_B, rtol=0, atol=1e-4)


def peft_lora_ga(base: Any, given: list[dict[str, Tensor]]) -> Any:
    model: Any = copy.deepcopy(base)
    config = LoraConfig(
        **options(
            init_lora_weights="lora_ga",
            lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
        )
    )

    def train_step() -> None:
        for batch in given:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


def test_the_gradient_as_a_reference_is_lora_ga():
    base, given = tiny_base(), batches(3)
    theirs = peft_lora_ga(base, given)
    gradients = gradient_factors(base, given, rank=2 * RANK, target_modules=TARGETS["llama"])
    factors = lora_ga_factors(gradients, rank=RANK, scaling=ALPHA / RANK, form="peft")
    ours = from_factors(base, factors, "reference", "output")
    assert_same_factors(ours, theirs, tolerance=2e-3)
    assert_base_moved_by_theirs_alone(ours, theirs, base)


def test_the_papers_lora_ga_has_both_factors_at_the_stable_scale():
    base, given = tiny_base(), batches(3)
    gradients = gradient_factors(base, given, rank=2 * RANK, target_modules=TARGETS["llama"])
    factors = lora_ga_factors(gradients, rank=RANK, scaling=ALPHA / RANK, gamma=64)
    for name, (A, B) in weights(from_factors(base, factors, "reference", "balanced")).items():
        stable = B.shape[0] ** 0.25 / 8
        assert_close(A, stable * gradients[name].Vh[:RANK])
        assert_close(B, stable * gradients[name].U[:, RANK:])


def test_lora_ga_of_ranks_of_their_own_is_that_of_each_layer_alone():
    gradients = gradient_factors(tiny_base(), batches(1), rank=6, target_modules=["q_proj"])
    ranks = dict(zip(gradients, (1, 3), strict=True))
    found = lora_ga_factors(gradients, rank=ranks, scaling=2.0, form="peft")
    for name, rank in ranks.items():
        alone = lora_ga_factors({name: gradients[name]}, rank=rank, scaling=2.0, form="peft")[name]
        assert found[name].rank == rank and torch.equal(found[name].dense(), alone.dense())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"form": "none"}, "form must be one of paper, peft, got 'none'"),
        ({"gamma": 0.0}, "must be positive"),
        ({"scaling": 0.0}, "must be positive"),
        ({"rank": 5}, "needs 10 triplets of the gradient, and 8 are held"),
    ],
)
def test_lora_ga_refuses_what_it_cannot_make(changed, message):
    gradients = gradient_factors(tiny_base(), batches(1), rank=8, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=message):
        lora_ga_factors(gradients, **{"rank": 4, "scaling": 2.0, **changed})


@pytest.mark.parametrize(("method", "part"), [("ipm", "principal"), ("kpm", "minor")])
def test_the_weighted_activations_are_corda(method, part):
    """On one example: of several, PEFT scales each by its own largest entry first."""
    base = tiny_base()
    ids = torch.arange(2, 50).reshape(1, -1)
    model: Any = copy.deepcopy(base)
    config = LoraConfig(
        **options(init_lora_weights="corda", corda_config=CordaConfig(corda_method=method))
    )
    preprocess_corda(model, config, run_model=lambda: model(input_ids=ids))
    theirs = weights(get_peft_model(model, config))
    factors = activation_factors(
        base,
        [{"input_ids": ids}],
        rank=RANK,
        weighting="weight",
        part=part,
        target_modules=TARGETS["llama"],
    )
    ours = weights(from_factors(base, factors, "reference", "balanced"))
    for name, (A, B) in theirs.items():
        product = B @ A
        assert_close(
            ours[name][1] @ ours[name][0], product, rtol=0, atol=2e-3 * float(product.norm())
        )


@pytest.mark.parametrize(("count", "agreeing"), [(1, RANK), (4, RANK // 2)])
def test_the_activations_directions_are_evas(count, agreeing):
    """PEFT's are of an incremental PCA that keeps `rank` components from batch to batch."""
    base, given = tiny_base(), batches(count, padded=True)
    peft_model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(**options(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, tau=0.9999))),
    )
    initialize_lora_eva_weights(peft_model, given, show_progress_bar=False)
    theirs = weights(peft_model)
    factors = activation_factors(
        base, given, rank=RANK, positions="labelled", target_modules=TARGETS["llama"]
    )
    ours = weights(from_factors(base, factors, "subspace", "output"))
    for name, (A, _) in theirs.items():
        cosines = principal_cosines(ours[name][0].mT, torch.linalg.qr(A.mT).Q)
        assert cosines[:agreeing].min() > 0.998 and cosines.min() > 0.8, name
        assert not ours[name][1].any()
