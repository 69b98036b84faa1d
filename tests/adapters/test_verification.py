"""A written adapter is loaded through stock PEFT and held to what was promised."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from support.allocations import LargestResult
from support.peft_fixtures import logits, tokens
from support.reference import array, frobenius
from support.stock_process import LOGITS_OF_ADAPTERS, run_without_us
from support.tiny_models import ARCHITECTURES, SavedPair, rewrite_tensors, save_pair, truncate
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import peft_svdinit
from peft_svdinit.adapters import export_adapter
from peft_svdinit.adapters.checking import layers as layers_check
from peft_svdinit.adapters.checking.layers import Verification, _equal, verify_adapter
from peft_svdinit.adapters.checking.stock_loading import load_stock_adapter, weightless_model
from peft_svdinit.adapters.dtypes import torch_dtype
from peft_svdinit.adapters.export.record import ExportedAdapter
from peft_svdinit.factors import CheckpointPair, LowRankFactors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
V = "model.layers.0.self_attn.v_proj"


@dataclass(frozen=True)
class Written:
    """A pair of checkpoints and the adapter that was extracted from it."""

    pair: SavedPair
    deltas: CheckpointPair
    exported: ExportedAdapter
    modules_to_save: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        return self.exported.output

    def verify(self, **changes: Any) -> Verification:
        arguments: dict[str, Any] = {
            "folder": self.folder,
            "base": self.pair.base_folder,
            "deltas": self.deltas,
            "expected_errors": self.exported.errors,
            "modules_to_save": self.modules_to_save,
        }
        return verify_adapter(**{**arguments, **changes})


def write(
    folder: Path,
    architecture: Any = "llama",
    *,
    ranks: Any = 6,
    whole: tuple[str, ...] = (),
    change: Callable[[str], bool] = lambda name: "proj" in name or "c_" in name,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> Written:
    pair = save_pair(
        folder, architecture, change=lambda name: change(name) or name in whole, **(model or {})
    )
    deltas = CheckpointPair(pair.base_folder, pair.tuned_folder)
    factors = {
        name: LowRankFactors.from_delta(delta, min(delta.shape)) for name, delta in deltas.items()
    }
    if callable(ranks):
        ranks = {name: ranks(index) for index, name in enumerate(factors)}
    parameters = dict(pair.tuned.named_parameters())
    modules_to_save = {name: parameters[name].detach() for name in whole}
    exported = export_adapter(
        factors,
        ranks,
        folder / "adapter",
        base=pair.base_folder,
        modules_to_save=modules_to_save,
        **options,
    )
    return Written(pair, deltas, exported, modules_to_save)


WHOLE = {
    "llama": ("model.embed_tokens.weight", "model.norm.weight"),
    "gpt2": ("transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"),
}
KINDS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "mixed ranks": {"ranks": lambda index: index % 5},
    "uniform": {"ranks": lambda index: 1 + index % 4, "uniform": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16 balanced": {"dtype": "float16", "split": "balanced"},
    "whole tensors": {"whole": None},
    "whole tensors of a tied model": {"whole": None, "model": {"tie_word_embeddings": True}},
}


def written_kind(folder: Path, architecture: str, kind: str) -> Written:
    options = dict(KINDS[kind])
    if "whole" in options:
        options["whole"] = WHOLE[architecture]
    return write(folder, architecture, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_is_the_dense_error_and_as_promised(tmp_path, architecture, kind):
    written = written_kind(tmp_path, architecture, kind)
    found = written.verify()
    stored = load_file(written.folder / WEIGHTS)
    assert found.errors.keys() == found.norms.keys() == set(written.deltas)
    for name, delta in written.deltas.items():
        update = 0.0
        if name not in written.exported.omitted:
            prefix = f"base_model.model.{name}.lora_"
            update = array(stored[f"{prefix}B.weight"]) @ array(stored[f"{prefix}A.weight"])
        norm = frobenius(delta)
        assert found.norms[name] == pytest.approx(norm, rel=1e-6)
        error = frobenius(array(delta) - update)
        assert found.errors[name] == pytest.approx(error, rel=1e-5, abs=1e-6 * norm)
        assert found.errors[name] == pytest.approx(written.exported.errors[name], abs=2e-3 * norm)
    total = math.hypot(*found.errors.values()) / math.hypot(*found.norms.values())
    assert found.relative_error == pytest.approx(total)


def test_the_weights_of_the_base_are_not_read_and_take_no_memory(tmp_path):
    written = write(tmp_path)
    deltas = dict(written.deltas)
    (written.pair.base_folder / "model.safetensors").unlink()
    written.verify(deltas=deltas)
    model = weightless_model(written.pair.base_folder)
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in model.parameters())
    expected = dict(written.pair.base.named_parameters())
    found = dict(model.named_parameters())
    assert {name: p.shape for name, p in found.items()} == {
        name: p.shape for name, p in expected.items()
    }


def test_a_tied_model_without_weights_is_tied(tmp_path):
    pair = save_pair(tmp_path, tie_word_embeddings=True)
    model: Any = weightless_model(pair.base_folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_copies_of_a_model_without_weights_take_no_memory_either(tmp_path):
    """PEFT copies modules to save, whose weights then replace the copies."""
    model = copy.deepcopy(weightless_model(save_pair(tmp_path).base_folder))
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in model.parameters())


def test_only_a_model_without_weights_takes_a_mapped_adapter(tmp_path):
    written = write(tmp_path)
    with pytest.raises(ValueError, match="only a weightless model can have a mapped adapter"):
        load_stock_adapter(written.pair.base, written.folder, mapped=True)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_of_a_mapped_adapter_are_the_bytes_of_its_file(tmp_path, dtype, base_dtype):
    whole = ("model.embed_tokens.weight", "model.norm.weight")
    written = write(tmp_path, whole=whole, dtype=dtype, model={"dtype": base_dtype})
    model = weightless_model(written.pair.base_folder)
    loaded = load_stock_adapter(model, written.folder, mapped=True)
    weights = {
        name: parameter
        for name, parameter in loaded.named_parameters()
        if "lora_" in name or "modules_to_save" in name
    }
    assert len(weights) == 2 * 14 + 2
    assert {p.dtype for name, p in weights.items() if "lora_" in name} == {torch_dtype(dtype)}
    assert all(parameter.abs().sum() > 0 for parameter in weights.values())
    stored = (written.folder / WEIGHTS).read_bytes()
    data = 8 + int.from_bytes(stored[:8], "little")
    with open(written.folder / WEIGHTS, "r+b") as file:  # In place: the mapped file itself.
        file.seek(data)
        file.write(bytes(len(stored) - data))
    assert all(parameter.abs().sum() == 0 for parameter in weights.values())


def test_one_layer_of_a_half_precision_adapter_is_in_float32_at_a_time(tmp_path, monkeypatch):
    written = write(tmp_path, dtype="bfloat16")
    found: list[PeftModel] = []
    get_delta_weight = LoraLinear.get_delta_weight

    def wide() -> int:
        parameters = found[0].named_parameters()
        return sum("lora_" in name and p.dtype == torch.float32 for name, p in parameters)

    def load(*arguments: Any, **options: Any) -> PeftModel:
        found.append(load_stock_adapter(*arguments, **options))
        return found[0]

    def watched(layer: Any, name: str) -> Tensor:
        assert wide() == 2
        return get_delta_weight(layer, name)

    monkeypatch.setattr(layers_check, "load_stock_adapter", load)
    monkeypatch.setattr(LoraLinear, "get_delta_weight", watched)
    written.verify()
    assert wide() == 0


class Casts(LargestResult):
    """Of the results of conversions only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def test_whole_tensors_are_compared_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(layers_check, "BLOCK_ENTRIES", 8)
    stored = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = stored.float()
    with Casts() as casts:
        assert _equal(stored, wide) and _equal(stored[0, 0], wide[0, 0])
    assert casts.entries == 8
    for place in ((0, 0), (6, 2)):
        other = stored.float()
        other[place] += 1e-5
        assert not _equal(stored, other)
    assert not _equal(stored, stored[:6]) and not _equal(stored, stored.mT)


