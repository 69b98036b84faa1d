"""The verbs of `svdinit`, on a tiny adapter and model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.tiny_models import save_pair, tiny_model, trained_adapter

from peft_svdinit import FactorsFile
from peft_svdinit.cli import VERBS, main
from peft_svdinit.factors import LoraAdapter
from peft_svdinit.files import WrongKind


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    trained_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    said = capsys.readouterr()
    assert exit_.value.code == 2 and not said.out
    assert said.err.startswith("svdinit") and said.err.count("\n") == 1
    return said.err


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_options(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0 and "--config" in capsys.readouterr().out


def test_synthesize_analyze_and_export_give_the_adapter_back(adapter, tmp_path, capsys):
    factors, exported = tmp_path / "factors", tmp_path / "exported"
    main(f"synthesize --adapter {adapter} --rank 8 --lora_r 4 --output_dir {factors}".split())
    assert FactorsFile(factors).metadata.source["kind"] == "synthesised"
    assert (factors / "synthesis.png").read_bytes().startswith(b"\x89PNG")
    analysis = f"--plots false --output_dir {tmp_path}/analysis"
    main(f"analyze --factors {factors} --lora_r 2 {analysis}".split())
    report = json.loads((tmp_path / "analysis" / "svd_analysis_rank2.json").read_text())
    assert len(report["layers"]) == len(FactorsFile(factors))
    main(["export", "--factors", str(factors), "--lora_r", "4", "--output_dir", str(exported)])
    ids = torch.arange(12)[None]
    original = PeftModel.from_pretrained(tiny_model(), str(adapter))
    again = PeftModel.from_pretrained(tiny_model(), str(exported))
    assert torch.allclose(original(ids).logits, again(ids).logits, atol=1e-4)
    assert "rank 2 keeps" in capsys.readouterr().out


def test_extract_and_export_a_pair_give_the_tuned_model_back(tmp_path):
    pair = save_pair(tmp_path)
    factors, exported = tmp_path / "factors", tmp_path / "exported"
    source = f"--base {pair.base_folder} --tuned {pair.tuned_folder}"
    exactly = "--save_as factors --rank 16 --lora_r 16 --plots false"
    main(f"extract {source} {exactly} --output_dir {factors}".split())
    base = f"--base {pair.base_folder}"
    main(f"export --factors {factors} --lora_r 16 {base} --output_dir {exported}".split())
    config = json.loads((exported / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    ids = torch.arange(12)[None]
    loaded = PeftModel.from_pretrained(pair.base, str(exported))
    assert torch.allclose(loaded(ids).logits, pair.tuned(ids).logits, atol=1e-4)


def test_env_prints_versions_as_json(capsys):
    main(["env"])
    assert "peft" in json.loads(capsys.readouterr().out)["versions"]


def test_wrong_inputs_get_one_line_and_leave_nothing(adapter, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out")]
    assert "unknown verb 'train'" in refused(["train"], capsys)
    assert "either factors or adapter" in refused(["analyze", *out], capsys)
    assert "noise_share must be in [0, 1)" in refused(
        ["synthesize", "--adapter", str(adapter), "--noise_share", "2", *out], capsys
    )
    assert "at least the adapter's, 4" in refused(
        ["synthesize", "--adapter", str(adapter), "--rank", "2", *out], capsys
    )
    assert "neither" in refused(["synthesize", "--adapter", "nobody/nothing", *out], capsys)
    assert not (tmp_path / "out").exists()


def test_a_truncated_or_non_finite_adapter_is_refused(adapter, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    weights = adapter / "adapter_model.safetensors"
    (broken / weights.name).write_bytes(weights.read_bytes()[:-20])
    out = ["--output_dir", str(tmp_path / "out"), "--plots", "false"]
    assert "truncated" in refused(["extract", "--adapter", str(broken), *out], capsys)
    tensors = load_file(weights)
    name = next(iter(LoraAdapter(adapter)))
    tensors[f"base_model.model.{name}.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, broken / weights.name)
    assert f"layer {name} has NaN" in refused(["extract", "--adapter", str(broken), *out], capsys)
    assert not (tmp_path / "out").exists()


READS = {
    "synthesize --adapter WRONG": "adapter",
    "synthesize --adapter ADAPTER --base WRONG": "base",
    "extract --adapter WRONG": "adapter",
    "extract --base WRONG --tuned MODEL": "base",
    "extract --base MODEL --tuned WRONG": "tuned",
    "resize --rank 2 --adapter WRONG": "adapter",
    "merge --adapter ADAPTER WRONG": "adapter",
    "analyze --factors WRONG": "factors",
    "analyze --adapter WRONG": "adapter",
    "analyze --base WRONG --tuned MODEL": "base",
    "analyze --base MODEL --tuned WRONG": "tuned",
    "mask --source magnitude --adapter WRONG": "adapter",
    "mask --source teacher --rank 2 --factors WRONG": "factors",
    "mask --source random --adapter ADAPTER --exclude WRONG": "exclude",
    "mask --show WRONG": "show",
    "export --factors WRONG": "factors",
    "export --adapter WRONG": "adapter",
    "compare --runs WRONG": "runs",
}


@pytest.mark.parametrize(("command", "option"), READS.items())
def test_a_wrong_path_is_refused_by_the_option_that_was_typed(
    command, option, adapter, pair, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("text")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    torch.save([], tmp_path / "pickle.bin")
    wanted = "output" if command.split()[0] in ("mask", "merge", "resize") else "output_dir"
    command = command.replace("ADAPTER", str(adapter)).replace("MODEL", str(pair.base_folder))
    for wrong in ("missing", "empty", "text", "bad.safetensors", "pickle.bin"):
        argv = command.replace("WRONG", str(tmp_path / wrong)).split()
        said = refused([*argv, f"--{wanted}", str(tmp_path / "out")], capsys)
        assert said.startswith(f"svdinit {argv[0]}: error: --{option}"), said
        assert "svd_factors" not in said and "lori_mask:" not in said
    assert not (tmp_path / "out").exists()


MODELS = (
    "synthesize --adapter ADAPTER --base builtin:none",
    "extract --base builtin:none --tuned MODEL",
    "extract --base MODEL --tuned builtin:none",
    "extract --adapter ADAPTER --base builtin:none",
    "analyze --base builtin:none --tuned MODEL",
    "analyze --base MODEL --tuned builtin:none",
    "analyze --adapter ADAPTER --base builtin:none",
)


@pytest.mark.parametrize("command", MODELS)
def test_every_option_of_a_model_knows_builtin_names(command, adapter, tmp_path, capsys):
    words = command.split()
    option = words[words.index("builtin:none") - 1]
    command = command.replace("ADAPTER", str(adapter)).replace("MODEL", str(tmp_path))
    output = "--output" if words[0] == "mask" else "--output_dir"
    said = refused([*command.split(), output, str(tmp_path / "out")], capsys)
    assert f"error: {option}: unknown built-in model 'builtin:none'" in said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("synthesize --adapter ADAPTER --lora_r 0", "--lora_r must be at least 1, got 0"),
        ("analyze --adapter ADAPTER --lora_r 0", "--lora_r must be at least 1, got 0"),
        ("analyze --base a --tuned b --rank 0 --lora_r 1", "--rank must be at least 1, got 0"),
        ("export --factors a --lora_r 0", "--lora_r must be at least 1, got 0"),
        ("extract --base a --tuned b --max_bytes 1", "--max_bytes must be at least 4"),
        ("extract --base MODEL --tuned TUNED --max_bytes 8", "--max_bytes=8 are 2 parameters"),
        ("extract --base MODEL --tuned TUNED --target_modules (", "--target_modules: '(' is no"),
        ("extract --base a --tuned b --energy 2", "--energy must be in (0, 1], got 2.0"),
    ],
)
def test_a_wrong_number_is_refused_by_the_option_that_was_typed(
    command, message, adapter, pair, tmp_path, capsys
):
    command = command.replace("ADAPTER", str(adapter))
    command = command.replace("MODEL", str(pair.base_folder))
    command = command.replace("TUNED", str(pair.tuned_folder))
    assert f"error: {message}" in refused(
        [*command.split(), "--output_dir", str(tmp_path / "out")], capsys
    )


def test_a_file_in_place_of_an_output_folder_is_refused_before_any_work(
    adapter, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    itself = tmp_path / "itself"
    itself.symlink_to(itself)
    monkeypatch.setattr(LoraAdapter, "__init__", lambda *_: pytest.fail("work was done"))
    for verb, adapters, option in (
        ("synthesize", adapter, "output_dir"),
        ("extract", adapter, "output_dir"),
        ("analyze", adapter, "output_dir"),
        ("export", adapter, "output_dir"),
        ("mask --source random", adapter, "output"),
        ("merge", f"{adapter} {adapter}", "output"),
    ):
        for output in (tmp_path / "file", tmp_path / "file" / "below"):
            argv = f"{verb} --adapter {adapters} --{option} {output}".split()
            said = refused(argv, capsys)
            assert f"--{option} must be a folder, but {tmp_path / 'file'} is a file" in said
        argv = f"{verb} --adapter {adapters} --{option} {itself}".split()
        assert f"--{option} must be a folder, but {itself} cannot be followed" in refused(
            argv, capsys
        )


NOTHING: Any = None


@pytest.mark.parametrize(
    "fault",
    [
        lambda: len(NOTHING),
        lambda: torch.zeros(2) + torch.zeros(3),
        lambda: torch.zeros(2).view(NOTHING),
        lambda: {}["missing"],
    ],
)
def test_a_fault_of_the_program_shows_its_traceback(fault, monkeypatch):
    monkeypatch.setitem(VERBS, "env", (VERBS["env"][0], lambda options: fault()))
    with pytest.raises(Exception) as caught:
        main(["env"])
    assert not isinstance(caught.value, SystemExit)


@pytest.mark.parametrize("kind", [WrongKind, ValueError, FileNotFoundError, ModuleNotFoundError])
def test_what_is_raised_on_purpose_is_one_line(kind, monkeypatch, capsys):
    def run(options):
        try:
            len(options)
        except TypeError as error:
            raise kind("wrong\ninput") from error

    monkeypatch.setitem(VERBS, "env", (VERBS["env"][0], run))
    assert refused(["env"], capsys) == "svdinit env: error: wrong input\n"


def test_a_terminal_obeys_no_name(tmp_path, capsys):
    layer = "lora_unet_q\x1b[2J\nAdapter: elsewhere\u202e"
    shapes = {"lora_up": (6, 2), "lora_down": (2, 5)}
    tensors = {f"{layer}.{part}.weight": torch.ones(shape) for part, shape in shapes.items()}
    save_file(tensors, tmp_path / "named.safetensors")
    written = str(tmp_path / "out.safetensors")
    options = ["--output", written, "--rank", "1", "--adapter"]
    main(["resize", *options, str(tmp_path / "named.safetensors")])
    said = capsys.readouterr().out
    assert r"q\x1b[2J Adapter: elsewhere\u202e" in said and "\x1b" not in said
    assert said.count("\nAdapter: ") == 1
    assert r"there\x1b[2J" in refused(["resize", *options, "not/there\x1b[2J"], capsys)
