"""`svdinit push` against a Hub on this machine, and what comes back from it."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.hub import READ, STRANGER, WRITE, stand_in_hub
from support.shared_artefacts import (
    BASE,
    KINDS,
    add_base,
    save_adapter,
    save_adapter_factors,
    save_lori,
)
from support.stock_process import run_without_us
from support.tiny_models import save_pair, truncate

from peft_svdinit import push_to_hub
from peft_svdinit.cli import main as svdinit
from peft_svdinit.factors import FactorsFile, LoraAdapter
from peft_svdinit.files import hub, resolve_folder
from peft_svdinit.hub import push
from peft_svdinit.hub.artefact import recognise
from peft_svdinit.hub.base_model import BaseModel
from peft_svdinit.hub.publishable import command_without_paths, without_paths
from peft_svdinit.masks import load_compact, load_mask


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(hub, "WAITS", (0.0, 0.0))


@pytest.fixture
def there(tmp_path):
    """The Hub with the base on it, and the base's folder."""
    with stand_in_hub() as server, server.in_this_process(tmp_path / "cache", WRITE):
        yield server, add_base(server, tmp_path / "here" / "base")


def code_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_and_its_card_says_how(there, tmp_path, kind, monkeypatch):
    server, base = there
    folder = KINDS[kind](tmp_path / "here" / "folder", base)
    given = BASE if kind.startswith("low rank") else None
    pushed = push_to_hub(folder, "user/shared", base_model=given)
    files = server.files("user/shared")
    assert set(pushed.files) == files.keys() - {".gitattributes"}
    # Nothing of this disk is in a configuration or a header.
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    card = files["README.md"].decode()
    metadata = metadata_of(card)
    assert metadata["base_model"] == BASE and metadata["license"] == "apache-2.0"
    assert {"peft-svdinit"} <= set(metadata["tags"])
    # Everything is fetched again, by a user who may only read.
    monkeypatch.chdir(tmp_path)
    with server.in_this_process(tmp_path / "clean", READ):
        names: dict = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            for code in code_of(card):
                exec(code, names)
        at = f"user/shared@{pushed.commit}"
        if kind == "factors":
            assert FactorsFile(at).metadata.source["path"] == "adapter"
            assert set(FactorsFile(at)) == set(FactorsFile(folder))
        elif kind in ("mask", "lori"):
            assert load_mask(at).kept == load_mask(folder).kept
        if kind in ("compact", "lori"):
            compact = load_compact(at)
            assert compact.config["base_model_name_or_path"] == BASE
        if kind == "compact":
            svdinit(["export", "--adapter", "user/shared", "--output_dir", str(tmp_path / "out")])
            assert LoraAdapter(tmp_path / "out").config["base_model_name_or_path"] == BASE


@pytest.mark.slow
def test_stock_peft_loads_what_was_pushed_by_its_id(there, tmp_path):
    server, base = there
    folder = save_adapter(tmp_path / "folder", base, r=16)
    pushed = push_to_hub(folder, "shared", private=True)
    assert pushed.repo_id == "user/shared" and server.repository("user/shared").private
    with server.in_this_process(tmp_path / "clean", READ):
        found = resolve_folder("user/shared", argument="adapter")
    weights = "adapter_model.safetensors"
    assert (found / weights).read_bytes() == (folder / weights).read_bytes()
    script = f"""
import os
os.environ.update({server.environment(tmp_path / "clean", READ)!r})
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("user/shared")
assert model.peft_config["default"].base_model_name_or_path == "{BASE}"
assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
"""
    run_without_us(tmp_path, script)


