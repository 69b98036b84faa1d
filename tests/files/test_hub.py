"""Factors, adapters and models named by Hub ids, from a stand-in of the Hub on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from huggingface_hub import constants
from peft import get_peft_model
from support.hub import StandInHub, stand_in_hub
from support.tiny_models import tiny_model, trained_adapter
from transformers import AutoModelForCausalLM

from peft_svdinit import SvdLoraConfig
from peft_svdinit.cli import main as svdinit
from peft_svdinit.factors import CheckpointPair, LoraAdapter
from peft_svdinit.files import hub as asking
from peft_svdinit.files import hub_pickles, resolve_file, resolve_folder

TOKENIZER_FILES = ["merges.txt", "tokenizer.model", "vocab.txt"]
FURTHER_WEIGHTS = [
    "consolidated.00.safetensors",
    "onnx/decoder.json",
    "original/model.safetensors",
    "pytorch_model.bin",
]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandInHub]:
    repositories = tmp_path / "hub" / "user"
    trained_adapter(repositories / "adapter")
    tiny_model().save_pretrained(str(repositories / "base"))
    svdinit(
        f"synthesize --adapter {repositories}/adapter --base {repositories}/base --rank 6 "
        f"--lora_r 4 --plots false --output_dir {repositories}/factors".split()
    )
    further = {
        "base": [*TOKENIZER_FILES, *FURTHER_WEIGHTS],
        "pickled": ["config.json", "pytorch_model-00001-of-00001.bin", "vocab.txt"],
    }
    for repository, names in further.items():
        for name in names:
            (repositories / repository / name).parent.mkdir(exist_ok=True)
            (repositories / repository / name).write_bytes(b"{}")
    SvdLoraConfig(r=4, svd_factors="user/factors").save_pretrained(f"{repositories}/svd/last")
    with stand_in_hub(tmp_path / "hub") as hub, hub.in_this_process(tmp_path / "cache"):
        yield hub


def test_ids_of_the_hub_work_wherever_paths_do(hub, tmp_path):
    adapter = LoraAdapter("user/adapter")
    CheckpointPair("user/base", "user/base", target_modules=list(adapter))
    base = AutoModelForCausalLM.from_pretrained("user/base")
    config = SvdLoraConfig(
        r=4, target_modules=list(adapter), svd_factors="user/factors", svd_factors_revision="main"
    )
    model = get_peft_model(base, config)
    assert any(part.abs().sum() > 0 for name, part in model.named_parameters() if "lora_B" in name)
    with pytest.raises(FileNotFoundError, match=r"factors\.safetensors"):
        get_peft_model(base, SvdLoraConfig(r=4, svd_factors="user/base"))

    elsewhere = tmp_path / "elsewhere"
    saved = SvdLoraConfig.from_pretrained("user/svd", "last", revision="main", cache_dir=elsewhere)
    assert saved.svd_factors == "user/factors"
    assert any(elsewhere.rglob("last/svdinit_config.json"))
    for absent in ("user/base", "user/nonesuch"):
        with pytest.raises(ValueError, match=r"svdinit_config\.json"):
            SvdLoraConfig.from_pretrained(absent)

    folder = resolve_folder("user/base", argument="base")
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*.*")}
    assert {"config.json", "model.safetensors", *TOKENIZER_FILES} <= files
    assert not set(FURTHER_WEIGHTS) & files
    pickles = ["pytorch_model-00001-of-00001.bin"]
    found = [hub_pickles(f"user/{name}") for name in ("adapter", "pickled", "absent")]
    assert found == [[], pickles, []] and hub_pickles("user/pickled", "main") == pickles


def test_an_id_may_name_its_revision(hub, tmp_path):
    first = resolve_file("user/factors", "factors.safetensors", argument="factors")
    hub.add("user/factors", {"factors.safetensors": b"later"}, revision="next")
    at = resolve_file("user/factors@next", "factors.safetensors", argument="factors")
    assert at.read_bytes() == b"later" and first.read_bytes() != b"later"
    with pytest.raises(ValueError, match="factors: 'user/factors@next' names another revision"):
        resolve_file("user/factors@next", "f.json", argument="factors", revision="main")
    (tmp_path / "a@b").mkdir()
    assert resolve_folder(tmp_path / "a@b", argument="base") == tmp_path / "a@b"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("user/nothing", FileNotFoundError, "'user/nothing' is neither a path on this disk nor"),
        ("user/hidden", FileNotFoundError, "if it is private set HF_TOKEN, or run `hf auth login`"),
        ("user/gated", PermissionError, "is gated: ask for access on its page of the Hub"),
        ("user/base@v9", FileNotFoundError, "'user/base@v9' has no such revision on the Hub"),
        ("user/base", FileNotFoundError, "has no adapter_config.json on the Hub"),
        ("user/pickled", FileNotFoundError, "but pytorch_model-00001-of-00001.bin: a pickle can"),
        ("user/a/b@main", FileNotFoundError, "there is no file or folder user/a/b@main"),
        ("user/no name", ValueError, "is neither a path on this disk nor an id of the Hub"),
    ],
)
def test_what_the_hub_refuses_is_said_with_a_remedy(hub, name, kind, message):
    hub.add("user/hidden", {"config.json": b"{}"}, private=True)
    hub.add("user/gated", {"adapter_config.json": b"{}"}, gated=True)
    file = "model.safetensors" if name == "user/pickled" else "adapter_config.json"
    with pytest.raises(kind, match=re.escape(message)):
        resolve_file(name, file, argument="adapter")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again_and_in_the_end_given_up(hub, monkeypatch, status):
    waited = []
    monkeypatch.setattr(asking.time, "sleep", waited.append)
    fault = {"status": status, "method": "GET", "headers": {"Retry-After": "3"}}
    hub.fail("resolve", times=2, **fault)
    assert resolve_file("user/base", "config.json", argument="base").is_file()
    assert len(waited) == 2 and all(3 <= wait <= 5 for wait in waited)
    hub.fail("resolve", times=None, **fault)
    with pytest.raises(ConnectionError, match=r"base: 'user/base': the Hub .* time and again"):
        resolve_file("user/base", "generation_config.json", argument="base")


def test_a_broken_download_goes_on_where_it_was(hub):
    content = bytes(21 << 20)
    hub.add("user/large", {"factors.safetensors": content})
    hub.cut("lfs", after_bytes=15 << 20, method="GET")
    found = resolve_file("user/large", "factors.safetensors", argument="factors")
    assert found.stat().st_size == len(content)
    _, second = hub.requests("lfs", "GET")
    assert second.sent < len(content)


def test_without_a_network_the_cache_is_read_and_the_rest_named(hub, tmp_path):
    resolve_file("user/base", "config.json", argument="base")
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        assert resolve_file("user/base", "config.json", argument="base").is_file()
        with pytest.raises(FileNotFoundError, match="nor in the cache of the Hub, which"):
            resolve_file("user/factors", "factors.safetensors", argument="factors")


def test_a_path_has_no_pickles_of_the_hub(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert hub_pickles(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_revision_of_a_path_is_refused(tmp_path, there):
    path = tmp_path / "model"
    if there:
        path.mkdir()
        (path / "config.json").write_text("{}")
        assert resolve_folder(path, argument="base") == path
        assert resolve_file(path, "config.json", argument="base") == path / "config.json"
    message = "base: a revision belongs to a repository of the Hub, got 'main' for the path .*model"
    with pytest.raises(ValueError, match=message):
        resolve_folder(path, argument="base", revision="main")
    with pytest.raises(ValueError, match=message):
        resolve_file(path, "config.json", argument="base", revision="main")
