"""Gradients as a source: equal to autograd's, the model left as it was, a step that helps."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model
from support.gradient_batches import batches, mean_gradients
from support.peft_fixtures import adapted_layers, logits, tiny_base
from support.quantised import quantised
from support.reference import array, frobenius, truncated
from support.tiny_models import TARGETS, tiny_model, weight_of
from torch import nn
from torch.testing import assert_close
from transformers import FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

from peft_svdinit import (
    FactorsMetadata,
    LowRankFactors,
    SvdLoraConfig,
    base_samples,
    descent_directions,
    gradient_factors,
    initialize_lora_from_factors,
    line_search,
    save_factors,
    scaled,
    weight_norms,
)
from peft_svdinit.factors.sources import gradient as gradient_source


def assert_gradients(found, expected, rank):
    assert list(found) == list(expected)
    for name, layer in found.items():
        scale = frobenius(expected[name])
        assert layer.norm == pytest.approx(scale, rel=1e-4)
        best = truncated(expected[name], min(rank, *expected[name].shape))
        assert abs(array(layer.dense()) - best).max() < 1e-4 * scale, name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_factors_are_those_of_the_mean_gradient(architecture):
    base, given = tiny_base(architecture), batches(3)
    found = gradient_factors(base, given, rank=16)
    assert_gradients(found, mean_gradients(base, given), 16)


def test_layers_in_groups_give_the_same_bits():
    base, given = tiny_base(), batches(2)
    whole = gradient_factors(base, given, rank=3)
    # 4 kB: two or three layers of 16 x 16 to 24 x 16 at a time.
    parts = gradient_factors(base, iter(given), rank=3, memory_gb=4096 / 2**30)
    assert all(torch.equal(whole[name].dense(), parts[name].dense()) for name in whole)


def test_memory_of_one_layer_means_one_layer_at_a_time(monkeypatch):
    groups = []
    original = gradient_source._summed_gradients
    monkeypatch.setattr(
        gradient_source,
        "_summed_gradients",
        lambda model, group, *rest: groups.append(len(group)) or original(model, group, *rest),
    )
    gradient_factors(tiny_base(), batches(1), rank=2, memory_gb=1e-9)
    assert groups == [1] * 14


def test_the_model_is_left_as_it_was():
    base = tiny_base().train()
    base.get_submodule("model.norm").requires_grad_(False)
    state = copy.deepcopy(base.state_dict())
    flags = [parameter.requires_grad for parameter in base.parameters()]
    modes = [module.training for module in base.modules()]
    gradient_factors(base, batches(1), rank=2)
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    assert [module.training for module in base.modules()] == modes
    assert all(parameter.grad is None for parameter in base.parameters())
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert not [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert base.config.use_cache is True


def test_an_error_in_the_middle_leaves_the_model_as_it_was():
    base = tiny_base().train()
    bad = [*batches(1), {"input_ids": torch.full((1, 4), 10**6), "labels": torch.ones(1, 4).long()}]
    with pytest.raises(IndexError):
        gradient_factors(base, bad, rank=2)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert all(parameter.grad is None for parameter in base.parameters())
    assert base.training and not [m for m in base.modules() if m._forward_hooks]


def test_no_parameter_gets_a_gradient_meanwhile():
    base = tiny_base()
    seen = []
    head = base.get_submodule("model.layers.1.self_attn.q_proj")
    head.register_full_backward_hook(
        lambda *_: seen.append([p.grad is None and not p.requires_grad for p in base.parameters()])
    )
    gradient_factors(base, batches(2), rank=2)
    assert len(seen) == 2 and all(map(all, seen))


def test_dropout_is_off():
    base = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    given = batches(1)
    assert_gradients(gradient_factors(base, given, rank=16), mean_gradients(base, given), 16)


def opt() -> OPTForCausalLM:
    """Its layers, told that they are training, call the function of dropout."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        dropout=0.5,
        attention_dropout=0.5,
    )
    return OPTForCausalLM(config).eval()


def falcon() -> FalconForCausalLM:
    """It adds to what a layer gave in place."""
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, bias=True
    )
    return FalconForCausalLM(config).eval()


@pytest.mark.parametrize("make", [opt, falcon])
def test_models_with_habits_of_their_own_give_the_mean_gradient(make):
    base, given = make(), batches(2)
    expected = mean_gradients(base, given)
    for model in (base, checkpointed(make(), reentrant=False)):
        found = gradient_factors(model, given, rank=16)
        assert found.keys() == expected.keys()
        for name, layer in found.items():
            assert_close(layer.dense(), expected[name].float(), rtol=1e-4, atol=1e-5)


