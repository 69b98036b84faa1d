"""Adapters side by side: figures against obvious references, the base untouched, wrong inputs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate_adapter
import pytest
import torch
import train_lora
from datasets import Dataset
from metrics.forgetting.forgetting import increase
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from stages.answers import Questions, greedy_answers
from stages.attached import attached, find_adapters
from stages.evaluation_options import AdaptedModelOptions, HarnessOptions
from stages.harness import check_harness
from stages.token_losses import agreement, example_losses
from support.byte_tokenizer import byte_tokenizer
from support.hub import stand_in_hub
from support.recipe_inputs import save_dataset, save_model
from support.tiny_models import ARCHITECTURES, tiny_model
from transformers import AutoModelForCausalLM

from peft_svdinit import SvdLoraConfig
from peft_svdinit.training import builtin_of_folder, parse_options

TOKENIZER = byte_tokenizer()
TARGETS = ["q_proj", "v_proj"]


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def examples(prompts: list[str], completions: list[str]) -> Any:
    ids = [TOKENIZER(text)["input_ids"] for text in prompts]
    ends = [[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] for text in completions]
    return Dataset.from_list(
        [
            {"input_ids": one + other, "labels": [-100] * len(one) + other}
            for one, other in zip(ids, ends, strict=True)
        ]
    )


PROMPTS, COMPLETIONS = ["a", "Once upon ", "12 + "], ["bc", "a time in a far", "3 = 15"]
MIXED = examples(PROMPTS, COMPLETIONS)
TEXTS = Dataset.from_dict({"prompt": PROMPTS, "completion": COMPLETIONS})


def save_adapter(folder: Path, name: str, config: Any = None, seed: int = 0) -> Path:
    """An adapter of the model in `folder`, whose tensors are not those of its start."""
    config = config or LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    model = get_peft_model(model_of(folder), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder / name))
    return folder / name


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_model(folder / "stranger", seed=5)
    save_dataset(folder / "data.jsonl")
    (folder / "general.txt").write_text("One line.\nAnother one, longer.\nA third\nThe end.\n" * 4)
    save_adapter(folder, "first")
    save_adapter(folder, "second", seed=1)
    return folder


def losses_by_transformers(model: Any) -> list[float]:
    """Of each example alone, not averaged."""
    found = []
    for row in MIXED:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        found.append(model(ids, labels=labels).loss.item() * int((labels != -100).sum()))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_losses_are_those_of_transformers_in_batches_of_any_size(architecture):
    model = tiny_model(architecture, vocab_size=len(TOKENIZER))
    for size in (1, 2, 3):
        found = example_losses(model, MIXED, size)
        assert found.tokens == [sum(label != -100 for label in row["labels"]) for row in MIXED]
        assert found.nll == pytest.approx(losses_by_transformers(model), rel=1e-5)


def test_agreement_is_the_mean_divergence_of_the_predictions():
    teacher, model = (tiny_model(seed=seed, vocab_size=len(TOKENIZER)) for seed in (0, 1))
    found = agreement(teacher, model, MIXED, 2)
    for number, row in enumerate(MIXED):
        p, q = (
            torch.softmax(one(torch.tensor([row["input_ids"]])).logits[0, :-1].double(), -1)
            for one in (teacher, model)
        )
        learnt = torch.tensor(row["labels"])[1:] != -100
        kl = (p * (p / q).log()).sum(-1)[learnt].sum().item()
        assert found.kl[number] == pytest.approx(kl, rel=1e-4)
        assert found.agreeing[number] == (p.argmax(-1) == q.argmax(-1))[learnt].sum()
    itself = agreement(model, model, MIXED, 2)
    assert itself.agreeing == itself.tokens == found.tokens and max(itself.kl) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_in_a_batch_are_those_given_one_by_one(architecture):
    model = tiny_model(architecture, vocab_size=len(TOKENIZER))
    asked = Questions.of(TEXTS, TOKENIZER)
    assert asked.references == ["bc", "a time in a far", "3 = 15"]
    # Settings that checkpoints come with, which change what is said.
    model.generation_config.update(no_repeat_ngram_size=1, suppress_tokens=[ord("e")])
    own = model.generation_config
    options = {"tokenizer": TOKENIZER, "max_new_tokens": 6}
    together = greedy_answers(model, asked, batch_size=3, **options)
    alone = []
    for prompt in asked.prompts:
        ids = torch.tensor([prompt])
        for _ in range(6):
            token = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None, None]], dim=1)
            if token == TOKENIZER.eos_token_id:
                break
        text = TOKENIZER.decode(ids[0, len(prompt) :], skip_special_tokens=True)
        alone.append(text)
    assert together == alone and model.generation_config is own
    cut = greedy_answers(model, asked, batch_size=3, stop=[alone[0][2:4], alone[0][1:3]], **options)
    assert cut[0] == alone[0][:1]


KINDS = {
    "lora": LoraConfig(r=2, target_modules=TARGETS),
    "dora": LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "pissa": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"),
    "whole": LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "prompt": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    "svd": SvdLoraConfig(
        r=2, target_modules=TARGETS, svd_source="weight", svd_start="reference",
        svd_split="balanced",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_does_what_peft_makes_of_it_and_leaves_the_base_as_it_was(
    kind, inputs, tmp_path
):
    folder = save_adapter(inputs, kind, KINDS[kind])
    (adapter,) = find_adapters([str(folder)])
    base = model_of(inputs)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    asked = example_losses(base, MIXED, 2)
    with attached(base, adapter) as model:
        found = example_losses(model, MIXED, 2)
        questions = Questions.of(TEXTS, TOKENIZER)
        told = [
            greedy_answers(model, questions, TOKENIZER, batch_size=size, max_new_tokens=6)
            for size in (1, 3)
        ]
    assert told[0] == told[1]
    expected = losses_by_transformers(PeftModel.from_pretrained(model_of(inputs), folder).eval())
    assert found.nll == pytest.approx(expected, rel=1e-5)
    assert found.nll != pytest.approx(asked.nll, rel=1e-3)
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert example_losses(base, MIXED, 2) == asked


def options(inputs: Path, *more: str) -> list[str]:
    return [
        *("--dataset_name", str(inputs / "data.jsonl"), "--device", "cpu"),
        *("--exact_match_dataset", str(inputs / "data.jsonl"), "--max_new_tokens", "4"),
        *("--forgetting_dataset", str(inputs / "general.txt"), "--eval_fraction", "0.5"),
        *("--max_eval_samples", "6", "--exact_match_samples", "4", *more),
    ]


def test_the_recipe_writes_one_table_of_the_base_and_every_adapter(inputs, tmp_path, capsys):
    adapters = [f"{inputs}/first", f"other={inputs}/second"]
    teacher = ["--teacher", f"{inputs}/first", "--output_dir", str(tmp_path)]
    evaluate_adapter.main(["--adapters", *adapters, *options(inputs, *teacher)])
    table = (tmp_path / "evaluation.md").read_text()
    assert table in capsys.readouterr().out
    record = json.loads((tmp_path / "evaluation.json").read_text())
    base, first, other = record["results"]
    assert [row["name"] for row in record["results"]] == ["base", "first", "other"]
    model = model_of(inputs)
    for row in (base, first, other):
        losses = row["loss"]["per_example"]
        assert row["loss"]["loss"] == pytest.approx(sum(losses["nll"]) / sum(losses["tokens"]))
        assert row["exact_match"]["examples"] == len(row["exact_match"]["per_example"]["right"])
    for title, reference in (("against_base", base), ("against_first", first)):
        sums = [row["loss"]["per_example"]["nll"] for row in (reference, other)]
        figure, interval = increase(sums[0], sums[1], base["loss"]["per_example"]["tokens"])
        assert other["loss"][title] == {
            "difference": pytest.approx(figure),
            "difference_interval": pytest.approx(list(interval or ())),
        }
    assert "against_first" not in first["loss"] and "against_base" not in base["loss"]
    assert first["agreement"]["kl"] == pytest.approx(0, abs=1e-9)
    assert first["agreement"]["top_1"] == 1 and other["agreement"]["kl"] > 0
    assert first["agreement"]["top_1_interval"] is None
    low, high = other["agreement"]["top_1_interval"]
    assert 0 <= low <= other["agreement"]["top_1"] <= high <= 1
    assert "forgetting" not in base["forgetting"] and first["forgetting"]["examples"] == 8
    assert first["parameters"] == sum(
        parameter.numel() for name, parameter in
        PeftModel.from_pretrained(model, inputs / "first").named_parameters() if "lora_" in name
    )  # fmt: skip
    for row, line in zip(record["results"], table.splitlines()[4:7], strict=True):
        assert row["name"] in line and f"{row['loss']['loss']:.4g}" in line


def test_questions_and_answers_are_whole_however_short_the_examples_of_the_loss(inputs, tmp_path):
    more = ["--metrics", "exact_match", "--max_length", "4", "--output_dir", str(tmp_path)]
    more += ["--exact_match_template", r"Question:\t{question}\nAnswer:"]
    arguments = ["--adapters", f"{inputs}/first", *options(inputs, *more)]

    def shown(*stop: str) -> list[dict[str, Any]]:
        evaluate_adapter.main([*arguments, "--exact_match_stop", *stop])
        record = json.loads((tmp_path / "evaluation.json").read_text())
        return record["results"][0]["exact_match"]["shown"]

    whole = shown(r"never\nsaid")
    for one in whole:
        number = int(one["reference"]) // 2
        assert one["question"] == f"Question:\t{number} plus {number} is \nAnswer:"
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["data"]["exact_match"]["stop"] == ["never\nsaid"]
    end = whole[0]["answer"][1]
    assert [one["answer"] for one in shown(end)] == [one["answer"].split(end)[0] for one in whole]


def test_an_adapter_without_lora_has_a_row(inputs, tmp_path):
    save_adapter(inputs, "scales", KINDS["ia3"])
    arguments = ["--adapters", f"{inputs}/scales", *options(inputs), "--metrics", "loss"]
    evaluate_adapter.main([*arguments, "--output_dir", str(tmp_path)])
    row = json.loads((tmp_path / "evaluation.json").read_text())["results"][1]
    assert row["peft_type"] == "IA3" and row["parameters"] > 0
    assert row["note"].startswith("whether it was trained on the held-out examples is not known")


def test_an_adapter_that_may_have_learnt_what_is_held_out_has_a_note(inputs, tmp_path):
    training = [*("--dataset_name", str(inputs / "data.jsonl"), "--max_steps", "1")]
    training += ["--model_name_or_path", str(inputs / "model"), "--use_cpu", "true"]
    train_lora.main([*training, "--output_dir", str(tmp_path / "run"), "--eval_fraction", "0.5"])
    arguments = ["--adapters", str(tmp_path / "run"), *options(inputs, "--metrics", "loss")]
    arguments += ["--output_dir", str(tmp_path)]
    evaluate_adapter.main(arguments)
    assert "another split" not in (tmp_path / "evaluation.md").read_text()
    assert "not known" not in (tmp_path / "evaluation.md").read_text()
    evaluate_adapter.main([*arguments, "--split_seed", "1"])
    assert re.search(
        "run: trained on another split .*split_seed 0, here 1",
        (tmp_path / "evaluation.md").read_text(),
    )


@pytest.mark.parametrize("metrics", ["loss", "exact_match"])
def test_an_adapter_of_nan_is_named_in_one_line(metrics, inputs, tmp_path, capsys):
    broken = save_broken(inputs)
    more = options(inputs, "--metrics", metrics, "--output_dir", str(tmp_path))
    line = refusal(capsys, ["--adapters", f"{inputs}/first", str(broken), *more])
    assert re.search("broken cannot be measured: the model gives logits that are NaN", line), line
    kept = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert [row["name"] for row in kept] == ["base", "first"]
    more += ["--teacher", str(broken)]
    line = refusal(capsys, ["--adapters", f"{inputs}/first", *more])
    assert re.search("cannot be measured: the teacher gives logits that are NaN", line), line


def test_the_base_and_a_teacher_are_of_the_revisions_that_are_named(inputs, tmp_path, capsys):
    config = json.loads((inputs / "first/adapter_config.json").read_text())
    for name, revision in (("old", "v1"), ("older", "v1"), ("new", None)):
        edited = shutil.copytree(inputs / "first", tmp_path / f"runs={name}")
        own = {"base_model_name_or_path": "org/model", "revision": revision}
        (edited / "adapter_config.json").write_text(json.dumps({**config, **own}))
    adapters = ["--adapters", f"{tmp_path}/runs=old", f"other={tmp_path}/runs=older"]
    more = [*options(inputs), "--metrics", "loss", "--output_dir", str(tmp_path / "out")]
    with stand_in_hub() as hub, hub.in_this_process(tmp_path / "cache"):
        hub.add("org/model", inputs / "stranger")
        hub.add("org/model", inputs / "model", revision="v1")
        for teacher, same in (("org/model@v1", True), ("org/model", False)):
            evaluate_adapter.main([*adapters, *more, "--teacher", teacher])
            base, one, other = json.loads((tmp_path / "out/evaluation.json").read_text())["results"]
            assert (base["agreement"]["kl"] == 0) is same
            assert (one["name"], other["name"]) == ("runs=old", "other")
        line = refusal(capsys, [*adapters, f"{tmp_path}/runs=new", *more])
    assert re.search("runs=new is of revision 'main' of org/model, and .* of 'v1'", line), line


def test_a_teacher_may_be_called_as_a_row_is(inputs, tmp_path):
    shutil.copytree(inputs / "second", tmp_path / "base")
    more = [*options(inputs), "--metrics", "loss", "--output_dir", str(tmp_path / "out")]
    arguments = ["--adapters", f"{inputs}/first", "--teacher", f"{tmp_path}/base"]
    evaluate_adapter.main([*arguments, *more])
    assert "top-1 as teacher" in (tmp_path / "out/evaluation.md").read_text()


def save_broken(folder: Path) -> Path:
    broken = shutil.copytree(folder / "first", folder / "broken", dirs_exist_ok=True)
    tensors = load_file(broken / "adapter_model.safetensors")
    nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    save_file(nan, broken / "adapter_model.safetensors")
    return broken


def test_the_configuration_in_the_repository_is_one_of_this_recipe():
    path = Path(__file__).parents[2] / "recipes/configs/evaluate_adapter.yaml"
    given = parse_options(evaluate_adapter.CLASSES, ["--config", str(path)], description="")
    asked = given[3].data(given[2])
    assert [(one.dataset_name, one.prompt_column, one.eval_split) for one in asked] == [
        ("openai/gsm8k", "question", "test")
    ]


def refusal(capsys: Any, arguments: list[str]) -> str:
    """The one line that the recipe ends with, after its usage where an option is wrong."""
    with pytest.raises(SystemExit) as end:
        evaluate_adapter.main(arguments)
    if isinstance(end.value.code, str):
        assert "\n" not in end.value.code
        return end.value.code
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--metrics loss bleu", "--metrics must be of loss, exact_match, forgetting, got 'bleu'"),
        ("--exact_match_answers number", "must be one of .*numeric.*got 'number'"),
        ("--exact_match_columns q a", "it needs q and a, .* set --exact_match_columns"),
        ("--exact_match_dataset {inputs}/none.csv", "--exact_match_dataset: there is no file"),
        ("--exact_match_dataset {inputs}/general.txt", "--exact_match_dataset must have questions"),
        ("--max_new_tokens 9999", r"--max_new_tokens=9999 and .* 4 of 4 questions are too long"),
        ("--exact_match_template Q:", "--exact_match_template must have {question}, got 'Q:'"),
        ("--forgetting_dataset {inputs}/table.csv", "or --forgetting_text_column"),
        ("--dataset_name {inputs}/chats.jsonl", "the tokenizer has no chat template"),
        ("--prompt_column question", "set --prompt_column and --completion_column"),
        ("--teacher {inputs}/none", "--teacher: .*/none is not a folder"),
        ("--teacher {inputs}/small", "--teacher must have the base's vocabulary of 258 .* 64"),
        ("--device cuda:99", "--device must be one of this machine, cuda:99 is not: "),
        ("--device abacus", "--device must be one of torch's, got 'abacus'"),
        ("--model_name_or_path {inputs}/stranger", "first says .* weights differ in layer"),
        ("--model_name_or_path {inputs}/small", "is of another base .* 16 x 16, which is 32 x 32"),
        ("--shown_answers -1", "--shown_answers must be at least 0, got -1"),
        ("--lm_eval_limit 5", "--lm_eval_limit needs --lm_eval_tasks"),
        ("--lm_eval_limit 0 --lm_eval_tasks a", "--lm_eval_limit must be at least 1, got 0"),
        (
            r"--exact_match_dataset {inputs}/chats.jsonl --exact_match_template {question}\n",
            "--exact_match_template belongs to questions in a column, and conversations",
        ),
        ("--lm_eval_include_path x", "--lm_eval_include_path needs --lm_eval_tasks"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(more, expected, inputs, tmp_path, capsys):
    tiny_model(hidden_size=32, head_dim=16).save_pretrained(str(inputs / "small"))
    TOKENIZER.save_pretrained(str(inputs / "small"))
    (inputs / "table.csv").write_text("a,b\n1,2\n3,4\n")
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (inputs / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 3)
    arguments = ["--adapters", f"{inputs}/first", *options(inputs)]
    arguments += [*more.format(inputs=inputs, question="{question}").split()]
    line = refusal(capsys, [*arguments, "--output_dir", str(tmp_path / "out")])
    assert re.search(expected, line), line
    assert not (tmp_path / "out").exists()


def test_a_launcher_of_several_processes_is_refused(inputs, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal(capsys, ["--adapters", f"{inputs}/first", *options(inputs)])
    assert line.endswith("in one process: start it without a launcher")


@pytest.mark.parametrize(
    ("adapters", "edit", "expected"),
    [
        ("{a} {inputs}/first {b}={inputs}/first", {}, "are both called 'first'; give another name"),
        ("base={inputs}/first", {}, "the base model's row are both called 'base'"),
        ("{inputs}/model", {}, "/model is no adapter, it has no adapter_config.json"),
        ("{inputs}/none", {}, "--adapters: .*/none is not a folder"),
        ("user/absent", {}, "--adapters: 'user/absent'"),
        ("user/pickle", {}, "--adapters: 'user/pickle' .*adapter_model.bin: a pickle can run code"),
        ("{edited}", {"weights": "adapter_model.bin"}, "must be safetensors, got .*bin: a pickle"),
        ("{edited}", {"task_type": "SEQ_CLS"}, "task_type SEQ_CLS .* only adapters of causal"),
        ("{edited}", {"base_model_name_or_path": None}, "names no base model; set --model_name_or"),
        ("{edited}", {"base_model_name_or_path": "/no/base"}, "'/no/base', which is not on this"),
        ("{edited}", {"target_modules": ["nothing"]}, "edited: PEFT cannot load"),
    ],
)
def test_a_wrong_adapter_is_refused_in_one_line(adapters, edit, expected, inputs, tmp_path, capsys):
    edited = shutil.copytree(inputs / "first", tmp_path / "edited")
    weights = edited / "adapter_model.safetensors"
    weights.rename(edited / edit.pop("weights", weights.name))
    config = json.loads((edited / "adapter_config.json").read_text())
    (edited / "adapter_config.json").write_text(json.dumps({**config, **edit}))
    names = adapters.format(a=f"{inputs}/second", b="first", inputs=inputs, edited=edited)
    with stand_in_hub() as hub, hub.in_this_process(tmp_path / "cache"):
        pickle = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.bin": b"x"}
        hub.add("user/pickle", pickle)
        line = refusal(capsys, ["--adapters", *names.split(), *options(inputs)])
    assert re.search(expected, line), line


def test_an_adapter_of_the_embedded_model_finds_it_on_another_machine():
    assert builtin_of_folder("/home/other/.cache/x/smollm2-135m-0123456789") == (
        "builtin:smollm2-135m"
    )
    for other in ("/home/other/smollm2-135m", "HuggingFaceTB/SmolLM2-135M", "a/b-0123456789"):
        assert builtin_of_folder(other) is None


def test_the_harness_is_asked_for_the_base_with_the_adapter(inputs, tmp_path, monkeypatch):
    calls = []

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        figures = {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.25}
        return {"results": {"sums": figures}}

    tasks = SimpleNamespace(
        TaskManager=lambda include_path: SimpleNamespace(all_tasks=["sums"], folder=include_path)
    )
    spec = ModuleSpec("lm_eval", None)
    package = SimpleNamespace(simple_evaluate=simple_evaluate, tasks=tasks, __spec__=spec)
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    arguments = ["--adapters", f"{inputs}/first", *options(inputs), "--metrics", "loss"]
    arguments += ["--lm_eval_tasks", "sums", "--lm_eval_include_path", str(inputs)]
    evaluate_adapter.main([*arguments, "--dtype", "bfloat16", "--output_dir", str(tmp_path)])
    base = {
        "pretrained": f"{inputs}/model",
        "revision": "main",
        "dtype": "bfloat16",
        "trust_remote_code": False,
    }
    assert [call["model_args"] for call in calls] == [base, {**base, "peft": f"{inputs}/first"}]
    for call in calls:
        assert (call["model"], call["tasks"], call["device"]) == ("hf", ["sums"], "cpu")
        assert call["task_manager"].folder == str(inputs)
    assert (tmp_path / "evaluation.md").read_text().count("acc 0.500 \u00b1 0.25") == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_adapter.main([*arguments, "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert ["lm_eval" in row for row in rows] == [True, False] and "loss" in rows[1]
    assert (tmp_path / "evaluation.md").read_text().count("acc 0.500 \u00b1 0.25") == 1


@pytest.mark.parametrize(
    ("installed", "options", "expected"),
    [
        (False, {"lm_eval_tasks": ["a"]}, "run: pip install lm_eval"),
        (True, {"lm_eval_tasks": ["a"]}, "has no task a; add it by lm_eval_include_path"),
        (True, {"lm_eval_tasks": ["b"], "load_in_4bit": True}, "load_in_4bit and lm_eval_tasks ex"),
        (True, {"lm_eval_tasks": ["b"], "lm_eval_include_path": "/none"}, "must be a folder, got"),
    ],
)
def test_a_harness_without_what_it_needs_is_refused(installed, options, expected, monkeypatch):
    tasks = SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(all_tasks=["b"]))
    spec = ModuleSpec("lm_eval", None)
    package = SimpleNamespace(tasks=tasks, __spec__=spec) if installed else None
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    with pytest.raises((ModuleNotFoundError, ValueError), match=expected):
        names = [entry.name for entry in fields(HarnessOptions)]
        harness = {name: options.pop(name) for name in names if name in options}
        check_harness(HarnessOptions(**harness), AdaptedModelOptions(**options))
