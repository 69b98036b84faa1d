"""Where examples come from, how they are split, and that labels are exactly the completions."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from dataclasses import fields
from typing import Any

import datasets
import datasets.config
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_tokenizer import byte_tokenizer

from peft_svdinit.training import DataOptions, completion_collator, prepare_examples
from peft_svdinit.training.builtin.registry import BUILTIN_DATASETS
from peft_svdinit.training.data import load_examples as loaded
from peft_svdinit.training.tokenizing import tokenize_examples

DOCSTRINGS = "builtin:stdlib-docstrings"
NAMES = "builtin:stdlib-names"
TOPICS = "builtin:python-topics"
ARITHMETIC = "builtin:arithmetic"
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


PLAIN = byte_tokenizer()
STARTING = byte_tokenizer(adds_start=True)
CHAT = byte_tokenizer(adds_start=True, chat_template=TEMPLATE)
tokenizers = st.sampled_from([PLAIN, STARTING])
some_text = st.text(min_size=1, max_size=20).filter(lambda text: "<" not in text)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def encoded(rows: list[dict[str, Any]], tokenizer: Any, max_length: int = 4096) -> list[Any]:
    return list(tokenize_examples(Dataset.from_list(rows), tokenizer, max_length))


def load_examples(name: str, **options: Any) -> tuple[Dataset, Dataset]:
    return loaded(DataOptions(dataset_name=name, **options))


def learnt(row: Any) -> list[int]:
    return [label for label in row["labels"] if label != -100]


@settings(max_examples=30, deadline=None)
@given(tokenizers, st.lists(st.tuples(st.text(max_size=20), some_text), min_size=1, max_size=4))
def test_labels_decode_to_the_completion_and_the_end_token(tokenizer, pairs):
    pairs = [(prompt.replace("<", ""), completion) for prompt, completion in pairs]
    rows = encoded([{"prompt": p, "completion": c} for p, c in pairs], tokenizer)
    start = "<s>" if tokenizer is STARTING else ""
    for (prompt, completion), row in zip(pairs, rows, strict=True):
        assert tokenizer.decode(learnt(row)) == completion + "</s>"
        assert tokenizer.decode(row["input_ids"]) == start + prompt + completion + "</s>"
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        assert row["input_ids"][-len(learnt(row)) :] == learnt(row)


@settings(max_examples=60, deadline=None)
@given(tokenizers, st.text("ab", max_size=30), st.text("cd", min_size=1), st.integers(2, 40))
def test_the_prompt_loses_its_start_before_the_completion_loses_its_end(
    tokenizer, prompt, completion, max_length
):
    (row,) = encoded([{"prompt": prompt, "completion": completion}], tokenizer, max_length)
    labels = learnt(row)
    context = tokenizer.decode(row["input_ids"][: -len(labels)]).removeprefix("<s>")
    has_start = tokenizer is STARTING
    assert len(row["input_ids"]) == len(row["labels"]) <= max_length
    assert (completion + "</s>").startswith(tokenizer.decode(labels))
    assert prompt.endswith(context)
    assert (row["input_ids"][0] == tokenizer.bos_token_id) == has_start
    complete = len(labels) == len(completion) + 1
    assert complete or len(row["input_ids"]) == max_length
    guaranteed = min(len(prompt) + has_start, max(1, max_length // 4))
    assert len(context) + has_start >= guaranteed
    assert complete or len(context) + has_start <= max(guaranteed, has_start)


def test_a_plain_text_is_learnt_as_a_whole():
    (row,) = encoded([{"text": "abc"}], PLAIN)
    assert row["labels"] == row["input_ids"]
    assert PLAIN.decode(row["labels"]) == "abc</s>"


def test_the_last_assistant_message_is_the_completion():
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Thanks"},
    ]
    (row,) = encoded([{"messages": messages}], CHAT)
    assert CHAT.decode(learnt(row)) == "4</s>"
    prompt = "<s>[user] 1+1?\n[assistant] 2\n[user] 2+2?\n[assistant] "
    assert CHAT.decode(row["input_ids"]) == prompt + "4</s>"


def test_a_prompt_with_a_start_token_gets_no_second_one():
    (row,) = encoded([{"prompt": "<s>a", "completion": "b"}], STARTING)
    assert STARTING.decode(row["input_ids"]) == "<s>ab</s>"


def test_examples_with_nothing_to_learn_are_dropped_and_counted(caplog):
    rows = [{"prompt": "a", "completion": c} for c in ("b", "", None)]
    rows.append({"prompt": None, "completion": "b"})
    with caplog.at_level(logging.WARNING, logger="peft_svdinit"):
        assert len(encoded(rows, PLAIN)) == 2
    assert "dropped 2 of 4 examples" in caplog.text


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
    ],
)
def test_a_conversation_without_an_answered_question_is_dropped(messages):
    answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (row,) = encoded([{"messages": messages}, {"messages": answered}], CHAT)
    assert CHAT.decode(learnt(row)) == "b</s>"


def test_wrong_input_of_the_tokenisation_is_refused():
    with pytest.raises(ValueError, match="none of the 1 examples"):
        encoded([{"prompt": "a", "completion": ""}], PLAIN)
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        encoded([{"text": "a"}], PLAIN, 1)
    with pytest.raises(ValueError, match="no chat template"):
        encoded([{"messages": [{"role": "user", "content": "a"}]}], PLAIN)
    without_end = byte_tokenizer()
    without_end.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        encoded([{"text": "a"}], without_end)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_collator_pads_labels_without_loss(side):
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    rows = encoded(
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "bcd"}], PLAIN
    )
    batch = completion_collator(tokenizer)(rows)
    ignored = torch.tensor([-100, -100])
    padding = slice(None, 2) if side == "left" else slice(-2, None)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 5)
    assert torch.equal(batch["labels"][0, padding], ignored)
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    for i, row in enumerate(rows):
        assert learnt({"labels": batch["labels"][i].tolist()}) == learnt(row)


@pytest.mark.parametrize(
    ("name", "column"),
    [(DOCSTRINGS, "module"), (NAMES, "module"), (TOPICS, "topic"), (ARITHMETIC, "equation")],
)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31), fraction=st.sampled_from([0.05, 0.1, 0.5]))
def test_no_group_is_on_both_sides_of_a_builtin_split(name, column, seed, fraction):
    train, evaluation = load_examples(name, split_seed=seed, eval_fraction=fraction)
    assert train.column_names == ["prompt", "completion", column]
    assert not set(train[column]) & set(evaluation[column])
    total = len(train) + len(evaluation)
    assert total == len(BUILTIN_DATASETS[name].rows())
    slack = 1.1 if name == NAMES else 1  # its modules are chosen by their sizes in DOCSTRINGS
    assert 0.8 * fraction * total <= len(evaluation) <= slack * fraction * total
    again = load_examples(name, split_seed=seed, eval_fraction=fraction)
    assert [side.to_list() for side in again] == [train.to_list(), evaluation.to_list()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_one_task_of_the_library_holds_out_the_other_does_not_train_on(seed):
    docstrings, names = (load_examples(name, split_seed=seed) for name in (DOCSTRINGS, NAMES))
    for (train, _), (_, evaluation) in ((docstrings, names), (names, docstrings)):
        assert not set(train["module"]) & set(evaluation["module"])


def test_no_held_out_sentence_of_the_topics_is_trained_on():
    train, evaluation = load_examples(TOPICS)
    trained = set(train["completion"]) | {p.split("\n\n", 1)[1].strip() for p in train["prompt"]}
    assert not trained & set(evaluation["completion"])


@pytest.mark.parametrize(("name", "column"), [(NAMES, "module"), (TOPICS, "topic")])
def test_another_seed_holds_out_other_groups(name, column):
    first, second = (set(load_examples(name, split_seed=seed)[1][column]) for seed in (0, 1))
    assert first != second


def test_the_problems_are_right_and_the_same_on_every_python():
    train, evaluation = load_examples(ARITHMETIC)
    problems: list[Any] = [*train, *evaluation]
    for row in problems:
        calculation, answer = row["equation"].split(" = ")
        assert eval(calculation) == int(answer) > 0
        assert row["completion"].endswith(f"The answer is {answer}")
        for step in re.findall(r"[\d +*/-]+ = \d+", row["completion"]):
            left, right = step.split(" = ")
            assert eval(left.strip(" +*/-")) == int(right)
    assert len({row["prompt"] for row in problems}) == 4000
    digest = hashlib.sha256("".join(sorted(row["completion"] for row in problems)).encode())
    assert digest.hexdigest()[:16] == "f16ee7e9aa5bfe90"


@pytest.mark.parametrize("name", [DOCSTRINGS, NAMES, TOPICS, ARITHMETIC])
def test_every_builtin_data_set_can_be_tokenised(name):
    train, _ = load_examples(name, max_train_samples=20)
    rows = tokenize_examples(train, PLAIN, 1024)
    learnt_texts = [PLAIN.decode(learnt(row)) for row in rows]
    assert learnt_texts == [completion + "</s>" for completion in train["completion"]]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "other": i} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_are_split_by_seed_and_none_is_lost(jsonl):
    train, evaluation = load_examples(jsonl, split_seed=3)
    assert (len(train), len(evaluation)) == (36, 4)
    assert sorted([*train["prompt"], *evaluation["prompt"]]) == sorted(f"p{i}" for i in range(40))
    again = load_examples(jsonl, split_seed=3)
    assert list(again[1]["prompt"]) == list(evaluation["prompt"])
    assert list(load_examples(jsonl, split_seed=4)[1]["prompt"]) != list(evaluation["prompt"])
    assert train.column_names == ["prompt", "completion"]


@pytest.mark.parametrize("name", [TOPICS, "jsonl"])
def test_a_smaller_draw_is_a_part_of_a_larger_one(name, jsonl):
    name = jsonl if name == "jsonl" else name
    draws = [
        load_examples(name, max_train_samples=n, max_eval_samples=min(n, 2)) for n in (3, 9, 10**6)
    ]
    small, large, everything = (set(train["prompt"]) for train, _ in draws)
    assert small < large < everything
    assert len(draws[0][1]) == 2


def rows(kind: str) -> list[dict[str, str]]:
    return [{"question": f"{kind}{i}", "answer": f"a{i}"} for i in range(6)]


def write_source(kind, folder):
    dataset = Dataset.from_list(rows("q"))
    splits = DatasetDict({"train": dataset, "test": Dataset.from_list(rows("t"))})
    match kind:
        case "jsonl" | "json":
            dataset.to_json(folder / f"data.{kind}")
        case "csv":
            dataset.to_csv(folder / "data.csv")
        case "parquet":
            dataset.to_parquet(folder / "data.parquet")
        case "saved":
            dataset.save_to_disk(folder / "data.saved")
        case "saved_splits":
            splits.save_to_disk(folder / "data.saved_splits")
        case "folder":
            for name, split in splits.items():
                split.to_parquet(folder / "data.folder" / f"{name}.parquet")
    return str(folder / f"data.{kind}")


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "csv", "parquet", "saved", "saved_splits", "folder"]
)
def test_every_local_source_gives_the_same_examples(kind, tmp_path):
    (tmp_path / "data.folder").mkdir()
    source = write_source(kind, tmp_path)
    has_test = kind in ("saved_splits", "folder")
    columns: Any = {"prompt_column": "question", "completion_column": "answer"}
    train, evaluation = load_examples(source, eval_split="test" if has_test else None, **columns)
    assert train.column_names == ["prompt", "completion"]
    found = sorted([*train["prompt"], *([] if has_test else evaluation["prompt"])])
    assert found == [f"q{i}" for i in range(6)]
    if has_test:
        assert list(evaluation["prompt"]) == [f"t{i}" for i in range(6)]


def test_each_line_of_a_text_file_is_an_example(tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\ntwo\nthree\n")
    train, evaluation = load_examples(str(tmp_path / "lines.txt"))
    assert train.column_names == ["text"]
    assert len(train) + len(evaluation) == 4
    assert len(evaluation) == 1


def test_a_hub_id_goes_to_load_dataset(monkeypatch):
    calls = []

    def load(*arguments):
        calls.append(arguments)
        return {"train": Dataset.from_list([{"messages": [{"role": "user"}]}] * 4)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, _ = load_examples("someone/chats", dataset_config="small")
    assert calls == [("someone/chats", "small")]
    assert train.column_names == ["messages"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompt_column": "q"}, "has the columns prompt, completion, other; it needs q and compl"),
        ({"completion_column": "other"}, "completion_column: 'other' .* must hold text"),
        ({"completion_column": "x", "messages_column": "prompt"}, "must hold a list of messages"),
        ({"train_split": "training"}, "train_split must be a split .* which has train; got"),
        ({"eval_split": "test"}, "eval_split must be a split .* which has train; got 'test'"),
        ({"eval_split": "train"}, "eval_split must differ from train_split"),
        ({"eval_fraction": 1.0}, r"eval_fraction must be in \(0, 1\), got 1.0"),
        ({"max_train_samples": 0}, "max_train_samples must be at least 1, got 0"),
        ({"max_eval_samples": -1}, "max_eval_samples must be at least 1, got -1"),
    ],
)
def test_wrong_options_are_refused(options, expected, jsonl):
    with pytest.raises(ValueError, match=expected):
        load_examples(jsonl, **options)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("builtin:docstrings", None, "known ones: .*; did you mean builtin:stdlib-docstrings"),
        (
            "builtin:xyz",
            None,
            "unknown .* 'builtin:xyz'; known .*-names, .*-topics, .*:arithmetic",
        ),
        ("./absent.jsonl", None, "there is no file or folder './absent.jsonl'"),
        ("absent.csv", None, "there is no file or folder"),
        ("data.pkl", "x", "must end in .json, .jsonl"),
        ("data.jsonl", "{", "cannot load"),
        ("data.csv", "prompt,completion\na,b\n", "at least 2 examples to hold one out, got 1"),
        ("data.csv", "", "cannot load"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(name, content, expected, tmp_path):
    if content is not None:
        name = str(tmp_path / name)
        with open(name, "w", encoding="utf-8") as file:
            file.write(content)
    with pytest.raises(ValueError, match=expected):
        load_examples(name)


@pytest.mark.parametrize(("name", "column"), [(NAMES, "module"), (TOPICS, "topic")])
def test_a_group_larger_than_the_held_out_part_is_not_held_out(name, column):
    with pytest.raises(ValueError, match=f"smaller than any {column}"):
        load_examples(name, eval_fraction=1e-6)


def test_a_missing_datasets_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"peft-svdinit\[data\]"):
        load_examples(DOCSTRINGS)


def test_the_help_of_dataset_name_lists_every_builtin_data_set():
    (text,) = [f.metadata["help"] for f in fields(DataOptions) if f.name == "dataset_name"]
    for name, builtin in BUILTIN_DATASETS.items():
        assert f"{name} ({builtin.summary})" in text


def test_the_options_prepare_both_sides(jsonl):
    options = DataOptions(dataset_name=jsonl, max_train_samples=5, max_length=8)
    train, evaluation = prepare_examples(options, PLAIN)
    assert (len(train), len(evaluation)) == (5, 4)
    assert set(train.column_names) == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(ValueError, match="eval_fraction"):
        DataOptions(eval_fraction=0)
    with pytest.raises(ValueError, match="max_length"):
        DataOptions(max_length=1)
