"""`svdinit merge`: options, what it prints, and one line for a wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.tiny_models import rewrite_tensors, trained_adapter

from peft_svdinit.cli import main

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapters(tmp_path: Path) -> list[str]:
    for seed, name in enumerate("abc"):
        trained_adapter(tmp_path / name, seed=seed)
    return [str(tmp_path / name) for name in "abc"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["merge", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_merge_prints_ranks_the_error_and_every_pair(tmp_path, adapters, capsys):
    output = tmp_path / "merged"
    main(["merge", "--adapter", *adapters, "--output", str(output), "--weights", *["0.4"] * 3])
    printed = capsys.readouterr().out
    report = json.loads((output / "merge_report.json").read_text())
    assert report["method"]["name"] == "cat" and report["weights"] == [0.4, 0.4, 0.4]
    assert "6 layers, rank 12" in printed
    assert f"relative error {report['totals']['relative_error']:.2e}" in printed
    for pair in report["pairs"]:
        line = f"{pair['adapters'][0] + 1}, {pair['adapters'][1] + 1} "
        found = next(row for row in printed.splitlines() if row.startswith(line))
        assert f"{pair['cosine']:+.2g}" in found and f"{pair['random_cosine']:.2g}" in found
    worst = max(report["layers"], key=lambda layer: layer["relative_error"])
    assert worst["name"] in printed
    assert printed.rstrip().endswith(f"Adapter: {output}")


def test_the_options_reach_the_method(tmp_path, adapters, capsys):
    arguments = ["--adapter", *adapters[:2], "--method", "dare_ties", "--density", "0.5"]
    arguments += ["--majority_sign_method", "frequency", "--dtype", "bfloat16"]
    found = []
    for seed in ("1", "2"):
        output = tmp_path / f"seed{seed}"
        main(["merge", *arguments, "--seed", seed, "--output", str(output)])
        report = json.loads((output / "merge_report.json").read_text())
        assert report["method"] == {
            "name": "dare_ties",
            "rank": None,
            "density": 0.5,
            "majority_sign_method": "frequency",
            "seed": int(seed),
        }
        assert report["dtypes"] == {"bfloat16": 6} and report["weights"] == [1.0, 1.0]
        found.append(load_file(output / WEIGHTS))
    assert any((found[0][key] != found[1][key]).any() for key in found[0])
    capsys.readouterr()
    svd = tmp_path / "svd"
    main(["merge", "--adapter", *adapters, "--method", "svd", "--rank", "2", "--output", str(svd)])
    assert "6 layers, rank 2" in capsys.readouterr().out


def test_adapters_that_share_A_are_told_of_the_smaller_exact_merge(tmp_path, adapters, capsys):
    first = {k: v for k, v in load_file(Path(adapters[0]) / WEIGHTS).items() if "lora_A" in k}
    rewrite_tensors(Path(adapters[1]) / WEIGHTS, lambda tensors: tensors.update(first))
    merge = ["merge", "--adapter", *adapters[:2], "--output", str(tmp_path / "m")]
    main(merge)
    printed = capsys.readouterr().out
    assert "method shared is exact at the rank of one adapter" in printed
    assert "100.0%" in printed  # of the entries of B
    main([*merge, "--method", "shared"])
    printed = capsys.readouterr().out
    assert "6 layers, rank 4" in printed and "method shared" not in printed


def test_adapters_left_out_and_layers_of_some_are_mentioned(tmp_path, adapters, capsys):
    trained_adapter(Path(adapters[1]), target_modules=["q_proj"])
    options = ["--output", str(tmp_path / "m"), "--weights", "1", "1", "0"]
    main(["merge", "--adapter", *adapters, *options])
    printed = capsys.readouterr().out
    assert f"Left out, for their weight is 0: {adapters[2]}." in printed
    assert "4 layers are in some of the adapters only" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "0.5"], "density is for ties"),
        (["--method", "svd"], "method svd needs rank"),
        (["--method", "ties"], "method ties needs density"),
        (["--method", "linear", "--rank", "4"], "rank is for svd"),
        (["--weights", "1", "2"], "weights must be one per adapter, got 2 for 3"),
        (["--method", "mean"], "invalid choice"),
        (["--densty", "0.5"], "densty"),
        (["--method", "shared"], "layer model.layers.0.mlp.down_proj: method shared needs one"),
    ],
)
def test_a_wrong_input_is_one_line_and_writes_nothing(tmp_path, adapters, capsys, options, message):
    arguments = ["--adapter", *adapters, "--output", str(tmp_path / "m"), *options]
    assert message in refused(arguments, capsys)
    assert not (tmp_path / "m").exists()
