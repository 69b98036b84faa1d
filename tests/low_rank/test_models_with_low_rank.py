"""Real architectures with low-rank layers compute what dense twins of the products compute."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.low_rank_cases import dense_twin, random_layer, switch
from support.peft_fixtures import logits, tiny_base, tokens
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AlbertConfig,
    AlbertModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft_svdinit.low_rank import LowRankLinear, LowRankPlan, densify_, low_rank_layers
from peft_svdinit.low_rank.product_on_demand import ProductOnDemand

_BODY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


class Attending(nn.Module):
    """torch's own layer, whose attention reads weights rather than to call its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def t5() -> Any:
    options: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
    options |= {"decoder_start_token_id": 0}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes, **options))


def whisper() -> Any:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_source_positions=10, max_target_positions=16, init_std=0.2,
            pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout=0.0,
        )
    )  # fmt: skip


def mamba() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    sizes |= {"time_step_rank": 8}
    return MambaForCausalLM(MambaConfig(vocab_size=64, initializer_range=0.2, **sizes))


def vit() -> Any:
    return ViTModel(
        ViTConfig(**_BODY, image_size=8, patch_size=4, hidden_dropout_prob=0.0)  # pyright: ignore
    )


def albert() -> Any:
    return AlbertModel(
        AlbertConfig(vocab_size=64, embedding_size=8, max_position_embeddings=16, **_BODY)
    )


def random_input(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (lambda: tiny_base("llama"), {"input_ids": tokens()}),
    "gpt2": (lambda: tiny_base("gpt2"), {"input_ids": tokens()}),
    "t5": (t5, {"input_ids": tokens(), "decoder_input_ids": tokens(length=5)}),
    "whisper": (
        whisper,
        {"input_features": random_input(2, 8, 20), "decoder_input_ids": tokens(length=5)},
    ),
    "vit": (vit, {"pixel_values": random_input(2, 3, 8, 8)}),
    "mamba": (mamba, {"input_ids": tokens()}),
    "albert": (albert, {"input_ids": tokens()}),
    "torch's own": (Attending, {"x": random_input(2, 5, 16)}),
}


def outputs(model: Any, inputs: dict[str, Any]) -> Tensor:
    found = model(**inputs)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_dense_twin(name):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    before = copy.deepcopy(model)
    switched = switch(model)
    twin = dense_twin(before, switched)
    names = {each.name for each in switched}
    assert names == set(low_rank_layers(model)) == set(LowRankPlan.of(model).layers)
    for mode in (True, False):
        found, expected = (outputs(each.train(mode), inputs) for each in (model, twin))
        assert_close(found, expected)
        with torch.no_grad():
            assert_close(outputs(model, inputs), expected)
    assert (expected - outputs(before.eval(), inputs)).abs().max() > 1e-6
    found.square().sum().backward()
    expected.square().sum().backward()
    for parameter_name, parameter in twin.named_parameters():
        module = parameter_name.rpartition(".")[0]
        if module not in names or parameter_name.endswith("bias"):
            ours = model.get_parameter(parameter_name).grad
            assert (ours is None) == (parameter.grad is None)
            assert ours is None or torch.allclose(ours, parameter.grad), parameter_name
    for each in switched:
        gradient = twin.get_submodule(each.name).weight.grad
        if gradient is None:  # A layer whose outputs the result does not depend on.
            assert each.layer.U.grad is None
            continue
        gradient = gradient.mT if each.layer.transposed else gradient
        assert_close(each.layer.U.grad, gradient @ each.layer.Vh.mT, msg=each.name)
        assert_close(each.layer.Vh.grad, each.layer.U.mT @ gradient, msg=each.name)


def test_albert_has_each_of_its_shared_layers_once():
    model = albert()
    switched = switch(model)
    distinct = {id(module) for module in model.modules() if isinstance(module, LowRankLinear)}
    assert len(distinct) == len(switched)
    assert sum("attention.query" in each.name for each in switched) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "torch's own"])
def test_densified_it_is_the_dense_twin(name):
    build, inputs = MODELS[name]
    model = build().double()
    before = copy.deepcopy(model)
    switched = switch(model)
    twin = dense_twin(before, switched)
    assert [moved.name for moved in densify_(model)] == [each.name for each in switched]
    assert model.state_dict().keys() == before.state_dict().keys()
    assert_close(outputs(model, inputs), outputs(twin, inputs))
    assert not low_rank_layers(model) and densify_(model) == []
    kinds = [type(module) for module in before.modules()]
    plain = [nn.Linear if issubclass(kind, nn.Linear) else kind for kind in kinds]
    assert [type(module) for module in model.modules()] in (kinds, plain)


def test_t5_keeps_a_projection_out_in_float32_by_reading_its_weights_dtype():
    model = t5().eval()
    switch(model)
    model.bfloat16()
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()
    _, inputs = MODELS["t5"]
    assert torch.isfinite(outputs(model, inputs)).all()


def test_copies_and_pickles_compute_the_same_and_save_themselves(tmp_path):
    model = tiny_base()
    switch(model)
    expected = logits(model)
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert torch.equal(logits(other), expected)
        with torch.no_grad():
            low_rank_layers(other)["model.layers.0.mlp.up_proj"].U.zero_()
        assert torch.equal(logits(model), expected)
        other.save_pretrained(tmp_path / str(number))
        loaded = type(model).from_pretrained(tmp_path / str(number))
        assert torch.count_nonzero(loaded.model.layers[0].mlp.up_proj.weight) == 0


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model: Any = tiny_base()
    switch(model, train_norms=True)
    loss, gradients = loss_and_gradients(model.train())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found, again = loss_and_gradients(model)
    assert model.is_activation_checkpointing and torch.equal(found, loss)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


class Reading(nn.Module):
    """Reads a weight's dtype as T5 does, and one weight itself."""

    def __init__(self, wi: LowRankLinear, wo: LowRankLinear) -> None:
        super().__init__()
        self.wi, self.wo = wi, wo

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.wi(x)).to(self.wo.weight.dtype)
        return self.wo(hidden) + self.wi.weight.sum()


def without_type_checks(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods as users have them: a compiler cannot read the suite's type checker."""
    for name, member in list(vars(kind).items()):
        if isinstance(member, property):
            monkeypatch.setattr(kind, name, property(inspect.unwrap(member.fget)))  # pyright: ignore
        elif isinstance(member, staticmethod):
            monkeypatch.setattr(kind, name, staticmethod(inspect.unwrap(member.__func__)))
        elif inspect.isfunction(member):
            monkeypatch.setattr(kind, name, inspect.unwrap(member))


@pytest.mark.parametrize("norms", [False, True])
def test_compiled_it_computes_the_same_in_one_graph(norms, monkeypatch):
    without_type_checks(LowRankLinear, monkeypatch)
    without_type_checks(ProductOnDemand, monkeypatch)
    layers = (random_layer(6, 4, 2, norms=norms), random_layer(3, 6, 2, transposed=True))
    model: Any = Reading(*layers)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    results = []
    for each in (model, compiled):
        model.zero_grad()
        found = each(x)
        found.square().sum().backward()
        results.append((found.detach(), [p.grad.clone() for p in model.parameters()]))
    assert_close(results[1], results[0])