def test_a_card_keeps_what_others_wrote(there, tmp_path):
    server, base = there
    folder = save_lori(tmp_path / "folder", base)
    push_to_hub(folder, "user/shared")
    card = server.files("user/shared")["README.md"].decode()
    card = card.replace("# shared", "# Our adapter\n\nBy hand.").replace("tags:", "tags:\n- ours")
    quoted = "<!-- peft-svdinit holds LoRA adapter: notes.txt, model.safetensors, README.md -->"
    mine = {"README.md": f"{card}\n## Thanks\n{quoted}\n".replace("apache-2.0", "mit").encode()}
    theirs = {"notes.txt": b"kept", "model.safetensors": b"kept too"}
    server.add("user/shared", {**server.files("user/shared"), **mine, **theirs})
    (folder / "lori_mask.safetensors").unlink()
    (folder / "svdinit_config.json").unlink()
    pushed = push_to_hub(folder, "user/shared")
    assert set(pushed.deleted) == {
        "lori_adapter.safetensors", "lori_mask.safetensors", "svdinit_config.json",
    }  # fmt: skip
    files = server.files("user/shared")
    assert theirs.keys() <= files.keys() and not set(pushed.deleted) & files.keys()
    after = files["README.md"].decode()
    assert after.count("# Our adapter\n\nBy hand.") == after.count("## Thanks") == 1
    assert after.count("## Use") == 1 and after.count("peft-svdinit: end") == 1
    metadata = metadata_of(after)
    assert {"ours", "lora", "peft-svdinit"} <= set(metadata["tags"])
    assert metadata["license"] == "mit"


def test_a_repository_made_with_a_licence_keeps_it(there, tmp_path):
    server, base = there
    index = [{"name": name, "results": []} for name in ("one", "two")]
    made = {"license": "llama3", "language": "de", 1: "a", "model-index": index}
    server.add("user/shared", {"README.md": f"\ufeff---\n{yaml.safe_dump(made)}---\n".encode()})
    push_to_hub(save_adapter(tmp_path / "folder", base), "user/shared")
    card = server.files("user/shared")["README.md"].decode()
    assert metadata_of(card).items() >= made.items() and "license_name" not in metadata_of(card)
    assert "# shared" in card


def test_one_repository_holds_one_kind(there, tmp_path):
    server, base = there
    push_to_hub(save_adapter(tmp_path / "folder", base), "user/shared")
    before = server.files("user/shared")
    with pytest.raises(ValueError, match=r"holds a LoRA adapter, and .* a set of SVD factors"):
        push_to_hub(save_adapter_factors(tmp_path / "factors", base), "user/shared")
    assert server.files("user/shared") == before


def test_two_cards_of_others_are_a_question(there, tmp_path):
    server, base = there
    folder = save_adapter(tmp_path / "folder", base)
    (folder / "README.md").write_text("# From the folder\n")
    server.add("user/shared", {"README.md": b"# From the Hub\n"})
    with pytest.raises(ValueError, match="card must say whose"):
        push_to_hub(folder, "user/shared")
    titles: dict[Any, str] = {"hub": "# From the Hub", "folder": "# From the folder"}
    for keep, title in titles.items():
        server.add("user/shared", {"README.md": b"# From the Hub\n"})
        push_to_hub(folder, "user/shared", card=keep)
        card = server.files("user/shared")["README.md"].decode()
        assert title in card and card.count("# From the") == 1 and "## Use" in card


@pytest.mark.parametrize(
    "card",
    [
        "<!-- peft-svdinit: end -->\n",
        "---\ntags: [\n---\n# Title\n",
    ],
)
def test_a_card_that_cannot_be_kept_is_not_replaced(there, tmp_path, card):
    server, base = there
    server.add("user/shared", {"README.md": card.encode()})
    with pytest.raises(ValueError, match="card: "):
        push_to_hub(save_adapter(tmp_path / "folder", base), "user/shared")
    assert server.files("user/shared") == {"README.md": card.encode()}


