"""Options from a file and the command line, and what a wrong one is answered with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from peft_svdinit.training import parse_options

HUGE = "1" + 400 * "0"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Adapter:
    """Every kind of field that recipes use."""

    _argument_group_name = "adapter"

    base: str = field(metadata={"help": "required"})
    lora_r: int = field(default=8, metadata={"help": "rank, at most 100%% of the width"})
    share: float = field(default=0.5, metadata={"help": "a share"})
    modules: list[str] = field(default_factory=lambda: ["q", "v"], metadata={"help": "names"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds"})
    name: str | None = field(default=None, metadata={"help": "text or nothing"})
    limit: int | None = field(default=None, metadata={"help": "number or nothing"})
    start: Literal["delta", "subspace"] = field(default="delta", metadata={"help": "a choice"})
    colour: Colour = field(default=Colour.RED, metadata={"help": "an enum"})
    balanced: bool = field(default=False, metadata={"help": "off by default"})
    verified: bool = field(default=True, metadata={"help": "on by default"})
    folder: Path = field(default=Path("runs"), metadata={"help": "a path"})

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1,\n got {self.lora_r}")


def parse(argv: list[str], *classes: type) -> Any:
    return parse_options(classes or (Adapter,), argv, description="Trains.", prog="train")


@pytest.fixture
def config(tmp_path):
    """Writes options to a file and returns the arguments that read it."""

    def write(options: Any, suffix: str = ".yaml") -> list[str]:
        path = tmp_path / f"options{suffix}"
        text = options if isinstance(options, str) else yaml.safe_dump(options)
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


@pytest.fixture
def refusal(capsys):
    """Parses what must be refused and returns the one line that says why."""

    def refused(argv: list[str], *classes: type) -> str:
        with pytest.raises(SystemExit) as exit_:
            parse(argv, *classes)
        assert exit_.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("train: error: ") and output.err.count("\n") == 1
        return output.err

    return refused


def test_the_command_line_overrides_the_file_which_overrides_the_default(config):
    argv = config({"base": "b", "lora_r": 4, "modules": ["k"], "share": 0.25, "limit": None})
    (options,) = parse([*argv, "--lora_r", "2", "--seeds", "1", "2"])
    assert (options.base, options.lora_r, options.modules) == ("b", 2, ["k"])
    assert (options.share, options.limit, options.start) == (0.25, None, "delta")
    assert options.seeds == [1, 2]


def test_a_file_value_equal_to_no_default_survives_an_absent_flag(config):
    (options,) = parse(config({"base": "b", "verified": False, "balanced": True}))
    assert (options.verified, options.balanced) == (False, True)
    (options,) = parse([*config({"base": "b", "verified": False}), "--verified", "--balanced"])
    assert (options.verified, options.balanced) == (True, True)
    (options,) = parse(["--base", "b", "--no_verified"])
    assert options.verified is False


def test_a_file_says_what_no_command_line_can(config):
    argv = config({"base": "b", "modules": [], "limit": None, "share": -1e-05, "seeds": [-3]})
    (options,) = parse([*argv, "--limit", "3"])
    assert (options.modules, options.limit, options.share) == ([], 3, -1e-05)
    argv = config("output_dir: null\nsave_total_limit: null\noptim_target_modules: [a, b]\n")
    (training,) = parse(argv, TrainingArguments)
    assert (training.save_total_limit, training.optim_target_modules) == (None, ["a", "b"])


def test_json_and_yaml_files_give_the_same(config):
    values = {"base": "b", "share": 1e-4, "colour": "blue", "folder": "x", "start": "subspace"}
    assert parse(config(json.dumps(values), ".json")) == parse(config(values))


def test_an_empty_file_changes_nothing(config):
    assert parse([*config(""), "--base", "b"]) == parse(["--base", "b"])


def test_yaml_text_becomes_the_number_it_means(config):
    (options,) = parse(config("base: b\nshare: 1e-4\nlora_r: 1e1\nseeds: ['3', 2.0]\n"))
    assert options.share == 1e-4 and isinstance(options.share, float)
    assert options.lora_r == 10 and isinstance(options.lora_r, int)
    assert options.seeds == [3, 2]


whole_numbers = st.integers(-(2**63) + 1, 2**63 - 1)


@given(
    st.fixed_dictionaries(
        {
            "lora_r": st.integers(min_value=1, max_value=2**63 - 1),
            "share": st.floats(allow_nan=False, allow_infinity=False),
            "name": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
            "limit": st.none() | whole_numbers,
            "modules": st.lists(st.from_regex(r"[a-z.]+", fullmatch=True), min_size=1),
            "seeds": st.lists(whole_numbers, min_size=1),
            "verified": st.booleans(),
        }
    ),
    st.sampled_from([".yaml", ".json"]),
)
def test_what_a_file_says_arrives_unchanged(tmp_path_factory, values, suffix):
    path = tmp_path_factory.mktemp("options") / f"options{suffix}"
    text = yaml.safe_dump(values) if suffix == ".yaml" else json.dumps(values)
    path.write_text(text, encoding="utf-8")
    (options,) = parse(["--base", "b", "--config", str(path)])
    assert {name: getattr(options, name) for name in values} == values


def test_training_arguments_work_beside_own_classes(config, tmp_path):
    argv = config(
        "base: b\nlearning_rate: 1e-4\noutput_dir: o\nreport_to: none\nuse_cpu: true\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\ninclude_num_input_tokens_seen: all\n"
        "eval_strategy: 'no'\nsave_strategy: steps\n"
    )
    options, training = parse([*argv, "--max_steps", "3"], Adapter, TrainingArguments)
    assert options.base == "b"
    assert (training.learning_rate, training.max_steps) == (1e-4, 3)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert training.include_num_input_tokens_seen == "all"
    assert (training.eval_strategy, training.output_dir) == ("no", "o")


def test_help_shows_the_description_and_a_group_per_class(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"], Adapter, TrainingArguments)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for part in ("Trains.", "\nadapter:\n", "\nconfiguration:\n", "--lora_r", "--learning_rate"):
        assert part in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "required: --base"),
        (["--bse", "b"], "unknown option --bse; did you mean --base?"),
        (["--lora_r=4", "--modulse=q"], "unknown option --modulse; did you mean --modules?"),
        (["--lora", "4"], "unknown option --lora; did you mean --lora_r?"),
        (["--xyzzy"], "unknown option --xyzzy; --help lists"),
        (["config.yaml", "--base", "b"], "unexpected argument 'config.yaml'"),
        (["--base", "b", "--lora_r", "many"], "--lora_r"),
        (["--base", "b", "--start", "deltas"], "invalid choice: 'deltas'"),
        (["--base", "b", "--lora_r", "0"], "error: --lora_r must be at least 1, got 0"),
        (["--base", "b", "--share", "nan"], "error: --share must be a finite number, got nan"),
        (["--base", "b", "--share=-inf"], "error: --share must be a finite number, got -inf"),
        (["--base", "b", "--limit", HUGE], "--limit must be a number of at most 63 bits"),
        (["--base", "b", "--seeds", "1", HUGE], "--seeds must be a number of at most 63 bits"),
        (["--base", "b", "--name", ""], "error: --name must not be empty: give a value, or leave"),
        (["--base", "b", "--modules", "q", ""], "error: --modules must not be empty"),
        (["--base", "~nobody.here/b"], "the home of a user that is not on this machine"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(argv, expected, refusal):
    assert expected in refusal(argv)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("lora-r: 4", "unknown option 'lora-r'; did you mean lora_r?"),
        ("3: 4", "unknown option 3"),
        ("lora_r: many", "options.yaml: argument --lora_r/--lora-r: invalid int value: 'many'"),
        ("lora_r: 1.5", "argument --lora_r/--lora-r: invalid int value: '1.5'"),
        ("lora_r: true", "lora_r must be a whole number, got True"),
        ("lora_r:", "lora_r must be a whole number, got None"),
        ("lora_r: .inf", "options.yaml: lora_r must be a finite number, got inf"),
        ("share: .nan", "options.yaml: share must be a finite number, got nan"),
        (f"lora_r: {HUGE}", "options.yaml: lora_r must be a number of at most 63 bits, got one of"),
        ("lora_r: 010", "the number 010 is read in two ways; write it in full"),
        ("lora_r: 1:30", "the number 1:30 is read in two ways"),
        ("lora_r: 1\nlora_r: 2", "options.yaml: --config is not valid YAML: it has 'lora_r' 2 tim"),
        ("seeds: [&x 1, *x]", "*x stands for what is written elsewhere, write it out, in line 1"),
        (f"seeds: {'[' * 2000}{']' * 2000}", "options.yaml: --config is nested too deeply"),
        ("base: !!python/name:os.system", "python/name:os.system', in line 1"),
        ('name: "a\\0b"', "options.yaml: name must not have a null character"),
        ("name: ''", "options.yaml: name must not be empty"),
        ("share: half", "argument --share: invalid float value: 'half'"),
        ("limit: [1]", "limit must be a whole number, got [1]"),
        ("name: 1.10", "name must be text in quotes, got 1.1"),
        ("name: no", "name must be text in quotes, got False"),
        ("verified: perhaps", "argument --verified: Truthy value expected: got perhaps"),
        ("modules: q", "modules must be a list, got 'q'"),
        ("folder: {a: 1}", "folder must be a path in quotes, got {'a': 1}"),
        ("name: {a: 1}", "name must be text in quotes, got {'a': 1}"),
        ("modules: [q, 1]", "modules must be text in quotes, got ['q', 1]"),
        ("start: deltas", "argument --start: invalid choice: 'deltas'"),
        ("colour: green", "argument --colour: invalid choice: 'green'"),
        ("folder: 3", "folder must be a path in quotes, got 3"),
        ("lora_r: 0", "error: --lora_r must be at least 1, got 0"),
        ("- base", "must map names of options to values"),
        ("base: [", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_clear_line(content, expected, config, refusal):
    argv = config(content)
    line = refusal([*argv, "--base", "b"])
    assert expected in line
    assert "__post_init__" not in line


def test_a_file_that_cannot_be_read_is_one_clear_line(config, refusal, tmp_path):
    assert "No such file" in refusal(["--config", str(tmp_path / "absent.yaml")])
    assert "must end in .json, .yaml, .yml" in refusal(config("base: b", ".toml"))
    (tmp_path / "latin.yaml").write_bytes("base: ä".encode("latin-1"))
    assert "--config is no text in UTF-8" in refusal(["--config", str(tmp_path / "latin.yaml")])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "--config is not valid JSON: Expecting"),
        ('{"lora_r": 1, "lora_r": 2}', "--config is not valid JSON: it has 'lora_r' 2 times"),
        ('{"share": NaN}', "--config is not valid JSON: NaN is no number that JSON has"),
        ('{"share": 1e999}', "share must be a finite number, got inf"),
        (f'{{"seeds": {"[" * 100_000}{"]" * 100_000}}}', "--config is nested too deeply"),
        ('{"name": "\\ud800"}', "name must be text of whole characters"),
        ("null", "must map names of options to values"),
    ],
)
def test_a_wrong_json_file_is_one_clear_line(content, expected, config, refusal):
    assert expected in refusal(config(content, ".json"))


def test_an_error_of_training_arguments_is_one_clear_line(config, refusal):
    argv = config("output_dir: o\neval_strategy: sometimes")
    assert "sometimes" in refusal(argv, TrainingArguments)