def checkpointed(base, *, reentrant: bool):
    # Its newer name, activation_checkpointing_enable, is not in the oldest supported transformers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    return base


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_and_recomputes(reentrant):
    base, given = tiny_base(), batches(2)
    expected = gradient_factors(base, given, rank=4)
    forwards = []
    block = checkpointed(base, reentrant=reentrant).get_submodule("model.layers.0.mlp")
    block.register_forward_pre_hook(lambda *_: forwards.append(1))
    found = gradient_factors(base, given, rank=4)
    assert len(forwards) == 4
    for name, layer in found.items():
        assert_close(layer.dense(), expected[name].dense(), rtol=0, atol=1e-7)


def test_reentrant_checkpointing_that_hides_the_layers_is_refused_with_the_remedy():
    base = checkpointed(tiny_base(), reentrant=True)
    base.disable_input_require_grads()
    with pytest.raises(RuntimeError, match=r"layers\.\d\..*use_reentrant.*False"):
        gradient_factors(base, batches(1), rank=2)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base_gives_the_gradients_of_what_it_computes(kind):
    pytest.importorskip("bitsandbytes")
    try:
        base = quantised(tiny_base(), kind)
        logits(base)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes has no {kind} on this CPU: {error}")
    plain = tiny_base()
    for name, layer in gradient_source.target_layers(base).items():
        weight_of(plain, name).copy_(layer.weight())
    given = batches(2)
    found, expected = gradient_factors(base, given, rank=16), mean_gradients(plain, given)
    for name, layer in found.items():
        difference = frobenius(array(layer.dense()) - array(expected[name]))
        # An 8-bit layer also rounds its input.
        assert difference < (1e-3 if kind == "4bit" else 0.1) * frobenius(expected[name])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "batches is empty"),
        ([{"input_ids": torch.ones(1, 4).long()}], "number 0 gives no loss"),
        (
            [
                *batches(1),
                {"input_ids": torch.ones(1, 4).long(), "labels": torch.full((1, 4), -100)},
            ],
            "number 1 has a loss of nan",
        ),
    ],
)
def test_batches_without_a_loss_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        gradient_factors(tiny_base(), given, rank=2)


def test_batches_that_are_no_mappings_are_refused():
    with pytest.raises(TypeError, match="mappings of the model's arguments"):
        gradient_factors(tiny_base(), [torch.ones(1, 4)], rank=2)  # pyright: ignore


@pytest.mark.parametrize("memory_gb", [0.0, -1.0, float("nan")])
def test_no_memory_is_refused(memory_gb):
    with pytest.raises(ValueError, match="memory_gb must be positive"):
        gradient_factors(tiny_base(), batches(1), rank=2, memory_gb=memory_gb)


def test_a_model_with_an_adapter_is_refused():
    model = get_peft_model(
        tiny_base(), SvdLoraConfig(r=2, svd_source="weight", svd_start="subspace")
    )
    with pytest.raises(ValueError, match="carries an adapter"):
        gradient_factors(model, batches(1), rank=2)


def test_a_layer_outside_the_loss_is_named():
    base = tiny_base()
    base.add_module("unused", nn.Linear(16, 16))
    with pytest.raises(RuntimeError, match="layer unused got no gradient"):
        gradient_factors(base, batches(1), rank=2, target_modules=["q_proj", "unused"])


@pytest.mark.parametrize("form", ["orthogonalised", "plain"])
def test_directions_lead_down_and_are_as_large_as_the_weights(form):
    base, given = tiny_base(), batches(2)
    gradients = gradient_factors(base, given, rank=4)
    norms = weight_norms(base, gradients)
    directions = descent_directions(gradients, norms, rank=3, form=form)
    dense = mean_gradients(base, given)
    for name, direction in directions.items():
        norm = frobenius(weight_of(base, name))
        assert direction.norm == pytest.approx(norm, rel=1e-5)
        assert frobenius(direction.dense()) == pytest.approx(norm, rel=1e-5)
        kept = torch.linalg.svd(dense[name], full_matrices=False)
        U, S, Vh = kept.U[:, :3], kept.S[:3], kept.Vh[:3]
        expected = -(U @ Vh if form == "orthogonalised" else (U * S) @ Vh)
        expected = expected * (norm / expected.norm())
        assert_close(direction.dense().double(), expected, rtol=0, atol=1e-3 * norm)


def test_a_layer_without_gradient_gets_a_zero_delta_and_missing_directions_no_share():
    zero = LowRankFactors(torch.eye(4, 2), torch.zeros(2), torch.eye(2, 4), 0.0)
    short = LowRankFactors(torch.eye(4, 2), torch.tensor([3.0, 0.0]), torch.eye(2, 4), 3.0)
    found = descent_directions({"a": zero, "b": short}, {"a": 5.0, "b": 7.0}, rank=2)
    assert not found["a"].S.any() and found["a"].norm == 0
    assert found["b"].S.tolist() == [7.0, 0.0]


