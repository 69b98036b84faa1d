"""What the verbs that write an adapter's folder may replace, keep and never touch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lori_fixtures import lori_model, saved_compact
from support.peft_fixtures import teacher_factors
from support.tiny_models import save_pair, tiny_model, trained_adapter

from peft_svdinit.adapters import (
    AdapterForm,
    export_adapter,
    extract_adapter,
    merge,
    output_folder,
    resize,
    write_stock_adapter,
)
from peft_svdinit.factors import CheckpointPair, LoraAdapter, RankRule
from peft_svdinit.masks import load_compact

Write = Callable[[Path], object]
VERBS = ["resize", "merge", "export", "export_compact", "extract"]


def inputs_of(verb: str, folder: Path) -> Write:
    """What writes an adapter to a folder, with inputs in `folder`."""
    if verb == "export":
        factors = teacher_factors(tiny_model(), ["q_proj"])
        return lambda output: export_adapter(factors, 2, output)
    if verb == "extract":
        saved = save_pair(folder)
        pair = CheckpointPair(saved.base_folder, saved.tuned_folder)
        form = AdapterForm(verify="none")
        return lambda output: extract_adapter(
            pair, output, RankRule(rank=2), form, base_model_name_or_path="tiny"
        )
    if verb == "export_compact":
        compact = load_compact(saved_compact(lori_model(), folder))
        return lambda output: write_stock_adapter(compact, output)
    one, two = folder / "one", folder / "two"
    for seed, adapter in enumerate((one, two)):
        trained_adapter(adapter, seed=seed)
    if verb == "merge":
        return lambda output: merge([one, two], output)
    return lambda output: resize([one], output, RankRule(rank=2))


@pytest.fixture(params=VERBS)
def write(request, tmp_path: Path) -> Write:
    (tmp_path / "inputs").mkdir()
    return inputs_of(request.param, tmp_path / "inputs")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Alone in its folder, where a half-written result would be seen."""
    return tmp_path / "outputs" / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")


def nothing_beside(out: Path) -> bool:
    return [path.name for path in out.parent.iterdir() if path.suffix != ".partial"] == [out.name]


ALIEN = {
    "checkpoint-1": ["checkpoint-1/adapter_config.json"],
    "run.json": ["run.json"],
    "training_log.csv": ["training_log.csv"],
    "training_args.bin": ["training_args.bin"],
    "tokenizer.json": ["tokenizer.json"],
    ".git": [".git/HEAD", "README.md", ".gitattributes"],
    "second": ["second/adapter_config.json", "second/adapter_model.safetensors"],
    "lori_adapter.safetensors": ["lori_adapter.safetensors"],
    "notes.txt": ["notes.txt"],
}


@pytest.mark.parametrize("entry", ALIEN)
def test_a_folder_with_anything_but_a_result_is_left_as_it_is(write, out, monkeypatch, entry):
    write(out)
    fill(out, *ALIEN[entry])
    before = content(out)
    monkeypatch.setattr(output_folder.OutputFolder, "replacing", None)  # Before any work.
    said = rf"output(_dir)?: .*out holds {entry}, .* would delete; choose a new folder"
    with pytest.raises(ValueError, match=said):
        write(out)
    assert content(out) == before
    assert nothing_beside(out)


def test_what_was_trained_is_left_as_it_is(write, out):
    run = ["checkpoint-1/optimizer.pt", "run.json", "training_log.csv", "training_args.bin"]
    sidecar = ["svdinit_config.json", "lori_mask.safetensors"]
    for beside in ([], sidecar, run):
        trained_adapter(out)
        fill(out, *beside)
        before = content(out)
        with pytest.raises(ValueError, match=r"holds \S+, which this command did not write"):
            write(out)
        assert content(out) == before


@pytest.mark.parametrize("lone", ["adapter_model.safetensors", "lori_mask.safetensors"])
def test_a_part_of_an_adapter_without_its_configuration_is_left_as_it_is(write, out, lone):
    fill(out, lone, "README.md")
    before = content(out)
    with pytest.raises(ValueError, match=f"holds {lone}"):
        write(out)
    assert content(out) == before