@pytest.mark.parametrize(
    ("base_model", "message"),
    [
        ("user/typo", "base_model: 'user/typo' is no repository of the Hub that you can see"),
        ("user/base@v9", "base_model: 'user/base@v9' has no such revision"),
        (None, "base_model: the base model is /nowhere/base, a path of this disk"),
    ],
)
def test_a_base_that_nobody_can_load_is_refused(there, tmp_path, base_model, message):
    server, _ = there
    folder = save_adapter(tmp_path / "folder", Path("/nowhere/base"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        push_to_hub(folder, "user/shared", base_model=base_model)
    assert not server.requests("create")


def test_a_tokenizer_is_published_as_it_is(there, tmp_path):
    server, base = there
    folder = save_adapter(tmp_path / "folder", base)
    tokenizer = json.dumps({"model": {"merges": [["~", "/x"], ["/a", "/b"]], "vocab": {"/a/b": 1}}})
    (folder / "tokenizer.json").write_text(tokenizer)
    push_to_hub(folder, "user/shared")
    assert server.files("user/shared")["tokenizer.json"].decode() == tokenizer


def test_a_link_out_of_the_folder_stays_here(there, tmp_path):
    server, base = there
    folder = save_adapter(tmp_path / "folder", base)
    (tmp_path / "secret").write_text("secret")
    for name in ("training_log.csv", "README.md"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "secret")
    pushed = push_to_hub(folder, "user/shared")
    assert pushed.left_out["training_log.csv"] == "a link out of the folder"
    assert "training_log.csv" not in server.files("user/shared")
    assert b"secret" not in server.files("user/shared")["README.md"]


def test_what_would_not_load_is_not_published(there, tmp_path):
    server, base = there
    folder = save_adapter(tmp_path / "folder", base)
    truncate(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="folder: "):
        push_to_hub(folder, "user/shared")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    with pytest.raises(ValueError, match="an adapter of type IA3, only LORA is shared"):
        push_to_hub(folder, "user/shared")
    model = save_pair(tmp_path, sharded=True).tuned_folder
    shard = min(model.glob("model-*"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}"):
        push_to_hub(model, "user/shared", base_model=BASE)
    assert not server.requests("commit")


def test_a_token_that_is_none_is_not_shown(there, tmp_path):
    _, base = there
    with pytest.raises(ValueError, match="token: ") as refused:
        push_to_hub(save_adapter(tmp_path / "f", base), "user/shared", token="hf_secret\n")
    assert "hf_secret" not in str(refused.value) and refused.value.__cause__ is None


def test_a_branch_is_made_and_a_pull_request_opened(there, tmp_path, capsys):
    server, base = there
    folder = save_adapter(tmp_path / "folder", base)
    svdinit(["push", "--folder", str(folder), "--repo_id", "user/shared", "--revision", "next"])
    assert "README.md" not in server.files("user/shared")
    assert LoraAdapter("user/shared@next")
    svdinit(["push", "--folder", str(folder), "--repo_id", "user/shared", "--create_pr"])
    assert LoraAdapter("user/shared@refs/pr/1")
    assert "README.md" not in server.files("user/shared")
    assert "discussions/1" in capsys.readouterr().out


def test_a_pull_request_is_prepared_without_the_right_to_write_to_the_rest(there, tmp_path):
    server, base = there
    server.add("user/shared", {"notes.txt": b""})
    push_to_hub(save_adapter(tmp_path / "folder", base), "user/shared", create_pr=True)
    with server.in_this_process(tmp_path / "other", STRANGER):
        assert push.prepare_repository("user/shared", revision="refs/pr/1") == "user/shared"
        with pytest.raises(PermissionError, match="does not let your token write to it"):
            push.prepare_repository("user/shared", revision="next")
        with pytest.raises(FileNotFoundError, match="'user/shared@refs/pr/9' has no such revision"):
            push.prepare_repository("user/shared", revision="refs/pr/9")


def test_a_lori_adapter_brings_its_compact_form(there, tmp_path):
    server, base = there
    folder = save_lori(tmp_path / "folder", base)
    assert not (folder / "lori_adapter.safetensors").exists()
    push_to_hub(folder, "user/shared")
    assert {"lori_adapter.safetensors", "lori_mask.safetensors"} <= server.files(
        "user/shared"
    ).keys()
    assert not (folder / "lori_adapter.safetensors").exists()


def test_only_files_with_names_that_a_card_can_list_are_shared(tmp_path):
    for name in ("factors.safetensors", "svd_analysis_rank2.json", "svd_analysis_rank -->.json"):
        (tmp_path / name).touch()
    found = recognise(tmp_path)
    assert found.files == ("factors.safetensors", "svd_analysis_rank2.json")
    assert found.left_out == {"svd_analysis_rank -->.json": "no part of it"}


def test_pickles_stay_here(there, tmp_path, capsys):
    server, base = there
    folder = save_adapter(tmp_path / "folder", base)
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-2").mkdir()
    svdinit(["push", "--folder", str(folder), "--repo_id", "user/shared"])
    assert "training_args.bin (a pickle)" in capsys.readouterr().out
    assert "training_args.bin" not in server.files("user/shared")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="folder must be safetensors"):
        push_to_hub(folder, "user/shared")


def test_a_broken_upload_goes_on_where_it_was(there, tmp_path):
    server, base = there
    folder = save_lori(tmp_path / "folder", base)
    server.fail("commit", status=503, times=None, method="POST")
    with pytest.raises(ConnectionError, match=r"the Hub fails \(HTTP 503\) time and again"):
        push_to_hub(folder, "user/shared")
    server.faults.clear()
    sent = [put for put in server.requests("lfs", "PUT") if put.status == 200]
    assert sent and "README.md" not in server.files("user/shared")
    push_to_hub(folder, "user/shared")
    assert [put for put in server.requests("lfs", "PUT") if put.status == 200] == sent


def test_somebody_elses_commit_in_between_is_kept(there, tmp_path, monkeypatch):
    server, base = there
    folder = save_adapter(tmp_path / "folder", base)
    push_to_hub(folder, "user/shared")
    first = server.files("user/shared")
    theirs = first["README.md"] + b"\nWritten meanwhile.\n"
    original, read = push._read_card, []

    def read_card(*of):
        card = original(*of)
        if not read:
            server.add("user/shared", {**first, "README.md": theirs})
        read.append(card)
        return card

    monkeypatch.setattr(push, "_read_card", read_card)
    save_adapter(folder, base, seed=2)
    push_to_hub(folder, "user/shared")
    assert b"Written meanwhile." in server.files("user/shared")["README.md"]
    assert len(read) == 2 and [each.status for each in server.requests("commit")][1] == 412


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/Users/John Smith/runs/x", "x"),
        ("svd_reference:/home/ada/f", "svd_reference:f"),
        ("file:///home/ada/x", "x"),
        ("C:\\Users\\ada\\m", "m"),
        ("~/runs/a(b)/c", "c"),
        ("https://huggingface.co/user/x", None),
        ("user/base", None),
        (r"model\.layers\.\d+", None),
        ("12 / 5 and/or 1/2", None),
    ],
)
def test_of_a_path_the_last_part_is_published(value, expected):
    assert without_paths(value, BaseModel(BASE)) == (expected or value)


