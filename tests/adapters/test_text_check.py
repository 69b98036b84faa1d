"""Losses and divergences of base, tuned and base + adapter on a sample."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.byte_tokenizer import byte_tokenizer
from support.reference import array
from support.strategies import seeds
from support.tiny_models import SavedPair, rewrite_tensors, save_pair, tiny_model
from transformers import BertConfig, LlamaConfig, T5Config

from peft_svdinit.adapters import export_adapter
from peft_svdinit.adapters.checking import text as text_check
from peft_svdinit.adapters.checking.sample_text import SAMPLE_TEXTS
from peft_svdinit.adapters.checking.text import can_compare, compare_on_text, divergence
from peft_svdinit.factors import CheckpointPair, LowRankFactors


def written(folder: Path, *, rank: int = 16, sign: float = 1.0, **options: Any) -> SavedPair:
    """A pair and in `folder / "adapter"` its delta, truncated to `rank`."""
    pair = save_pair(folder, **options)
    factors = {
        name: LowRankFactors.from_delta(sign * delta, min(delta.shape))
        for name, delta in CheckpointPair(pair.base_folder, pair.tuned_folder).items()
    }
    export_adapter(factors, rank, folder / "adapter")
    return pair


def check(folder: Path, **options: Any) -> Any:
    return compare_on_text(folder / "base", folder / "tuned", folder / "adapter", **options)


@given(seed=seeds, rows=st.integers(1, 4), size=st.integers(1, 9))
def test_the_divergence_is_its_definition(seed, rows, size):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, rows, size, generator=generator).log_softmax(-1)
    exact_p, exact_q = array(p), array(q)
    expected = float(np.sum(np.exp(exact_p) * (exact_p - exact_q)))
    assert divergence(p, q) == pytest.approx(expected, abs=1e-12)
    assert divergence(p, p) == 0


def test_tokens_that_both_models_rule_out_do_not_count():
    p = torch.tensor([[0.0, 1.0, -torch.inf]]).log_softmax(-1)
    q = torch.tensor([[1.0, 1.0, -torch.inf]]).log_softmax(-1)
    assert divergence(p, q) == pytest.approx(divergence(p[:, :2], q[:, :2]))


@pytest.mark.parametrize("damaged", ["p", "q"])
def test_a_divergence_of_nan_is_nan(damaged):
    logs = {name: torch.randn(2, 3).log_softmax(-1) for name in "pq"}
    logs["p"][0, 0] = -torch.inf
    logs[damaged][0, 0] = torch.nan
    assert np.isnan(divergence(logs["p"], logs["q"]))


def test_an_adapter_of_full_rank_is_the_tuned_model(tmp_path):
    pair = written(tmp_path)
    found = check(tmp_path, max_tokens=100, seed=5)
    assert found.sample == "random tokens" and found.tokens == 98  # 64 and 36, less one of each
    assert found.kl_adapted < 1e-6 < 0.01 < found.kl_base
    assert found.loss_adapted == pytest.approx(found.loss_tuned, rel=1e-5)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(64, (2, 64), generator=generator)
    for model, loss in ((pair.base, found.loss_base), (pair.tuned, found.loss_tuned)):
        total = 0.0
        for sample in (ids[:1], ids[1:, :36]):
            with torch.no_grad():
                output: Any = model(input_ids=sample, labels=sample)
            total += output.loss.item() * (sample.shape[1] - 1)
        assert loss == pytest.approx(total / 98, rel=1e-5)


def test_a_truncated_adapter_lies_between_base_and_tuned(tmp_path):
    written(tmp_path, rank=8)
    found = check(tmp_path)
    assert 1e-6 < found.kl_adapted < found.kl_base


def test_the_same_seed_gives_the_same_check_and_no_global_state_moves(tmp_path):
    written(tmp_path, rank=4)
    state = torch.get_rng_state()
    assert check(tmp_path) == check(tmp_path) != check(tmp_path, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("adds_start", [True, False])
def test_texts_are_read_by_the_tokenizer_of_the_base(tmp_path, adds_start):
    pair = written(tmp_path, vocab_size=300)
    tokenizer = byte_tokenizer(adds_start=adds_start)
    tokenizer.save_pretrained(pair.base_folder)
    found = check(tmp_path, texts=["", "abc", "defgh"])
    assert found.sample == "text"
    assert found.tokens == (3 + 5 if adds_start else 2 + 4)
    assert check(tmp_path, max_tokens=50).tokens == 49
    assert check(tmp_path, max_tokens=10_000).tokens == sum(
        min(64, len(tokenizer(text)["input_ids"])) - 1 for text in SAMPLE_TEXTS
    )
    with pytest.raises(ValueError, match="nothing to predict in 1 texts"):
        check(tmp_path, texts=[""])


def test_an_adapter_that_does_harm_is_warned_of(tmp_path, caplog):
    written(tmp_path, sign=-1.0)
    with caplog.at_level(logging.WARNING):
        found = check(tmp_path)
    assert found.kl_adapted > found.kl_base
    assert "no nearer to the tuned one" in caplog.text
    assert all(
        cause in caplog.text
        for cause in ("rank that is too low", "tensors outside the adapter", "configuration other")
    )


def test_models_run_in_the_dtype_that_they_are_stored_in(tmp_path, monkeypatch):
    written(tmp_path, dtype=torch.bfloat16)
    loaded = text_check._loaded
    dtypes = []

    def recorded(*arguments: Any) -> Any:
        model = loaded(*arguments)
        dtypes.append(next(model.parameters()).dtype)
        return model

    monkeypatch.setattr(text_check, "_loaded", recorded)
    found = check(tmp_path)
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert found.kl_adapted < 0.02 * found.kl_base


def test_one_model_is_in_memory_at_a_time(tmp_path, monkeypatch):
    written(tmp_path)
    loaded = text_check._loaded
    models: list[weakref.ref] = []

    def watched(*arguments: Any) -> Any:
        assert all(model() is None for model in models)
        model = loaded(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(text_check, "_loaded", watched)
    check(tmp_path)
    assert len(models) == 2


def test_other_vocabularies_are_refused(tmp_path):
    written(tmp_path)
    tiny_model(vocab_size=70).save_pretrained(str(tmp_path / "tuned"))
    with pytest.raises(ValueError, match="it predicts 70 tokens, the base 64"):
        check(tmp_path)


def test_a_model_whose_loss_is_no_number_is_named(tmp_path):
    written(tmp_path)
    path = tmp_path / "tuned" / "model.safetensors"
    rewrite_tensors(
        path, lambda tensors: tensors.update({"model.norm.weight": torch.full((16,), torch.nan)})
    )
    with pytest.raises(ValueError, match="the loss of tuned on the sample is nan"):
        check(tmp_path)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", ["base", "base + adapter"])
def test_a_divergence_that_is_no_number_is_named(tmp_path, monkeypatch, value, place):
    """A token of the tuned model that another rules out, while none of the sample is."""
    written(tmp_path)
    calls = []

    def broken(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
        calls.append(0)
        return float(value) if (len(calls) % 2 == 1) == (place == "base") else 0.1

    monkeypatch.setattr(text_check, "divergence", broken)
    place = place.replace("+", r"\+")
    with pytest.raises(ValueError, match=f"divergence of {place} from tuned .* is {value}"):
        check(tmp_path)


@pytest.mark.parametrize(
    "files",
    [{"vocab.json": '{"a": 0}'}, {"tokenizer.model": "no model"}, {"tokenizer.json": "{"}],
)
def test_a_tokenizer_that_cannot_be_built_is_warned_of_and_random_tokens_are_used(
    tmp_path, files, caplog
):
    written(tmp_path)
    for name, text in files.items():
        (tmp_path / "base" / name).write_text(text)
    with caplog.at_level(logging.WARNING, logger="peft_svdinit"):
        found = check(tmp_path)
    assert found.sample == "random tokens" and found.kl_adapted < found.kl_base
    assert "cannot be used, the models run on random tokens instead: ValueError" in (
        caplog.text.replace("JSONDecodeError", "ValueError")
    )


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_not_used(tmp_path, caplog):
    written(tmp_path)
    byte_tokenizer(adds_start=False).save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING, logger="peft_svdinit"):
        assert check(tmp_path).sample == "random tokens"
    assert "and the model has 64" in caplog.text


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))


def no_class(folder: Path) -> None:
    LlamaConfig(vocab_size=64).save_pretrained(folder)


def classifier(folder: Path) -> None:
    # BERT has a causal class too, as which the weights would be loaded with a head at random.
    BertConfig(architectures=["BertForSequenceClassification"]).save_pretrained(folder)


def translator(folder: Path) -> None:
    config = T5Config(architectures=["T5ForConditionalGeneration"])
    config.save_pretrained(folder)


@pytest.mark.parametrize("argument", ["base", "tuned"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_config, "has no config.json"),
        (unknown_kind, "transformers cannot read"),
        (no_class, "no class, which is no causal language model"),
        (classifier, "BertForSequenceClassification, which is no causal language model"),
        (translator, "T5ForConditionalGeneration, which is no causal language model"),
    ],
)
def test_models_that_cannot_be_compared_are_known_by_their_configurations(
    tmp_path, argument, change, reason
):
    pair = save_pair(tmp_path)
    for folder in (pair.base_folder, pair.tuned_folder):
        (folder / "model.safetensors").unlink()
    assert can_compare(pair.base_folder, pair.tuned_folder) is None
    change(tmp_path / argument)
    found = can_compare(pair.base_folder, pair.tuned_folder)
    assert found is not None and found.startswith(f"{argument}: ") and reason in found
    with pytest.raises(ValueError, match=reason):
        check(tmp_path)


def test_a_missing_model_is_named(tmp_path):
    written(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tuned: .*nowhere is not a folder"):
        compare_on_text(tmp_path / "base", tmp_path / "nowhere", tmp_path / "adapter")
