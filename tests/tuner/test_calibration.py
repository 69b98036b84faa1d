"""Gradients of a LoRI-D adapter as scores, against backward passes one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.lori_fixtures import lori_model
from support.peft_fixtures import tokens

from peft_svdinit.tuner import dense_factors, gradient_scores, gradients_of, input_sizes


def batches(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": tokens(seed=i), "labels": tokens(seed=i)} for i in range(count)]


def test_gradient_scores_are_the_size_of_the_summed_gradients():
    model = lori_model(lori_density=1.0).train()
    factors = dense_factors(model)
    found = gradient_scores(model, batches(2))
    assert model.training and all(factor.grad is None for factor in factors.values())
    model.eval()
    for batch in batches(2):
        model(**batch).loss.backward()
    assert found.keys() == factors.keys() == input_sizes(model).keys()
    for name, gradient in gradients_of(factors).items():
        assert gradient.any()
        torch.testing.assert_close(found[name], gradient.abs())


def test_a_model_that_gives_no_gradients_is_refused_by_layer():
    with pytest.raises(ValueError, match=r"layer model\..*B is sparse"):
        dense_factors(lori_model())
    model = lori_model(lori_density=1.0)
    with pytest.raises(ValueError, match="no LoRA layer of that name"):
        dense_factors(model, "other")
    with pytest.raises(RuntimeError, match="no batch was added"):
        gradient_scores(model, [])
    with pytest.raises(RuntimeError, match=r"layer model\..* no gradient; is the adapter active"):
        gradients_of(dense_factors(model))
    masked = [{**batches(1)[0], "labels": torch.full_like(batches(1)[0]["labels"], -100)}]
    with pytest.raises(ValueError, match="the loss of a batch is nan"):
        gradient_scores(model, masked)
    # PEFT freezes an adapter while it is disabled.
    with model.disable_adapter(), pytest.raises(RuntimeError, match=r"layer model\..* is frozen"):
        gradient_scores(model, batches(1))
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="lora_B is frozen; load it with is_trainable=True"):
        gradient_scores(model, batches(1))


def test_an_adapter_beside_the_active_one_has_no_gradient():
    model = lori_model(lori_density=1.0)
    model.add_adapter("other", lori_model(lori_density=1.0).peft_config["default"])
    for factor in dense_factors(model, "other").values():
        factor.requires_grad_(True)
    with pytest.raises(RuntimeError, match="no gradient; is the adapter active"):
        gradient_scores(model, batches(1), "other")
