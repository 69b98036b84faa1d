"""A switch to low rank within a Trainer run: what goes on must go on right."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from peft import LoraConfig, get_peft_model
from support.switching_runs import (
    differences,
    examples,
    logged,
    make_trainer,
    plain_optimizer,
    train,
    wide_model,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, TrainerCallback

from peft_svdinit.low_rank import (
    LowRankLinear,
    LowRankPlan,
    LowRankRule,
    PlannedLayer,
    factorize_,
    is_low_rank,
    load_low_rank,
    low_rank_layers,
    make_plan,
    rebalance_,
)
from peft_svdinit.optim import replace_parameters_
from trainer_callbacks import (
    AtStep,
    LossPlateau,
    LowRankCheckpointsCallback,
    RankSwitchCallback,
    StableRankPlateau,
)
from trainer_callbacks.averaged_models import follow_, take_layers_

RULE = LowRankRule(ratio=0.25)
LOWER = LowRankRule(ratio=0.13)


def switch(at: int = 3, rule=RULE, **options) -> RankSwitchCallback:
    return RankSwitchCallback(rule, AtStep(at), **options)


VARIANTS = {
    "plain": {},
    "rebalanced and shrunk": {"rebalance_steps": 2, "shrink": [(AtStep(6), LOWER)]},
    "norms": {"train_norms": True, "row_normalise": "norms", "rewarmup_steps": 3},
    "norms, shrunk": {
        "train_norms": True,
        "optimizer_state": "drop",
        "shrink": [(AtStep(5), LOWER)],
    },
    "by outputs, moments dropped": {"batches": [{"input_ids": torch.arange(24)[None]}]},
}
VARIANTS["by outputs, moments dropped"]["optimizer_state"] = "drop"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_bit_equal_before_at_and_after_the_switch(variant, tmp_path):
    options = VARIANTS[variant]
    whole = train(tmp_path / "whole", switch(**options), lr_scheduler_type="cosine")
    assert low_rank_layers(whole.model)  # pyright: ignore[reportArgumentType]
    for step in (2, 3, 5):
        resumed = train(
            tmp_path / f"from-{step}",
            switch(**options),
            resume=tmp_path / f"whole/checkpoint-{step}",
            lr_scheduler_type="cosine",
        )
        assert not differences(whole, resumed)
        assert logged(resumed) == logged(whole)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_optimizer_holds_what_is_trained_as_a_new_trainer_would(architecture, tmp_path):
    model = wide_model(architecture)
    trainer = train(tmp_path, switch(train_norms=True), model=model, weight_decay=0.0)
    assert low_rank_layers(model)
    held = [group["params"] for group in plain_optimizer(trainer).param_groups]
    fresh = make_trainer(tmp_path / "fresh", model=model, weight_decay=0.0).create_optimizer()
    wanted = [group["params"] for group in fresh.param_groups]
    assert [[id(p) for p in group] for group in held] == [[id(p) for p in g] for g in wanted]
    assert {id(p) for p in plain_optimizer(trainer).state} == {id(p) for p in model.parameters()}


def test_the_switch_is_the_one_done_by_hand(tmp_path):
    steps, rate = 3, 1e-2
    trainer = train(
        tmp_path,
        switch(learning_rate_factor=0.5),
        model=wide_model(),
        max_steps=steps + 2,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        train_sampling_strategy="sequential",
    )
    model = wide_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rows = torch.stack([example["input_ids"] for example in examples()])

    def step(index: int) -> None:
        batch = rows[4 * index : 4 * index + 4]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for index in range(steps):
        step(index)
    dense = dict(model.named_modules())
    states = {id(p): optimizer.state[p] for p in model.parameters()}
    plan = make_plan(model, RULE)
    factorize_(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5 * rate, weight_decay=0.0)
    for p in model.parameters():
        if id(p) in states:
            optimizer.state[p] = states[id(p)]
    for name, layer in low_rank_layers(model).items():
        old = states[id(dense[name].weight)]
        U, Vh = layer.U.detach(), layer.Vh.detach()
        m, v = old["exp_avg"], old["exp_avg_sq"]
        for p, first, second in (
            (layer.U, m @ Vh.T, v @ Vh.T.square()),
            (layer.Vh, U.T @ m, U.T.square() @ v),
        ):
            optimizer.state[p] = {
                "step": old["step"].clone(),
                "exp_avg": first,
                "exp_avg_sq": second,
            }
    for index in range(steps, steps + 2):
        step(index)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, atol=3e-4, rtol=1e-3)  # pyright: ignore


def test_accumulated_batches_are_one_batch(tmp_path):
    whole = {"per_device_train_batch_size": 4}
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    runs = [
        train(tmp_path / str(number), switch(), save_steps=100, model=wide_model(), **options)
        for number, options in enumerate((whole, parts))
    ]
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), abs=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = [
        train(
            tmp_path / str(on),
            switch(),
            model=wide_model(),
            gradient_checkpointing=on,
            save_steps=100,
        )
        for on in (False, True)
    ]
    assert logged(runs[0]) == logged(runs[1])


def test_gradients_of_factors_are_clipped(tmp_path):
    class Norms(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = [p.grad for p in kwargs["model"].parameters()]
            self.seen.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    norms = Norms()
    train(tmp_path, switch(), norms, max_grad_norm=0.05, save_steps=100)
    assert norms.seen == pytest.approx([0.05] * 7, rel=1e-3)


def test_a_grad_scaler_goes_on_with_the_factors():
    model = wide_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    batch = examples(1)[0]["input_ids"][None]

    def step(spoil: bool = False) -> None:
        optimizer.zero_grad()
        scaler.scale(model(input_ids=batch, labels=batch).loss).backward()
        if spoil:
            first = next(iter(low_rank_layers(model).values()))
            assert first.U.grad is not None
            first.U.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()

    step()
    switched = factorize_(model, make_plan(model, RULE))
    replace_parameters_(optimizer, list(model.parameters()), [each.moved for each in switched])
    before = [p.detach().clone() for p in model.parameters()]
    step(spoil=True)
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_average_takes_the_layers_and_follows_their_bases(tmp_path):
    class Average(TrainerCallback):
        """Half and half, beside the mean of the products, which it stays close to."""

        def __init__(self):
            self.products = {}

        def on_step_end(self, args, state, control, **kwargs):
            average.update_parameters(kwargs["model"])
            for name, layer in low_rank_layers(kwargs["model"]).items():
                product = layer.weight.detach()
                last = self.products.get(name, product)
                self.products[name] = 0.5 * last + 0.5 * product

    model = wide_model()
    average, beside = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)), Average()
    averaged = switch(averaged_models=[average], rebalance_steps=1)
    # Small steps: the mean of products is the product of means but for their squares.
    train(tmp_path, averaged, beside, model=model, save_steps=100, learning_rate=1e-3)
    assert set(low_rank_layers(average.module)) == set(low_rank_layers(model))
    for name, layer in low_rank_layers(average.module).items():
        assert not layer.U.requires_grad
        mean, live = beside.products[name], model.get_submodule(name).weight
        apart = (mean - live).norm()
        assert apart > 0
        assert (layer.weight - mean).norm() < 0.05 * apart


def test_an_average_keeps_its_product_when_factors_are_rebalanced():
    model = wide_model()
    average = copy.deepcopy(model)
    factorize_(model, make_plan(model, RULE))
    take_layers_([average], model)
    with torch.no_grad():
        for layer in low_rank_layers(model).values():
            layer.U.add_(0.01 * torch.randn_like(layer.U))
        for layer in low_rank_layers(average).values():
            layer.Vh.mul_(1.1)
    before = {n: m.weight.detach().clone() for n, m in low_rank_layers(average).items()}
    biases = {n: m.bias for n, m in low_rank_layers(average).items()}
    follow_([average], rebalance_(model))
    for name, layer in low_rank_layers(average).items():
        torch.testing.assert_close(layer.weight.detach(), before[name], atol=1e-5, rtol=1e-4)
        assert layer.bias is biases[name]


def test_factors_are_balanced_at_the_switch_and_after_so_many_steps(tmp_path):
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            apart = [
                (layer.U.T @ layer.U - layer.Vh @ layer.Vh.T).norm() / layer.U.norm() ** 2
                for layer in low_rank_layers(kwargs["model"]).values()
            ]
            if apart and max(apart) < 1e-5:
                balanced.append(state.global_step)

    balanced = []
    train(tmp_path, switch(2, rebalance_steps=2), Look(), save_steps=100)
    assert balanced == [2, 4, 6]


def test_a_model_generates_after_the_switch_as_its_dense_form_does(tmp_path):
    trainer = train(tmp_path, switch(), save_steps=7)
    model: Any = trainer.model
    ids = examples(1)[0]["input_ids"][None]
    asked = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-7")
    assert low_rank_layers(model) and not low_rank_layers(dense)
    assert torch.equal(model.eval().generate(**asked), dense.generate(**asked))


@pytest.mark.parametrize(("best_step", "low"), [(1, False), (2, True), (5, True)])
def test_the_best_model_has_its_own_structure(best_step, low, tmp_path):
    class Judge(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            kwargs["metrics"]["eval_loss"] = abs(state.global_step - best_step)

    trainer = train(
        tmp_path,
        switch(2),
        Judge(),
        model=wide_model(),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    best = trainer.state.best_model_checkpoint
    assert best is not None and is_low_rank(best) == low
    model = trainer.model
    assert model is not None and bool(low_rank_layers(model)) == low
    expected = load_low_rank(best) if low else AutoModelForCausalLM.from_pretrained(best)
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in model.state_dict().items())
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "last"))
    assert is_low_rank(tmp_path / "last") == low


@pytest.mark.parametrize(
    "kind", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt", "cosine_with_restarts"]
)
def test_schedules_go_on_at_half_the_rate(kind, tmp_path):
    rates = [
        logged(
            train(
                tmp_path / str(factor),
                switch(learning_rate_factor=factor),
                lr_scheduler_type=kind,
                warmup_steps=2,
                save_steps=100,
            ),
            "learning_rate",
        )
        for factor in (1.0, 0.5)
    ]
    assert rates[1] == pytest.approx([*rates[0][:3], *(0.5 * rate for rate in rates[0][3:])])


def test_a_rate_that_is_lowered_on_a_plateau_goes_on_from_half_of_itself(tmp_path):
    trainer = train(
        tmp_path,
        switch(),
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 100},
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
    )
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2] * 3 + [5e-3] * 4)


@pytest.mark.parametrize(
    ("at", "shares"),
    [(3, [1, 1, 1, 0.125, 0.25, 0.375, 0.5]), (0, [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5])],
)
def test_a_warm_up_follows_the_switch(at, shares, tmp_path):
    warmed = switch(at, rewarmup_steps=3)
    trainer = train(tmp_path, warmed, lr_scheduler_type="constant", save_steps=100)
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2 * share for share in shares])


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused", "rmsprop"])
def test_other_optimizers_follow(optim, tmp_path):
    options = {"optim": optim, "learning_rate": 1e-3}
    whole = train(tmp_path / "whole", switch(), **options)
    resumed = train(tmp_path / "r", switch(), resume=tmp_path / "whole/checkpoint-5", **options)
    assert not differences(whole, resumed)


def test_an_optimizer_of_the_user_follows_and_resumes(tmp_path):
    def trained(folder, resume=None):
        model = wide_model()
        groups = [
            {"params": [p for p in model.parameters() if p.dim() < 2], "lr": 1e-3},
            {"params": [p for p in model.parameters() if p.dim() > 1], "lr": 1e-2},
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        callback = switch(train_norms=True)
        return train(folder, callback, model=model, optimizers=(optimizer, None), resume=resume)

    whole = trained(tmp_path / "whole")
    assert not differences(whole, trained(tmp_path / "r", tmp_path / "whole/checkpoint-5"))


def test_a_training_from_the_first_step_on_is_of_low_rank(tmp_path):
    trainer = train(tmp_path, RankSwitchCallback(RULE, lowrank_switch_epoch=0), save_steps=1)
    assert is_low_rank(tmp_path / "checkpoint-1")
    assert logged(trainer, "learning_rate")[0] == pytest.approx(5e-3)


def test_triggers_by_what_is_seen_resume_bit_equal(tmp_path):
    for name, trigger in {
        "loss": LossPlateau(patience=2, min_delta=0.5),
        "ranks": StableRankPlateau(window=1, tolerance=100.0),
        "function": lambda seen: seen.step >= 4,
    }.items():
        made = [RankSwitchCallback(RULE, trigger) for _ in range(2)]
        options = {"per_device_train_batch_size": 20}  # Two steps an epoch.
        whole = train(tmp_path / name, made[0], **options)
        assert made[0].switched_at == [{"loss": 4, "ranks": 4, "function": 4}[name]]
        checkpoint = tmp_path / name / "checkpoint-3"
        resumed = train(tmp_path / f"{name}-r", made[1], resume=checkpoint, **options)
        assert not differences(whole, resumed)


def test_what_was_never_due_is_said_at_the_end(tmp_path, caplog):
    train(tmp_path, switch(100))
    assert "the model stayed dense: {'kind': 'AtStep', 'step': 100} was never due" in caplog.text
    assert not is_low_rank(tmp_path / "checkpoint-7")


def test_one_line_says_what_was_switched_and_what_it_saves(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trainer_callbacks"):
        trainer = train(tmp_path, callback := switch(), max_steps=4)
    taken = callback.switches[0]["seconds"]
    plan = LowRankPlan.of(trainer.model)  # pyright: ignore[reportArgumentType]
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    share = plan.parameters / plan.dense_parameters
    assert line.startswith(
        f"switched at step 3 in {taken:.1f} s: 14 layers at ranks 8 to 16: "
        f"{plan.dense_parameters:,} weights become {plan.parameters:,}, {share:.0%} of the "
        "multiplications in these layers; mean relative error of the weights 0."
    )


def test_weights_that_fit_no_rank_leave_the_training_dense_and_say_so(tmp_path, caplog):
    trainer = train(tmp_path, switch(rule=LowRankRule(energy=0.9999)), max_steps=5)
    assert trainer.state.global_step == 5
    assert "nothing is switched at step 3: no layer is cheaper at low rank" in caplog.text
    assert "the training ended and the model stayed dense: no layer is cheaper" in caplog.text


def test_a_model_of_low_rank_before_its_trainer_resumes_bit_equal(tmp_path):
    def low():
        model = wide_model(attention_dropout=0.1)
        factorize_(model, make_plan(model, RULE))
        return model

    whole = train(tmp_path / "whole", LowRankCheckpointsCallback(), model=low())
    checkpoint = tmp_path / "whole/checkpoint-3"
    for number, model in enumerate((low(), wide_model(attention_dropout=0.1))):
        folder = tmp_path / str(number)
        again = train(folder, LowRankCheckpointsCallback(), model=model, resume=checkpoint)
        assert not differences(whole, again)
    with pytest.raises(RuntimeError, match="is dense, and the layer is of low rank"):
        train(tmp_path / "bare", model=low(), resume=checkpoint)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_anew(tmp_path):
    runs = [
        train(
            tmp_path / str(compiled),
            switch(2),
            model=wide_model(),
            max_steps=4,
            save_steps=100,
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
        )
        for compiled in (False, True)
    ]
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), abs=1e-4)


# What is refused.


def test_options_that_contradict_each_other_are_refused():
    for options, message in (
        ({}, "one of switch and lowrank_switch_epoch"),
        ({"switch": AtStep(1), "lowrank_switch_epoch": 1}, "one of switch and"),
        ({"switch": AtStep(1), "learning_rate_factor": 0}, "learning_rate_factor must be in"),
        ({"switch": AtStep(1), "rebalance_steps": 0}, "rebalance_steps must be at least 1"),
        ({"switch": AtStep(1), "optimizer_state": "keep"}, "optimizer_state must be one of"),
        (
            {"switch": AtStep(1), "train_norms": True, "rebalance_steps": 3},
            "rebalance_state=drop",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            RankSwitchCallback(RULE, **options)


def plan_of(name: str, rank: int = 8, shape=(64, 64)) -> LowRankPlan:
    return LowRankPlan({name: PlannedLayer(rank, shape)})


@pytest.mark.parametrize(
    ("rule", "options", "error", "message"),
    [
        (plan_of("model.layers.9.mlp"), {}, ValueError, r"a layer model\.layers\.9\.mlp, which"),
        (plan_of("model.layers.0.mlp.up_proj"), {}, ValueError, "has a weight of"),
        (LowRankRule(ratio=0.9), {}, ValueError, "no layer is cheaper at low rank"),
        (LowRankRule(energy=0.9, min_size=10**6), {}, ValueError, "not above min_size"),
        (RULE, {"optim": "adafactor"}, TypeError, "optimizer_state=drop"),
    ],
)
def test_what_cannot_be_switched_is_refused_before_a_step(rule, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(tmp_path, switch(rule=rule), **options)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_optimizer_whose_state_cannot_be_carried_begins_anew_if_asked(tmp_path):
    options = {"optim": "adafactor"}
    whole = train(tmp_path / "whole", switch(optimizer_state="drop"), **options)
    resumed = train(
        tmp_path / "r",
        switch(optimizer_state="drop"),
        resume=tmp_path / "whole/checkpoint-4",
        **options,
    )
    assert not differences(whole, resumed)


def test_a_second_training_of_the_switched_model_is_refused(tmp_path):
    trainer = train(tmp_path, switch())
    with pytest.raises(ValueError, match="of low rank already"):
        trainer.train()


def test_the_same_trainer_goes_on_from_a_checkpoint_of_before_the_switch(tmp_path):
    whole = train(tmp_path / "whole", switch())
    again = train(tmp_path / "again", switch())
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert not differences(whole, again)


def test_a_model_with_an_adapter_is_refused(tmp_path):
    model = get_peft_model(wide_model(), LoraConfig(r=2, target_modules=["q_proj"]))  # pyright: ignore
    with pytest.raises(TypeError, match="a PreTrainedModel without adapters, got a PeftModel"):
        train(tmp_path, switch(), model=model)


def test_a_checkpoint_without_its_plan_is_refused(tmp_path):
    train(tmp_path / "whole", switch())
    checkpoint = tmp_path / "whole/checkpoint-5"
    (checkpoint / "low_rank.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"with low-rank layers, but has no low_rank"):
        train(tmp_path / "r", switch(), resume=checkpoint)


def test_a_checkpoint_of_other_switches_is_refused(tmp_path):
    train(tmp_path / "whole", switch())
    for step in (2, 5):
        with pytest.raises(ValueError, match="made with other switches"):
            train(tmp_path / "r", switch(4), resume=tmp_path / f"whole/checkpoint-{step}")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path / "whole", switch())
    for model in (wide_model("gpt2"), wide_model(intermediate_size=128)):
        with pytest.raises((ValueError, RuntimeError), match=r"lacks|size mismatch|has no weights"):
            train(tmp_path / "r", switch(), resume=tmp_path / "whole/checkpoint-5", model=model)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_split_parameters_are_refused_with_the_recipe_that_serves_them(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", getattr(DistributedType, kind))
    with pytest.raises(ValueError, match=rf"{kind} splits.*recipes/progressive_lowrank\.py"):
        make_trainer(tmp_path, switch())


def test_a_callback_belongs_to_one_trainer(tmp_path):
    callback = switch()
    trainers = [make_trainer(tmp_path, callback)]
    with pytest.raises(RuntimeError, match="belongs to 2 Trainers"):
        trainers.append(make_trainer(tmp_path, callback))


def test_layers_of_low_rank_are_what_the_optimizer_trains(tmp_path):
    trainer = make_trainer(tmp_path, switch(1, learning_rate_factor=1.0), max_steps=2)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append({n: p.detach().clone() for n, p in kwargs["model"].named_parameters()})

    trainer.add_callback(Look())
    trainer.train()
    moved = [name for name in seen[1] if not torch.equal(seen[0][name], seen[1][name])]
    assert set(moved) == set(seen[1])
    assert any(isinstance(m, LowRankLinear) for m in trainer.model.modules())  # pyright: ignore