def test_directions_of_ranks_of_their_own_are_those_of_each_layer_alone():
    gradients = gradient_factors(tiny_base(), batches(1), rank=4, target_modules=["q_proj"])
    norms, ranks = dict.fromkeys(gradients, 5.0), dict(zip(gradients, (1, 3), strict=True))
    found = descent_directions(gradients, norms, rank=ranks)
    for name, rank in ranks.items():
        alone = descent_directions({name: gradients[name]}, norms, rank=rank)[name]
        assert found[name].rank == rank and torch.equal(found[name].dense(), alone.dense())


def test_scaling_scales_delta_and_norm():
    layer = LowRankFactors(torch.eye(4, 2), torch.tensor([3.0, 1.0]), torch.eye(2, 4), 4.0)
    found = scaled({"a": layer}, 0.5)["a"]
    assert torch.equal(found.dense(), layer.dense() / 2) and found.norm == 2.0
    for step in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="step must be positive and finite"):
            scaled({"a": layer}, step)


@pytest.fixture(scope="module")
def searched():
    base = tiny_base()
    gradients = gradient_factors(base, batches(4), rank=4)
    directions = descent_directions(gradients, weight_norms(base, gradients), rank=4)
    return base, directions, line_search(base, directions, batches(4), first_step=2e-3)


def moved(base, directions, step):
    """The mean loss of a copy with the dense deltas added to its weights."""
    model = copy.deepcopy(base)
    for name, layer in directions.items():
        weight_of(model, name).add_(step * layer.dense())
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches(4)) / 4


def test_the_search_evaluates_the_moved_model_and_brackets_a_minimum(searched):
    base, directions, found = searched
    assert found.base_loss == pytest.approx(moved(base, directions, 0.0), abs=1e-5)
    for step, loss in found.tried:
        assert loss == pytest.approx(moved(base, directions, step), abs=1e-4)
    losses = dict(found.tried)
    assert found.loss == losses[found.step] == min(losses.values()) < found.base_loss
    assert found.step / 2 in losses or found.step * 2 in losses
    steps = [step for step, _ in found.tried]
    assert steps == sorted(steps) and all(b == 2 * a for a, b in pairwise(steps))


@pytest.mark.parametrize("first_step", [1e-5, 0.5])
def test_the_search_finds_the_valley_from_either_side(searched, first_step):
    base, directions, near = searched
    found = line_search(base, directions, batches(4), first_step=first_step, max_trials=20)
    assert found.loss < near.loss + 0.05 * (near.base_loss - near.loss)
    assert near.step / 2.1 < found.step < near.step * 2.1


def test_a_direction_uphill_is_refused(searched):
    base, directions, _ = searched
    uphill = {
        name: LowRankFactors(-layer.U, layer.S, layer.Vh, layer.norm)
        for name, layer in directions.items()
    }
    with pytest.raises(RuntimeError, match=r"no step from .* lowers the held-out loss"):
        line_search(base, uphill, batches(4), max_trials=4)


@pytest.mark.parametrize("options", [{"first_step": 0.0}, {"factor": 1.0}, {"max_trials": 1}])
def test_bad_options_of_the_search_are_refused(searched, options):
    base, directions, _ = searched
    with pytest.raises(ValueError, match="first_step must be positive"):
        line_search(base, directions, batches(1), **options)


def test_directions_of_another_model_are_refused(searched):
    base, directions, _ = searched
    other = {"model.layers.9.self_attn.q_proj": next(iter(directions.values()))}
    with pytest.raises(ValueError, match=r"layers.9.*that the model lacks|matches no linear layer"):
        line_search(base, {**directions, **other}, batches(1))


def test_the_step_saved_as_factors_starts_an_adapter_at_the_moved_model(searched, tmp_path):
    base, directions, found = searched
    step = scaled(directions, found.step)
    path = save_factors(
        tmp_path,
        step,
        FactorsMetadata(source={"kind": "gradient"}),
        base_samples=base_samples(base, step),
    )
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(copy.deepcopy(base), SvdLoraConfig(svd_factors=str(path), **options))
    with torch.no_grad():
        loss = sum(float(model(**batch).loss) for batch in batches(4)) / 4
    assert loss == pytest.approx(found.loss, abs=1e-4)
    with pytest.raises(ValueError, match="another base model"):
        get_peft_model(tiny_model(seed=3), SvdLoraConfig(svd_factors=str(path), **options))


def test_a_subspace_start_takes_the_gradients_right_vectors():
    base, given = tiny_base(), batches(2)
    factors = gradient_factors(base, given, rank=3, target_modules=TARGETS["llama"])
    model = get_peft_model(
        copy.deepcopy(base),
        SvdLoraConfig(
            r=3, target_modules=TARGETS["llama"], svd_source="weight", svd_start="subspace"
        ),
    )
    initialize_lora_from_factors(model, factors, start="subspace")
    assert_close(logits(model), logits(base), rtol=0, atol=1e-6)
    for name, layer in adapted_layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight, factors[name].Vh)
