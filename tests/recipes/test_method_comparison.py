"""PEFT's method comparison: its experiments, batches and labels, a whole run, and misuse."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import method_comparison
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from stages import method_plan, method_training
from stages.answers import Questions
from stages.method_data import bucketed, collated
from stages.method_options import EXPERIMENTS
from stages.method_protocol import Protocol
from support.recipe_inputs import save_model
from support.tiny_models import tiny_model, trained_adapter

from peft_svdinit import FactorsMetadata, LoriConfig, LowRankFactors, SvdLoraConfig, save_factors
from peft_svdinit.masks import LayerScores, Selection, load_mask, save_mask
from peft_svdinit.models import linear_modules

NAMES = sorted(
    str(path.parent.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.glob("*/*/a*.json")
)
REFERENCE = "lora/llama-3.2-3B-rank32"
TOTAL, DELTA = f"{REFERENCE}-total-budget", f"{REFERENCE}-svd-delta"
LORI = "lori/llama-3.2-3B-rank32-calibrated"
# Fields of TrainConfig in method_comparison/MetaMathQA/utils.py of PEFT.
PEFT_PARAMS = {
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps",
    "eval_steps", "compile", "use_gc", "query_template", "seed", "grad_norm_clip",
    "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp", "autocast_adapter_dtype",
    "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
}  # fmt: skip


@pytest.fixture
def starts(tmp_path, monkeypatch) -> Any:
    """A base with what the experiments start from, where they name it."""
    base = tiny_model(hidden_size=64, intermediate_size=64, num_key_value_heads=2)
    layers = linear_modules(base, ["q_proj", "v_proj"])
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: LowRankFactors.from_delta(torch.randn(64, 64, generator=generator), 32)
        for name in layers
    }
    monkeypatch.chdir(tmp_path)
    for kind in ("teacher", "gradient", "activation"):
        save_factors(Path("starts", kind), factors, FactorsMetadata())
    shapes = {name: (64, 32) for name in layers}
    scores = LayerScores.random(shapes, dict.fromkeys(layers, 64), 5)
    save_mask(Path("starts/lori_mask"), scores.mask(Selection(0.1, "global", 0.0)))
    return base


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_what_pefts_own_runner_takes(name, starts):
    config: Any = PeftConfig.from_pretrained(str(EXPERIMENTS / name))
    assert type(config) is LoraConfig
    assert (config.r, config.lora_alpha, config.target_modules) == (32, 64, None)
    params = json.loads((EXPERIMENTS / name / "training_params.json").read_text())
    assert params.keys() <= PEFT_PARAMS
    assert params["optimizer_kwargs"].keys() == {"lr", "weight_decay"}
    adapted: Any = get_peft_model(starts, config).peft_config["default"]
    *_, part, start = name.split("-")
    if name == REFERENCE:
        assert adapted is config
    elif name.startswith("lori/"):
        assert isinstance(adapted, LoriConfig)
        assert adapted.lori_seed == (5 if start == "calibrated" else 0)
    else:
        expected = "reference" if start == "weight" else start
        assert isinstance(adapted, SvdLoraConfig) and adapted.svd_start == expected
        assert adapted.svd_source == ("weight" if start == "weight" else "teacher")
        assert start == "weight" or adapted.svd_factors.endswith(part.replace("svd", "teacher"))


def test_the_protocol_has_pefts_parameters_and_no_others():
    assert vars(Protocol()).keys() == PEFT_PARAMS


def test_batches_hold_like_lengths_within_buckets():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (130,), generator=generator).tolist()
    rows = [[number] * length for number, length in enumerate(lengths)]
    expected: list[list[list[int]]] = []
    for start in (0, 60, 120):  # 20 batches of 3
        left = rows[start : start + 60]
        while left:
            batch = []
            while left and len(batch) < 3:
                batch.append(max(left, key=len))
                left.remove(batch[-1])
            expected.append(batch)
    assert list(bucketed(rows, 3)) == expected


def test_the_first_end_is_learnt_and_the_padding_after_it_is_not():
    batch = collated([[5, 6, 7, 8], [5, 1], [7, 7, 7]], 1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 1, 1, 1], [7, 7, 7, 1]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 2, 3]
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [5, 1, 1, -100], [7, 7, 7, 1]]


def test_only_a_number_that_is_announced_is_an_answer(monkeypatch):
    said = ["12", "It is 12. The answer is: 13", "So 13.\n#### 12", "The final answer is 12."]
    monkeypatch.setattr(method_training, "greedy_answers", lambda *args, **kwargs: said)
    questions = Questions([[1]] * 4, ["#### 12"] * 4)
    data: Any = SimpleNamespace(tokenizer=None)
    right = method_training.answered_rightly(torch.nn.Linear(1, 1), questions, data, Protocol())
    assert right == [False, False, True, True]


def save_pairs(path: Path, count: int) -> Path:
    rows = [
        {"query": f"{n} + {n}?", "response": f" {'so ' * (n % 7)}The answer is {2 * n}"}
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Any:
    """Options of a tiny comparison, and a function that makes further experiments for it."""
    folder = tmp_path_factory.mktemp("methods")
    params = {
        "model_id": str(save_model(folder / "model")),
        **{"dtype": "float32", "max_steps": 2, "eval_steps": 1, "batch_size": 2},
        **{"query_template": "{query}", "generation_kwargs": {"max_new_tokens": 4}},
    }
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"General text {n}."}) for n in range(6)))
    root = folder / "experiments"
    shutil.copytree(EXPERIMENTS, root)
    for path in root.glob("*/*/adapter_config.json"):
        path.write_text(path.read_text().replace('"r": 32', '"r": 4'))
    return [
        *("--training_params", json.dumps(params), "--experiments_dir", str(root)),
        *("--dataset_name", str(save_pairs(folder / "train.jsonl", 40)), "--valid_size", "2"),
        *("--test_dataset_name", str(save_pairs(folder / "test.jsonl", 8))),
        *("--test_query_column", "query", "--test_response_column", "response"),
        *("--general_dataset_name", str(text), "--teacher_steps", "2", "--rate_factor", "100"),
    ]


@pytest.fixture(scope="module")
def resumed(options, tmp_path_factory) -> Iterator[tuple[Path, str, list[str]]]:
    """A comparison that was killed in its third run, and then made to its end."""
    out = tmp_path_factory.mktemp("compared")
    argv = [*options, "--experiments", REFERENCE, DELTA, LORI, "--seeds", "0", "1"]
    argv += ["--output_dir", str(out)]
    begun: list[str] = []
    run = method_plan.MethodRun

    class Killed(run):
        def __call__(self, folder: Path) -> None:
            begun.append(folder.name)
            if len(begun) == 3:
                raise KeyboardInterrupt
            super().__call__(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method_plan, "MethodRun", Killed)
        with pytest.raises(KeyboardInterrupt):
            method_comparison.main(argv)
        first = (out / "runs" / begun[0] / "result.json").read_text()
        method_comparison.main(argv)
    assert begun[2:] == [begun[2], *begun[3:]] and len(set(begun)) == len(begun) - 1 == 8
    yield out, first, begun


def results(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "results").iterdir()}


def result(out: Path, name: str, seed: int = 0) -> dict:
    return results(out)[f"{name.replace('/', '--')}--seed{seed}"]


def test_what_was_done_before_a_kill_is_not_done_again(resumed):
    out, first, _ = resumed
    assert json.dumps(result(out, REFERENCE)) == json.dumps(json.loads(first))
    rows = json.loads((out / "method_comparison.json").read_text())["rows"]
    assert [row["experiment"] for row in rows] == [REFERENCE, TOTAL, DELTA, LORI]
    assert (out / "method_comparison.md").read_text().count(f"| {REFERENCE}") == 3


def test_results_have_what_pefts_tables_read(resumed):
    for found in results(resumed[0]).values():
        run, train, meta = (found[f"{part}_info"] for part in ("run", "train", "meta"))
        assert found.keys() == {"run_info", "train_info", "meta_info", "svdinit"}
        assert run.keys() == {
            "created_at", "total_time", "experiment_name", "peft_branch", "train_config",
            "peft_config", "error_msg",
        }  # fmt: skip
        assert train.keys() == {
            "accelerator_memory_reserved_avg", "accelerator_memory_max",
            "accelerator_memory_reserved_99th", "train_time", "file_size",
            "num_trainable_params", "num_total_params", "status", "metrics",
        }  # fmt: skip
        assert meta.keys() == {
            "model_info", "dataset_info", "package_info", "system_info", "pytorch_info"
        }  # fmt: skip
        assert run["train_config"].keys() == PEFT_PARAMS
        assert run["peft_config"]["peft_type"] == "LORA" and train["status"] == "success"
        assert train["metrics"][-1].keys() == {
            "step", "test accuracy", "train loss", "train samples", "train total tokens",
            "forgetting",
        }  # fmt: skip
        assert train["metrics"][0].keys() == {
            "step", "valid accuracy", "train loss", "train samples", "train time", "eval time",
            "tokens / sec", "mem allocated avg", "mem reserved avg", "elapsed time",
        }  # fmt: skip
        for package in ("transformers", "peft", "datasets", "bitsandbytes", "torch"):
            assert f"{package}-version" in meta["package_info"]


def test_the_budget_counts_what_starts_took_before(resumed):
    out, _, _ = resumed
    tokens = {
        name: result(out, name)["train_info"]["metrics"][-1]["train total tokens"]
        for name in (REFERENCE, TOTAL, DELTA, LORI)
    }
    assert tokens[REFERENCE] == tokens[DELTA] == tokens[LORI]
    for name in (DELTA, LORI):
        cost = result(out, name)["svdinit"]["start"]
        assert cost["steps"] == 2 and not cost["sunk"]
        # The teacher learns from other examples than the runs, and the total budget from both.
        assert tokens[name] + cost["tokens"] == tokens[TOTAL]
    assert result(out, REFERENCE)["svdinit"]["start"] is None
    assert result(out, LORI)["svdinit"]["start"]["learning_rate"] == pytest.approx(0.005)


def test_step_0_is_the_base_unless_the_start_is_a_delta(resumed):
    out, _, _ = resumed
    for name in (REFERENCE, LORI):
        ours = result(out, name)["svdinit"]
        assert ours["begins_at_base"] and ours["step_0"] == ours["base"]
    losses = [result(out, DELTA, seed)["svdinit"]["step_0"]["test loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    assert max(losses) < result(out, DELTA)["svdinit"]["base"]["test loss"]


def test_each_seed_has_its_own_A(resumed):
    masks = [load_mask(path) for path in (resumed[0] / "runs").glob("lori_mask-*")]
    assert {mask.seed for mask in masks} == {0, 1}


def test_data_and_random_masks_make_starts_too(options, tmp_path):
    names = ["lora/llama-3.2-3B-rank32-gradient-delta", "lori/llama-3.2-3B-rank32-random"]
    names += ["lora/llama-3.2-3B-rank32-activation-subspace", f"{REFERENCE}-svd-weight"]
    argv = [*options, "--experiments", REFERENCE, *names, "--seeds", "3", "--start_batches", "1"]
    method_comparison.main([*argv, "--output_dir", str(tmp_path)])
    gradient, random, activation, weight = (result(tmp_path, name, 3)["svdinit"] for name in names)
    assert gradient["start"]["tokens"] > activation["start"]["tokens"] > 0
    assert gradient["step_0"]["test loss"] < gradient["base"]["test loss"]
    assert random["start"]["tokens"] == 0 and random["begins_at_base"] and not weight["start"]
    assert not (tmp_path / "results" / f"{TOTAL.replace('/', '--')}--seed3.json").exists()
    (mask,) = (tmp_path / "runs").glob("random_mask-*")
    assert load_mask(mask).seed == 3


def refused(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as error:
        method_comparison.main(argv)
    said = str(error.value) if error.value.code != 2 else capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    return said


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--experiments", "lora/rank32"], "lora/rank32 has no adapter_config.json; known ones"),
        (["--experiments", DELTA, "--teacher", "nowhere"], "--teacher.*nowhere"),
        (["--experiments", REFERENCE, "--teacher", "{narrow}"], "of no use to"),
        (["--experiments", DELTA, "--teacher", "{narrow}"], "has rank 2 .* below r=4"),
        (["--training_params", '{"max_step": 3}'], "'max_step'; did you mean max_steps"),
        (["--training_params", '{"compile": true}'], "compile is not supported"),
        (["--experiments", "{typo}"], "training_params.json: unknown .* 'learning_rate'"),
        (["--experiments", "{pissa}"], "starts as pissa, which moves the base"),
        (["--experiments", "{other}"], "--experiments: 'lost/factors' is "),
        (["--teacher_steps", "99"], "has 40 examples"),
        (["--test_dataset_name", "lost.jsonl"], "--test_dataset_name: .* 'lost.jsonl'"),
        (["--dataset_name", "builtin:arithmetic"], "--test_dataset_name must be null"),
        (["--query_column", "asked"], "--query_column.*query, response, got asked"),
    ],
)
def test_bad_inputs_are_refused_in_one_line(given, says, options, tmp_path, capsys):
    root = Path(options[options.index("--experiments_dir") + 1])
    made: dict[str, tuple[Any, dict]] = {
        "typo": (True, {"learning_rate": 1}),
        "pissa": ("pissa", {}),
        "other": ("svd_guided:lost/factors", {}),
    }
    for name, (init, params) in made.items():
        config = json.loads((root / REFERENCE / "adapter_config.json").read_text())
        (tmp_path / "lora" / name).mkdir(parents=True)
        written = {
            "adapter_config": {**config, "init_lora_weights": init},
            "training_params": params,
        }
        for file, content in written.items():
            (tmp_path / "lora" / name / f"{file}.json").write_text(json.dumps(content))
    if "{narrow}" in given:
        trained_adapter(tmp_path / "narrow", r=2, target_modules=["q_proj", "v_proj"])
    if re.fullmatch(r"\{(typo|pissa|other)\}", given[1]):
        options = [*options, "--experiments_dir", str(tmp_path)]
    given = [re.sub(r"\{(typo|pissa|other)\}", r"lora/\1", each) for each in given]
    given = [each.replace("{narrow}", str(tmp_path / "narrow")) for each in given]
    argv = [*options, "--output_dir", str(tmp_path / "out"), "--seeds", "0", *given]
    assert re.search(says, refused(argv, capsys))