def test_a_command_names_the_base_as_others_know_it():
    base = BaseModel(BASE, recorded="of a fine-tune nothing")
    command = (
        "recipes/x.py --model_name_or_path /a/model --evals e=/home/me/e.jsonl --output_dir /o/x"
    )
    expected = f"recipes/x.py --model_name_or_path {BASE} --evals e=e.jsonl --output_dir x"
    assert command_without_paths(command, base) == (expected, ["e=e.jsonl"])
    builtin = (
        "recipes/x.py --model_name_or_path builtin:smollm2-135m  # in a file of options: a: null"
    )
    assert command_without_paths(builtin, base) == (builtin, [])


def test_a_public_repository_gets_nothing_private(there, tmp_path):
    server, base = there
    server.add("user/shared", {"notes.txt": b""})
    with pytest.raises(ValueError, match="private is set, but user/shared exists and is public"):
        push_to_hub(save_adapter(tmp_path / "folder", base), "user/shared", private=True)
    assert server.files("user/shared") == {"notes.txt": b""}


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (None, "user/shared", "does not take your token, or there is none; set HF_TOKEN"),
        ("hf_wrong", "user/shared", "does not take your token, or there is none; set HF_TOKEN"),
        (READ, "user/shared", "does not let your token write to it.*; use a token that may write"),
        (STRANGER, "user/shared", "does not let your token write to it"),
        (WRITE, "not//an id", "is neither a path on this disk nor an id of the Hub"),
    ],
)
def test_who_may_not_write_is_told_before_anything_is_sent(
    there, tmp_path, capsys, token, name, message
):
    server, base = there
    folder = save_adapter(tmp_path / "folder", base)
    given = ["--base_model", BASE] if token == "hf_wrong" else []
    with server.in_this_process(tmp_path / "other", token):
        with pytest.raises(SystemExit):
            svdinit(["push", "--folder", str(folder), "--repo_id", name, *given])
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) <= 2
    assert not server.requests("commit") and "hf_" not in error.replace("HF_", "")