def test_one_delta_is_in_memory_at_a_time(tmp_path):
    written = write(tmp_path)
    alive: list[weakref.ref] = []

    class Deltas(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            assert sum(delta() is not None for delta in alive) <= 1  # that of the layer before
            delta = written.deltas[name]
            alive.append(weakref.ref(delta))
            return delta

        def __contains__(self, name: object) -> bool:
            return name in written.deltas

        def __iter__(self) -> Iterator[str]:
            return iter(written.deltas)

        def __len__(self) -> int:
            return len(written.deltas)

    written.verify(deltas=Deltas())
    assert len(alive) == len(written.deltas)


@pytest.mark.parametrize("registered", [True, False])
def test_the_tuner_is_that_of_stock_peft_and_nothing_global_changes(tmp_path, registered):
    written = write(tmp_path)
    if not registered:
        peft_svdinit.unregister()
    try:
        before = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
        assert (before is LoraModel) != registered
        state = torch.get_rng_state()
        loaded = load_stock_adapter(weightless_model(written.pair.base_folder), written.folder)
        assert type(loaded.base_model) is LoraModel
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is before
        truncate(written.folder / WEIGHTS)
        with pytest.raises(ValueError):
            written.verify()
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is before
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        peft_svdinit.register()


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_weights(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        def without_result(tensors: dict[str, Tensor]) -> None:
            edit(tensors)

        rewrite_tensors(folder / WEIGHTS, without_result)

    return edited


def key(name: str, part: str = "B") -> str:
    return f"base_model.model.{name}.lora_{part}.weight"


def swap(tensors: dict[str, Tensor]) -> None:
    for part in "AB":
        first, second = key(K, part), key(V, part)
        tensors[first], tensors[second] = tensors[second], tensors[first]


def scale(name: str, factor: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[key(name)].mul_(factor)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(folder / WEIGHTS), "truncated while copying"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is not readable JSON"),
        (edit_weights(swap), rf"in 2 places: {K}: error 0\.7\d+, promised.*; {V}: err"),
        (edit_weights(scale(Q, 1.1)), rf"in 1 places: {Q}: error 0\.33\d+, promised 0\.33"),
        (edit_weights(scale(Q, 0.0)), rf"in 1 places: {Q}: error 0\.757, promised 0\.33"),
        (edit_weights(lambda t: t.pop(key(Q))), f"lacks 1 tensors, {key(Q)}"),
        (edit_weights(lambda t: t.update(extra=torch.ones(1))), "beyond it 1 tensors, extra among"),
        (
            edit_weights(lambda t: t.update({key(Q): torch.ones(3, 3)})),
            r"PEFT cannot load (.|\n)*size mismatch for .*q_proj\.lora_B",
        ),
        (lambda folder: edit_config(folder, lora_alpha=7), r"in 14 places: .*; and 9 more"),
        (lambda folder: edit_config(folder, use_rslora=True), "in 14 places"),
        (
            lambda folder: edit_config(folder, target_modules=["k_proj", "v_proj"]),
            "holds beyond it 20 tensors",
        ),
        (
            lambda folder: edit_config(folder, init_lora_weights="svd_guided:/nowhere"),
            "PEFT cannot load .*Unknown initialization",
        ),
    ],
)
def test_a_damaged_adapter_is_refused(tmp_path, damage, message):
    written = write(tmp_path)
    written.verify()
    damage(written.folder)
    with pytest.raises(ValueError, match=message):
        written.verify()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(tmp_path, name):
    written = write(tmp_path)
    (written.folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"(has|is) no .*{name}"):
        written.verify()


def test_a_changed_layer_that_the_adapter_lacks_is_named(tmp_path):
    written = write(tmp_path, ranks=lambda index: 0 if index == 0 else 4)
    written.verify()  # It was promised to be left out.
    promised = {name: error for name, error in written.exported.errors.items() if name != Q}
    with pytest.raises(ValueError, match=rf"{Q}: not adapted, error 0\.757, promised 0, of a"):
        written.verify(expected_errors=promised)


def test_an_adapted_layer_that_nobody_changed_is_named(tmp_path):
    written = write(tmp_path)
    others = {name: delta for name, delta in written.deltas.items() if name != Q}
    errors = {name: error for name, error in written.exported.errors.items() if name != Q}
    with pytest.raises(ValueError, match=rf"in 1 places: {Q}: adapted, and none of"):
        written.verify(deltas=others, expected_errors=errors)


def test_an_unchanged_layer_may_only_be_adapted_by_zero(tmp_path):
    written = write(tmp_path, change=lambda name: "proj" in name and Q not in name, uniform=True)
    assert written.verify().errors[Q] == 0
    edit_weights(lambda t: [t[key(Q, part)].add_(1e-6) for part in "AB"])(written.folder)
    with pytest.raises(ValueError, match=f"in 1 places: {Q}: error"):
        written.verify()


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_a_promise_that_is_not_kept_either_way_is_an_error(tmp_path, factor):
    written = write(tmp_path)
    errors = {name: factor * error for name, error in written.exported.errors.items()}
    with pytest.raises(ValueError, match="in 14 places"):
        written.verify(expected_errors=errors)


def test_a_promise_about_a_layer_that_is_not_compared_is_refused(tmp_path):
    written = write(tmp_path)
    with pytest.raises(ValueError, match=r"expected_errors: model\.other is none"):
        written.verify(expected_errors={"model.other": 0.1})


def test_an_adapter_for_deltas_of_another_shape_names_the_layer(tmp_path):
    written = write(tmp_path)
    deltas = {**written.deltas, Q: torch.ones(3, 2)}
    with pytest.raises(ValueError, match=rf"{Q} has shape \(16, 16\), the delta has \(3, 2\)"):
        written.verify(deltas=deltas)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"model.norm.weight": 1 + w["model.norm.weight"]}, "not the tensor that was to"),
        (lambda w: {}, "model.norm.weight: replaced, and was not to be"),
        (
            lambda w: {**w, "model.layers.1.input_layernorm.weight": torch.ones(16)},
            "model.layers.1.input_layernorm.weight: not replaced",
        ),
    ],
)
def test_whole_tensors_that_differ_are_named(tmp_path, change, message):
    written = write(tmp_path, whole=("model.norm.weight",))
    written.verify()
    with pytest.raises(ValueError, match=f"in 1 places: .*{message}"):
        written.verify(modules_to_save=change(written.modules_to_save))


