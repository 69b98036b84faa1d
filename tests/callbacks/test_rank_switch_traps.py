"""Where a switch to low rank went wrong in silence, or late: each way once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.small_forms import registered_small_form
from support.switching_runs import (
    differences,
    logged,
    make_trainer,
    plain_optimizer,
    train,
    wide_model,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from peft_svdinit.low_rank import (
    LowRankPlan,
    LowRankRule,
    PlannedLayer,
    factorize_,
    is_low_rank,
    low_rank_layers,
    make_plan,
    save_small_form,
)
from trainer_callbacks import (
    AtStep,
    LossPlateau,
    LowRankCheckpointsCallback,
    RankSwitchCallback,
    StableRankPlateau,
)
from trainer_callbacks.reducer import check_reducer

RULE, LOWER = LowRankRule(ratio=0.25), LowRankRule(ratio=0.13)
NEVER = LowRankRule(energy=0.9999)


def switch(at: Any = 3, rule: Any = RULE, **options: Any) -> RankSwitchCallback:
    return RankSwitchCallback(rule, AtStep(at), **options)


def test_a_stage_that_fits_nothing_is_passed_over_for_good(tmp_path, caplog):
    def stages():
        return switch(2, shrink=[(AtStep(4), RULE), (AtStep(6), LOWER)])

    first = stages()
    whole = train(tmp_path / "whole", first)
    assert first.switched_at == [2, 6]
    assert "kept its ranks: no layer of low rank gets a lower rank by this rule, at" in caplog.text
    for step in (3, 5):
        checkpoint = tmp_path / f"whole/checkpoint-{step}"
        assert not differences(whole, train(tmp_path / str(step), stages(), resume=checkpoint))


def test_lower_ranks_wait_for_a_switch_that_fits_nothing(tmp_path, caplog):
    narrow = LowRankRule(energy=0.9999, target_modules=["q_proj"])
    callback = switch(2, narrow, shrink=[(AtStep(4), LOWER)])
    trainer = train(tmp_path, callback)
    assert not callback.switches and not low_rank_layers(trainer.model)  # pyright: ignore
    assert "has no layer of low rank that could be shrunk, at step 4" in caplog.text


def test_averages_are_not_overwritten_by_the_best_model(tmp_path):
    class Average(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            average.update_parameters(kwargs["model"])

        def on_evaluate(self, args, state, control, **kwargs):
            kwargs["metrics"]["eval_loss"] = abs(state.global_step - 4)

        def on_log(self, args, state, control, **kwargs):
            seen.append({n: p.clone() for n, p in average.module.named_parameters()})

    model, seen = wide_model(), []
    average = AveragedModel(model)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = train(tmp_path, switch(averaged_models=[average]), Average(), model=model, **best)
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-4")
    assert all(torch.equal(p, seen[-1][n]) for n, p in average.module.named_parameters())


def test_each_plateau_is_one_since_the_switch_before_it(tmp_path):
    plateau = LossPlateau(patience=1, min_delta=0.9)
    callback = RankSwitchCallback(RULE, plateau, shrink=[(plateau, LOWER)])
    train(tmp_path / "loss", callback, max_steps=9)
    # Two values are logged before the step in which the third is; the log of that step is before.
    assert callback.switched_at == [3, 6]
    settled = StableRankPlateau(window=1, tolerance=100.0)
    callback = RankSwitchCallback(RULE, settled, shrink=[(settled, LOWER)])
    train(tmp_path / "ranks", callback, max_steps=9, per_device_train_batch_size=20)
    assert callback.switched_at == [4, 8]


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_of_the_model_alone_goes_on_at_the_lower_rate(missing, tmp_path):
    options = {"lr_scheduler_type": "constant"}
    whole = train(tmp_path / "whole", switch(rewarmup_steps=3), **options)
    checkpoint = tmp_path / "whole/checkpoint-5"
    (checkpoint / missing).unlink()
    again = train(tmp_path / "r", switch(rewarmup_steps=3), resume=checkpoint, **options)
    assert logged(again, "learning_rate") == pytest.approx(logged(whole, "learning_rate"))


def test_a_second_training_begins_at_the_full_rate(tmp_path):
    class Judge(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            kwargs["metrics"]["eval_loss"] = state.global_step

    average = AveragedModel(model := wide_model())
    trainer = make_trainer(
        tmp_path,
        switch(averaged_models=[average]),
        Judge(),
        model=model,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    for _ in range(2):  # The best model is that of step 1, so that it is dense again.
        trainer.train()
        rates = logged(trainer, "learning_rate")
        assert rates[-7:] == pytest.approx([1e-2] * 3 + [5e-3] * 4)
        assert not low_rank_layers(model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert logged(trainer, "learning_rate")[-2:] == pytest.approx([5e-3] * 2)


def test_a_model_whose_checkpoints_keep_other_names_resumes(tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=8, patch_size=4, hidden_size=64, intermediate_size=96,
            num_hidden_layers=2, num_attention_heads=2,
        )  # fmt: skip
        model = ViTForImageClassification(config)
        trainer: Any = make_trainer(folder, switch(), model=model)
        pixels = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        trainer.train_dataset = [{"pixel_values": x, "labels": i % 2} for i, x in enumerate(pixels)]
        trainer.train(**options)
        return trainer

    whole = run(tmp_path / "whole")
    for step in (2, 3, 5):
        checkpoint = str(tmp_path / f"whole/checkpoint-{step}")
        assert not differences(whole, run(tmp_path / str(step), resume_from_checkpoint=checkpoint))


def test_a_checkpoint_that_lacks_layers_is_refused(tmp_path):
    train(tmp_path / "whole", switch(), save_only_model=True)
    for step in (2, 5):
        checkpoint = tmp_path / f"whole/checkpoint-{step}"
        with pytest.raises(ValueError, match=r"no weights for model\.layers\.2\."):
            train(
                tmp_path / "r", switch(), resume=checkpoint, model=wide_model(num_hidden_layers=3)
            )


def test_a_low_rank_checkpoint_whose_plan_is_gone_is_refused(tmp_path):
    model = wide_model()
    factorize_(model, make_plan(model, RULE))
    train(tmp_path / "whole", LowRankCheckpointsCallback(), model=model, save_only_model=True)
    checkpoint = tmp_path / "whole/checkpoint-4"
    (checkpoint / "low_rank.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no low_rank\.json"):
        train(tmp_path / "r", LowRankCheckpointsCallback(), resume=checkpoint)


def test_the_order_of_ratios_is_part_of_a_rule(tmp_path):
    first = LowRankRule(ratio={"q_proj": 0.25, "attention": 0.13})
    second = LowRankRule(ratio={"attention": 0.13, "q_proj": 0.25})
    train(tmp_path / "whole", switch(rule=first))
    with pytest.raises(ValueError, match="made with other switches"):
        train(tmp_path / "r", switch(rule=second), resume=tmp_path / "whole/checkpoint-2")


def test_options_of_other_number_types_are_saved_and_resumed(tmp_path):
    def made():
        return switch(np.int64(3), learning_rate_factor=np.float32(0.5))

    whole = train(tmp_path / "whole", made())
    again = train(tmp_path / "r", made(), resume=tmp_path / "whole/checkpoint-2")
    assert not differences(whole, again)


def test_shrinking_is_checked_by_names_alone(tmp_path):
    narrow = LowRankRule(ratio=0.25, target_modules=["q_proj"])
    callback = switch(rule=narrow, shrink=[(AtStep(5), LowRankRule(max_parameters=2048))])
    train(tmp_path, callback)
    assert callback.switched_at == [3, 5]
    first, second = callback.switches
    assert second["parameters_before"] == first["parameters"] > second["parameters"]


def test_groups_in_another_order_than_saved_are_refused(tmp_path):
    class Backwards(Trainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                parameters = list(self.model.parameters())[::-1]  # pyright: ignore
                self.optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
            return self.optimizer

    def made(folder):
        trainer = make_trainer(folder, switch())
        trainer.__class__ = Backwards
        return trainer

    made(tmp_path / "whole").train()
    checkpoint = str(tmp_path / "whole/checkpoint-5")
    with pytest.raises((ValueError, RuntimeError), match=r"in another order|size of tensor"):
        made(tmp_path / "r").train(resume_from_checkpoint=checkpoint)


def test_a_warm_up_waits_for_steps_that_were_skipped(tmp_path, monkeypatch):
    class Overflow(TrainerCallback):
        skipped = False

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.skipped = state.global_step + 1 in (5, 6)

    overflow = Overflow()
    flag = property(lambda accelerator: overflow.skipped)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", flag)
    warmed = switch(rewarmup_steps=5, learning_rate_factor=1.0)
    trainer = train(tmp_path, warmed, overflow, lr_scheduler_type="constant", save_steps=100)
    shares = [1, 1, 1, 1 / 6, 2 / 6, 2 / 6, 2 / 6]
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2 * share for share in shares])


def test_a_trainer_that_failed_does_not_stand_in_the_way(tmp_path):
    try:
        Trainer(model=None)
    except RuntimeError as error:
        held = error  # As a notebook does.
        train(tmp_path, switch(), max_steps=4)
        assert held is not None


def test_what_an_earlier_run_left_is_removed(tmp_path):
    train(tmp_path, switch(2))
    assert is_low_rank(tmp_path / "checkpoint-4")
    whole = train(tmp_path, switch(6))
    assert not is_low_rank(tmp_path / "checkpoint-4") and is_low_rank(tmp_path / "checkpoint-6")
    again = train(tmp_path / "r", switch(6), resume=tmp_path / "checkpoint-4")
    assert not differences(whole, again)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: switch(rule=LowRankPlan({"lm_head": PlannedLayer(8, (64, 64))})), "is tied to"),
        (lambda: switch(rule=LowRankRule(max_parameters=10)), "max_parameters must be at least"),
        (
            lambda: switch(shrink=[(AtStep(5), LowRankRule(ratio=0.1, target_modules=["no"]))]),
            "matches no linear layer",
        ),
        (
            lambda: switch(rule=LowRankRule(ratio=0.25, exclude_modules=["q_porj"])),
            "exclude_modules: no linear layer has the name 'q_porj'",
        ),
        (
            lambda: switch(rule=LowRankRule(ratio=0.25, target_modules=["q_proj", "vproj"])),
            "target_modules: no linear layer has the name 'vproj'",
        ),
    ],
)
def test_what_would_fail_at_the_switch_is_refused_at_the_start(callback, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, callback(), model=wide_model(tie_word_embeddings=True))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_optimizer_without_a_layer_is_refused_at_the_start(tmp_path):
    model = wide_model()
    held = [p for name, p in model.named_parameters() if "layers.1" not in name]
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.\w+\.q_proj: the optimizer"):
        train(tmp_path, switch(), model=model, optimizers=(torch.optim.SGD(held, lr=1e-2), None))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_rates_that_a_schedule_holds_itself_are_refused(tmp_path):
    model = wide_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pair = (optimizer, OneCycleLR(optimizer, max_lr=1e-2, total_steps=10))
    with pytest.raises(ValueError, match="OneCycleLR goes between rates of its own"):
        train(tmp_path, switch(), model=model, optimizers=pair)


def test_a_model_that_may_begin_anew_of_low_rank_is_refused(tmp_path):
    with pytest.raises(ValueError, match="auto_find_batch_size begins anew"):
        train(tmp_path, switch(), auto_find_batch_size=True)


def test_a_dropped_state_is_dropped_at_every_stage(tmp_path):
    callback = switch(optimizer_state="drop", shrink=[(AtStep(5), LOWER)])
    train(tmp_path / "drop", callback, optim="adafactor")
    assert callback.switched_at == [3, 5]
    with pytest.raises(TypeError, match="rebalance_state=project: the state of Adafactor"):
        again = switch(optimizer_state="drop", rebalance_steps=2)
        train(tmp_path / "no", again, optim="adafactor")


def test_other_options_than_the_checkpoint_had_are_refused(tmp_path):
    train(tmp_path / "whole", switch())
    for options in ({"rebalance_steps": 2}, {"learning_rate_factor": 1.0}, {"train_norms": True}):
        [name] = options
        with pytest.raises(ValueError, match=f"{name} is .* there and .* here"):
            train(
                tmp_path / "r", switch(3, RULE, **options), resume=tmp_path / "whole/checkpoint-2"
            )


def test_a_small_form_resumes_and_has_its_best_model(tmp_path):
    low = wide_model()
    factorize_(low, make_plan(low, RULE))
    save_small_form(low, tmp_path / "small")

    def run(folder, **options):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        return train(folder, LowRankCheckpointsCallback(), model=model, **options)

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    with registered_small_form():
        whole = run(tmp_path / "whole", **best)
        assert len(low_rank_layers(whole.model)) == 14  # pyright: ignore[reportArgumentType]
        again = run(tmp_path / "r", resume=tmp_path / "whole/checkpoint-3", **best)
    assert logged(again) == logged(whole)


def test_two_callbacks_that_restore_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="leave LowRankCheckpointsCallback out"):
        make_trainer(tmp_path, switch(), LowRankCheckpointsCallback())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankSwitchCallback(RULE, 500), "must be a trigger such as AtStep"),  # pyright: ignore
        (lambda: RankSwitchCallback(RULE, AtStep), "must be a trigger such as"),  # pyright: ignore
        (lambda: RankSwitchCallback(0.1, AtStep(1)), "rule must be a LowRankRule"),  # pyright: ignore
        (lambda: switch(shrink=[(AtStep(2), {"ratio": 0.1})]), "rule must be a LowRankRule"),
    ],
)
def test_wrong_kinds_are_refused_where_they_are_given(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_plan_says_nothing_of_stable_ranks():
    plan = LowRankPlan({"a": PlannedLayer(8, (64, 64))})
    with pytest.raises(ValueError, match="StableRankPlateau needs a rule"):
        RankSwitchCallback(plan, StableRankPlateau())


def test_a_parametrised_weight_stays_dense():
    model = wide_model()
    for name in ("up_proj", "down_proj"):
        layer = getattr(model.model.layers[0].mlp, name)  # pyright: ignore
        torch.nn.utils.parametrizations.weight_norm(layer)
    plan = make_plan(model, RULE)
    assert "weight or forward" in plan.dense["model.layers.0.mlp.up_proj"]
    assert len(plan.layers) == 12


def test_a_hook_of_ddp_that_keeps_a_state_is_refused():
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    torch.nn.Module.__init__(wrapper)
    wrapper.mixed_precision, wrapper._delay_all_reduce_params = None, []
    wrapper._comm_hooks = [(print, None)]  # pyright: ignore
    check_reducer(wrapper)
    wrapper._comm_hooks = [(print, {"errors": 1})]  # pyright: ignore
    with pytest.raises(ValueError, match="a communication hook that keeps a state"):
        check_reducer(wrapper)


def test_moments_of_all_that_is_trained_are_there_after_every_stage(tmp_path):
    callback = switch(2, rebalance_steps=2, shrink=[(AtStep(5), LOWER)])
    trainer = train(tmp_path, callback, save_steps=100)
    held = plain_optimizer(trainer).state
    assert {id(p) for p in held} == {id(p) for p in trainer.model.parameters()}  # pyright: ignore
    assert all(float(state["step"]) == 7 for state in held.values())
