"""Training arguments that transformers takes and no training can have."""

from __future__ import annotations

import pytest

from peft_svdinit.training import RecipeArguments, parse_options


def parsed(argv: list[str], tmp_path) -> RecipeArguments:
    given = ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", *argv]
    return parse_options([RecipeArguments], given, description="", prog="train")[0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--per_device_train_batch_size", "0"], "must be at least 1, got 0"),
        (["--gradient_accumulation_steps", "-1"], "must be at least 1, got -1"),
        (["--max_steps", "0"], "must be at least 1, or -1 for --num_train_epochs, got 0"),
        (["--learning_rate", "0"], "must be above 0, got 0.0"),
        (["--eval_steps", "-1"], "must be above 0, got -1.0"),
        (["--weight_decay", "-0.1"], "must be at least 0, got -0.1"),
        (["--adam_beta2", "1"], "must be in [0, 1), got 1.0"),
        (["--seed", "-1"], "must be in 0..4294967295, got -1"),
        (["--data_seed", str(2**32)], "must be in 0..4294967295, got 4294967296"),
        (["--include_num_input_tokens_seen", "al"], "got 'al'; did you mean all?"),
        (["--torch_compile_backend", "inducto"], "did you mean inductor?"),
        (["--label_names", "label"], "must be labels, which is what the examples have"),
        (["--metric_for_best_model", "accuracy"], "must be one of loss, eval_loss"),
        (["--lr_scheduler_kwargs", "fast"], "must be a mapping in a file of options, or JSON"),
        (["--lr_scheduler_kwargs", "{1: 2}"], "must be JSON: Expecting"),
        (["--accelerator_config", "lost.json"], "there is none at 'lost.json'"),
        (["--accelerator_config", '{"split": true}'], "transformers cannot read it"),
        (["--optim_args", "fast"], "--optim=adamw_torch_fused and --optim_args='fast': not enough"),
        (["--report_to", "tensorbord"], "tensorbord is not supported, only"),
    ],
)
def test_what_no_training_can_have_is_one_clear_line(argv, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        parsed(argv, tmp_path)
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.count("\n") == 1
    assert argv[0][2:] in said and says in said, said


def test_a_schedule_is_made_once_before_it_is_needed(tmp_path, capsys):
    schedule = ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs"]
    assert parsed([*schedule, '{"num_cycles": 2}'], tmp_path).lr_scheduler_kwargs
    with pytest.raises(SystemExit):
        parsed([*schedule, '{"cycles": 2}'], tmp_path)
    assert "--lr_scheduler_kwargs: TypeError: get_cosine" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/run", "locked/run", "{long}"])
def test_an_output_that_cannot_be_is_refused_and_none_is_made(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    # The administrator may write everywhere.
    monkeypatch.setattr("os.access", lambda path, mode: path.name != "locked")
    output = tmp_path / place.format(long=300 * "x")
    with pytest.raises(SystemExit):
        parsed(["--output_dir", str(output)], tmp_path)
    assert "error: --output_dir: " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "locked"}