def test_a_tied_head_that_was_left_behind_is_noticed(tmp_path):
    """What an adapter with the embedding alone would be: the head keeps the base's weights."""
    options: dict[str, Any] = {"tie_word_embeddings": True}
    written = write(tmp_path, whole=("model.embed_tokens.weight",), model=options)
    edit_weights(lambda t: t.pop("base_model.model.lm_head.weight"))(written.folder)
    edit_config(written.folder, ensure_weight_tying=False, modules_to_save=["model.embed_tokens"])
    with pytest.raises(ValueError, match=r"in 1 places: lm_head\.weight: not replaced"):
        written.verify()


def classifiers(folder: Path, change: Callable[[str], bool]) -> tuple[Any, Any]:
    """A tiny BERT with a classification head and its fine-tune, in memory and in `folder`."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    base = BertForSequenceClassification(config).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if change(name):
                parameter += 0.2 * torch.randn(parameter.shape)
    base.save_pretrained(str(folder / "base"))
    tuned.save_pretrained(str(folder / "tuned"))
    return base, tuned


@pytest.mark.parametrize(
    ("head", "task_type"), [("unchanged", None), ("low rank", None), ("whole", "SEQ_CLS")]
)
def test_an_adapter_of_a_classifier_is_verified_and_stock_peft_loads_it(tmp_path, head, task_type):
    base, tuned = classifiers(
        tmp_path,
        lambda name: (
            ("encoder" in name and name.endswith("dense.weight"))
            or (head != "unchanged" and name == "classifier.weight")
        ),
    )
    deltas = CheckpointPair(
        tmp_path / "base",
        tmp_path / "tuned",
        target_modules=["dense", "classifier"] if head == "low rank" else "all-linear",
        exclude_modules=["classifier"] if head == "whole" else (),
    )
    whole = {
        name: parameter.detach()
        for name, parameter in tuned.named_parameters()
        if head == "whole" and name.startswith("classifier.")
    }
    exported = export_adapter(
        {name: LowRankFactors.from_delta(d, min(d.shape)) for name, d in deltas.items()},
        16,
        tmp_path / "adapter",
        base=tmp_path / "base",
        modules_to_save=whole,
    )
    verify_adapter(
        exported.output, tmp_path / "base", deltas, exported.errors, modules_to_save=whole
    )
    loaded = PeftModel.from_pretrained(base, str(exported.output)).eval()
    config: Any = loaded.peft_config["default"]
    assert config.task_type == task_type
    with torch.no_grad():
        found, expected = (model(input_ids=tokens()).logits for model in (loaded, tuned))
    assert (found - expected).abs().max() < 1e-4


def test_a_task_type_of_another_class_is_one_clear_error(tmp_path):
    classifiers(tmp_path, lambda name: "encoder" in name)
    deltas = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    factors = {name: LowRankFactors.from_delta(d, min(d.shape)) for name, d in deltas.items()}
    exported = export_adapter(factors, 4, tmp_path / "adapter", task_type="CAUSAL_LM")
    message = "PEFT cannot load .* into a BertForSequenceClassification: AttributeError: "
    with pytest.raises(ValueError, match=message):
        verify_adapter(exported.output, tmp_path / "base", deltas, exported.errors)


# Conv1D turns weights, and ties by other names; the rest is one code for both architectures.
ELSEWHERE = [
    *(("llama", kind) for kind in KINDS),
    ("gpt2", "mixed ranks"),
    ("gpt2", "whole tensors of a tied model"),
]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per adapter: logits of the dense model here, and of the adapter and it merged elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    save_file({"ids": tokens()}, folder / "ids")
    cases: dict[str, Any] = {"ids": str(folder / "ids")}
    expected = {}
    for architecture, kind in ELSEWHERE:
        name = f"{architecture}, {kind}"
        written = written_kind(folder / name, architecture, kind)
        expected[name] = logits(_dense(written))
        cases[name] = {"base": str(written.pair.base_folder), "adapter": str(written.folder)}
    (folder / "cases.json").write_text(json.dumps(cases))
    run_without_us(folder, LOGITS_OF_ADAPTERS, "cases.json", "logits")
    found = load_file(folder / "logits")
    return {name: (expected[name], found[name], found[f"{name}.merged"]) for name in expected}


def _dense(written: Written) -> Any:
    """The base with B A added to its weights and the whole tensors in place."""
    model = written.pair.base
    stored = load_file(written.folder / WEIGHTS)
    modules = written.deltas.base.modules
    with torch.no_grad():
        for name in written.deltas:
            if key(name) in stored:
                update = stored[key(name)].float() @ stored[key(name, "A")].float()
                update = update.mT if modules[name].transposed else update
                model.get_parameter(f"{name}.weight").add_(update)
        for name, tensor in written.modules_to_save.items():
            model.get_parameter(name).copy_(tensor)
    return model


@pytest.mark.parametrize(("architecture", "kind"), ELSEWHERE)
def test_where_this_package_is_not_installed_the_adapter_does_the_same(
    elsewhere, architecture, kind
):
    expected, found, merged = elsewhere[f"{architecture}, {kind}"]
    assert (found - expected).abs().max() < 1e-4
    assert (merged - expected).abs().max() < 1e-4
