"""Values that nobody means, in any file of a stranger: every verb says so in one line, or works."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hostile_artefacts import ARTEFACTS, Artefact, command_line
from support.hostile_json import document_of, documents, replace_document
from support.tiny_models import tiny_model, trained_adapter

from peft_svdinit.adapters import load_stock_adapter
from peft_svdinit.adapters.formats.opening import open_adapter
from peft_svdinit.cli import main
from peft_svdinit.factors import LoraAdapter
from peft_svdinit.hub.artefact import recognise
from peft_svdinit.models import foreign_patterns
from peft_svdinit.training import REFUSALS

SAMPLED = 4


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(foreign_patterns, "_SECONDS", 0.2)


def attempts(artefact: Artefact) -> list[str | Callable[[Path], Any]]:
    return [*artefact.commands, *artefact.readers]


def says_what_is_wrong(attempt: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run it, and let through nothing but success and one line for a wrong input."""
    out = folder.with_name("out")
    if not isinstance(attempt, str):
        try:
            attempt(folder)
        except REFUSALS as error:
            assert str(error)
        return
    verb = attempt.split()[0]
    try:
        main(command_line(attempt, folder, out))
    except SystemExit as ended:
        assert ended.code == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith(f"svdinit {verb}: error: ")
    shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("kind", ARTEFACTS)
def test_no_value_ends_in_a_traceback(kind, tmp_path, capsys, request):
    artefact = ARTEFACTS[kind]
    artefact.save(tmp_path / "kept")
    trained_adapter(tmp_path / "other", seed=3)
    for attempt in attempts(artefact):
        if not isinstance(attempt, str):
            attempt(tmp_path / "kept")
    found = list(documents(document_of(tmp_path / "kept" / artefact.file)))
    chosen = [(done, attempt) for done in found for attempt in attempts(artefact)]
    if not request.config.getoption("--thorough"):
        chosen = random.Random(kind).sample(chosen, SAMPLED)
    for (what, content), attempt in chosen:
        folder = tmp_path / "x"
        shutil.copytree(tmp_path / "kept", folder)
        if replace_document(folder / artefact.file, content):
            try:
                says_what_is_wrong(attempt, folder, capsys)
            except Exception as error:
                raise AssertionError(f"{kind}: {artefact.file}: {what}: {attempt}") from error
        shutil.rmtree(folder)


WRONG: dict[str, tuple[str, ...]] = {
    "r": ("null", "true", '"8"', "8.5", "0", "-1", "[4]", "1" + "0" * 400, "NaN", '4, "r": 4'),
    "lora_alpha": ("null", "false", '"8"', "0", "-8", "1e400", "{}"),
    "rank_pattern": ("[]", '"q_proj"', '{"q_proj": "4"}', '{"q_proj": 8.5}', '{"((": 4}'),
    "alpha_pattern": ("8", '{"q_proj": null}', '{"q_proj": -1}', '{"([a-z.0-9_]+)+=": 4}'),
    "target_modules": ("3", "[null]", '"(("', '"(.*)*="'),
    "exclude_modules": ("true", "{}", '"[a-"', '".*.*.*.*.*.*.*.*.*.*="'),
    "layers_to_transform": ('"all"', "[0.5]"),
    "base_model_name_or_path": ("3", '["a"]'),
    "use_rslora": ("1", '"false"'),
}


@pytest.mark.parametrize("option", WRONG)
def test_all_readers_of_an_adapter_refuse_the_same(option, tmp_path):
    trained_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    readers: list[Callable[[Path], Any]] = [LoraAdapter, open_adapter, recognise]
    readers.append(lambda folder: load_stock_adapter(tiny_model(), folder))
    for value in WRONG[option]:
        path.write_text(json.dumps({**config, option: "HERE"}).replace('"HERE"', value))
        for read in readers:
            with pytest.raises(ValueError) as error:
                read(tmp_path)
            assert "adapter_config.json" in str(error.value), (value, read)
            assert option in str(error.value) or "JSON" in str(error.value), (value, read)