def test_a_file_is_no_output_folder(write, out):
    fill(out.parent, "out")
    with pytest.raises(ValueError, match=r"output(_dir)? must be a folder, but .*out is a file"):
        write(out)
    assert out.read_text() == "mine: out"


def test_a_new_an_empty_and_the_own_folder_are_written_alike(write, out):
    write(out)
    first = content(out)
    assert LoraAdapter(out) and "README.md" not in first
    write(out)
    empty = out.with_name("empty")
    empty.mkdir()
    write(empty)
    for folder in (out, empty):
        assert content(folder).keys() == first.keys()
        weights = content(folder)["adapter_model.safetensors"]
        assert weights == first["adapter_model.safetensors"]


def test_what_peft_and_the_hub_put_beside_an_adapter_is_kept(write, out):
    write(out)
    (out / "README.md").write_text("# mine\n")
    fill(out, ".gitattributes")
    (out / "README.md").chmod(0o600)
    write(out)
    assert (out / "README.md").read_text() == "# mine\n"
    assert (out / "README.md").stat().st_mode & 0o777 == 0o600
    assert (out / ".gitattributes").read_text() == "mine: .gitattributes"
    new = out.with_name("new")
    write(new)
    assert content(out).keys() - content(new).keys() == {"README.md", ".gitattributes"}
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (new / weights).read_bytes()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_replaces_what_any_other_wrote(verb, tmp_path):
    for writer in VERBS:
        (tmp_path / writer).mkdir()
    writes = {name: inputs_of(name, tmp_path / name) for name in {verb, *VERBS}}
    for other in VERBS:
        writes[other](tmp_path / "out")
        writes[verb](tmp_path / "out")
        writes[verb](tmp_path / "new")
        assert content(tmp_path / "out").keys() == content(tmp_path / "new").keys()


def just_before_the_rename(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Let `act` happen when an adapter is all written, and before it takes its folder."""
    plain = output_folder.OutputFolder.replacing

    @contextmanager
    def late(self):
        with plain(self) as temporary:
            yield temporary
            if self.path.name == "out":
                act()

    monkeypatch.setattr(output_folder.OutputFolder, "replacing", late)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("appears", ["run.json", "checkpoint-1/optimizer.pt"])
def test_what_appears_during_the_work_is_not_deleted(write, out, monkeypatch, appears, existing):
    if existing:
        write(out)
    just_before_the_rename(monkeypatch, lambda: fill(out, appears))
    with pytest.raises(ValueError, match=f"holds {appears.split('/')[0]}"):
        write(out)
    assert (out / appears).read_text() == f"mine: {appears}"
    assert ("adapter_config.json" in content(out)) == existing
    assert nothing_beside(out)


@pytest.mark.parametrize("existing", [False, True])
def test_an_adapter_that_another_process_saves_meanwhile_is_not_deleted(
    write, out, monkeypatch, existing
):
    if existing:
        write(out)
    just_before_the_rename(monkeypatch, lambda: trained_adapter(out, seed=2))
    with pytest.raises(
        ValueError,
        match=r"was changed while the adapter was made|holds README|holds adapter_config",
    ):
        write(out)
    assert nothing_beside(out)
    found = LoraAdapter(out)
    trained_adapter(out.with_name("expected"), seed=2)
    for name, layer in LoraAdapter(out.with_name("expected")).items():
        assert torch.equal(found[name].lora_B, layer.lora_B)


def test_a_readme_that_is_edited_during_the_work_is_kept_as_edited(write, out, monkeypatch):
    write(out)
    just_before_the_rename(monkeypatch, lambda: fill(out, "README.md"))
    write(out)
    assert (out / "README.md").read_text() == "mine: README.md"


def test_a_link_leads_to_the_folder_that_is_written(write, out):
    real = out.with_name("real")
    write(real)
    first = (real / "adapter_config.json").stat().st_ino
    out.symlink_to(real)
    write(out)
    assert out.is_symlink() and (real / "adapter_config.json").stat().st_ino != first
