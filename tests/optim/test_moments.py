"""Adam moments carried into another basis of the same update."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from support.peft_fixtures import tiny_base, tokens
from support.tiny_models import rewrite_tensors
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_svdinit.factors import LoraProduct, LowRankFactors, SvdGuided
from peft_svdinit.factors.warm_starts.widening import at_rank
from peft_svdinit.models import lora_key
from peft_svdinit.optim import (
    MOMENTS_FILE_NAME,
    install_moments,
    load_moments,
    lora_parameters,
)
from peft_svdinit.optim.adam_moments import AdamMoments, rotated_moments
from peft_svdinit.optim.saved_moments import _in_order
from peft_svdinit.tuner import lora_scalings
from trainer_callbacks import adam_moments
from trainer_callbacks.adam_moments import CarryMomentsCallback, SaveMomentsCallback


def product(out: int, inner: int, rank: int, scaling: float, seed: int) -> LoraProduct:
    generator = torch.Generator().manual_seed(seed)
    return LoraProduct(
        torch.randn(rank, inner, generator=generator, dtype=torch.float64),
        torch.randn(out, rank, generator=generator, dtype=torch.float64),
        scaling,
    )


def student_of(teacher: LoraProduct, rank: int, scaling: float, split: str) -> LoraProduct:
    factors = LowRankFactors.from_product(teacher.lora_B, teacher.lora_A, teacher.scaling)
    init = SvdGuided("delta", split)(factors, rank=rank, scaling=scaling)  # pyright: ignore
    return LoraProduct(init.lora_A.double(), init.lora_B.double(), scaling)


def gradients(lora: LoraProduct, weight_gradient: torch.Tensor) -> list[torch.Tensor]:
    """Of <weight_gradient, scaling B A>, by autograd."""
    A, B = lora.lora_A.clone().requires_grad_(), lora.lora_B.clone().requires_grad_()
    (weight_gradient * (lora.scaling * B @ A)).sum().backward()
    assert A.grad is not None and B.grad is not None
    return [A.grad, B.grad]


def as_moments(gradient: torch.Tensor) -> AdamMoments:
    return AdamMoments(gradient, gradient.square(), 7.0)


@given(
    rank=st.integers(1, 5),
    lower=st.integers(1, 5),
    scaling=st.sampled_from([0.5, 1.0, 2.0]),
    student_scaling=st.sampled_from([0.25, 1.0, 4.0]),
    split=st.sampled_from(["output", "balanced"]),
    seed=st.integers(0, 1000),
)
def test_rotated_first_moments_are_the_students_own_gradients(
    rank, lower, scaling, student_scaling, split, seed
):
    teacher = product(9, 7, rank, scaling, seed)
    student = student_of(teacher, min(rank, lower), student_scaling, split)
    weight_gradient = torch.randn(
        9, 7, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    of_A, of_B = (as_moments(gradient) for gradient in gradients(teacher, weight_gradient))
    rotated_A, rotated_B = rotated_moments("layer", teacher, student, of_A, of_B)
    expected_A, expected_B = gradients(student, weight_gradient)
    assert_close(rotated_A.exp_avg, expected_A, rtol=1e-3, atol=1e-3)
    assert_close(rotated_B.exp_avg, expected_B, rtol=1e-3, atol=1e-3)
    assert (rotated_A.exp_avg_sq >= 0).all() and (rotated_B.exp_avg_sq >= 0).all()
    assert rotated_A.step == rotated_B.step == 7.0


def test_the_second_moment_of_one_rescaled_direction_is_rescaled_by_the_square():
    teacher = product(4, 3, 1, 1.0, 0)
    student = LoraProduct(2 * teacher.lora_A, teacher.lora_B / 2, 1.0)
    ones_A, ones_B = torch.ones(1, 3).double(), torch.ones(4, 1).double()
    rotated_A, rotated_B = rotated_moments(
        "layer", teacher, student, AdamMoments(ones_A, ones_A, 1), AdamMoments(ones_B, ones_B, 1)
    )
    assert_close(rotated_A.exp_avg, ones_A / 2)
    assert_close(rotated_A.exp_avg_sq, ones_A / 4)
    assert_close(rotated_B.exp_avg, ones_B * 2)
    assert_close(rotated_B.exp_avg_sq, ones_B * 4)


def test_the_same_basis_keeps_the_moments():
    teacher = product(6, 5, 3, 2.0, 1)
    moments = [as_moments(torch.randn(3, 5).double()), as_moments(torch.randn(6, 3).double())]
    for old, new in zip(moments, rotated_moments("layer", teacher, teacher, *moments), strict=True):
        assert_close(new.exp_avg, old.exp_avg)
        assert_close(new.exp_avg_sq, old.exp_avg_sq, rtol=1e-6, atol=1e-9)


def test_a_student_outside_the_teachers_span_is_refused_by_name():
    teacher = product(6, 5, 2, 1.0, 1)
    student = product(6, 5, 3, 1.0, 2)
    moments = [as_moments(torch.randn(2, 5).double()), as_moments(torch.randn(6, 2).double())]
    with pytest.raises(ValueError, match=r"layer model\.q_proj: .*span of the teacher"):
        rotated_moments("model.q_proj", teacher, student, *moments)


def trainer(
    folder: Path, *callbacks: TrainerCallback, model: Any = None, **options: Any
) -> Trainer:
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens(batch=8, length=6, seed=3)]
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    arguments = TrainingArguments(**{**defaults, **options})
    return Trainer(model or lora(), arguments, train_dataset=rows, callbacks=[*callbacks])


def lora() -> Any:
    return get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_moments_are_left_when_training_ends(tmp_path, optim):
    run = trainer(tmp_path, SaveMomentsCallback(), optim=optim)
    run.train()
    moments = load_moments(tmp_path / MOMENTS_FILE_NAME)
    optimizer: Any = run.optimizer
    for key, parameter in lora_parameters(run.model).items():  # pyright: ignore
        assert torch.equal(moments[key].exp_avg, optimizer.state[parameter]["exp_avg"])
        assert moments[key].step == 3
    key = f"{next(iter(moments))}.exp_avg"
    rewrite_tensors(tmp_path / MOMENTS_FILE_NAME, lambda t: t.update({key: t[key].int()}))
    with pytest.raises(TypeError, match=f"moments: .*: {key} is stored as I32"):
        load_moments(tmp_path / MOMENTS_FILE_NAME)


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "rmsprop", "adagrad", "adamw_8bit"])
def test_an_optimizer_without_adam_moments_is_refused_before_the_first_step(tmp_path, optim):
    run = trainer(tmp_path, SaveMomentsCallback(), optim=optim)
    with pytest.raises(TypeError, match=r"SaveMoments.*keeps no Adam moments.*optim=adamw_torch"):
        run.train()
    assert run.state.global_step == 0
    if optim == "sgd":
        teacher = trainer(tmp_path, SaveMomentsCallback())
        teacher.train()
        teacher.save_model()
        run = trainer(tmp_path / "student", CarryMomentsCallback(str(tmp_path)), optim=optim)
        with pytest.raises(TypeError, match="CarryMomentsCallback: SGD keeps no Adam moments"):
            run.train()


def test_a_resumed_optimizer_is_asked_for_its_own_state(tmp_path):
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "optim": "sgd"}
    saving["optim_args"] = "momentum=0.9"
    trainer(tmp_path, **saving).train()
    run = trainer(tmp_path, SaveMomentsCallback(), **saving)
    with pytest.raises(TypeError, match="SGD keeps no Adam moments"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_model_without_a_trained_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a model with a trained LoRA adapter"):
        trainer(tmp_path, SaveMomentsCallback(), model=tiny_base()).train()


class Odd(torch.optim.SGD):
    """Cannot be tried out: it wants more than its options."""

    def __init__(self, params: Any, lr: float, model: Any) -> None:
        super().__init__(params, lr)


def test_an_optimizer_that_cannot_be_asked_is_warned_of_and_costs_no_adapter(tmp_path, caplog):
    model = lora()
    run = trainer(tmp_path, SaveMomentsCallback(), model=model)
    run.optimizer = Odd([p for p in model.parameters() if p.requires_grad], 0.1, model)
    run.train()
    assert "cannot tell whether Odd keeps Adam moments" in caplog.text
    (record,) = [each for each in caplog.records if "leaves no" in each.getMessage()]
    assert f"no {tmp_path / MOMENTS_FILE_NAME} (WrongKind" in record.getMessage()
    assert "optim=adamw_torch" in record.getMessage() and record.exc_info
    check_saved(run, tmp_path)


@pytest.mark.parametrize("flag", [{"fused": True}, {"capturable": True}, {}])
def test_the_step_is_where_the_kernels_read_it(flag):
    """As torch places it, by the flags of the parameter's group."""
    model = lora()
    parameters = lora_parameters(model)
    moments = {key: as_moments(torch.ones_like(one)) for key, one in parameters.items()}
    scalings = lora_scalings(model)
    keys = [(lora_key(name, "A"), lora_key(name, "B")) for name in scalings]
    teacher = {
        name: LoraProduct(
            parameters[a].detach().clone(), torch.ones_like(parameters[b]), scalings[name]
        )
        for name, (a, b) in zip(scalings, keys, strict=True)
    }
    optimizer = torch.optim.AdamW(parameters.values(), **flag)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Parameter, "device", torch.device("meta"), raising=False)
        install_moments(optimizer, model, teacher, moments, scalings)
    steps = [optimizer.state[one]["step"] for one in parameters.values()]
    assert {one.device.type for one in steps} == {"meta" if flag else "cpu"}
    assert {one.dtype for one in steps} == {torch.float32}


def test_an_optimizer_file_of_something_else_is_refused(tmp_path):
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt is no optimizer's state"):
        _in_order(tmp_path / "optimizer.pt", [])


def test_a_full_disk_at_the_end_costs_the_moments_alone_even_an_earlier_runs(
    tmp_path, monkeypatch, caplog
):
    trainer(tmp_path, SaveMomentsCallback()).train()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adam_moments, "save_moments", full)
    run = trainer(tmp_path, SaveMomentsCallback())
    run.train()
    assert f"no {tmp_path / MOMENTS_FILE_NAME} (OSError: [Errno 28]" in caplog.text
    assert not (tmp_path / MOMENTS_FILE_NAME).exists()
    check_saved(run, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"has no {MOMENTS_FILE_NAME}; train the teacher"):
        CarryMomentsCallback(str(tmp_path / "adapter"))


def check_saved(run: Trainer, folder: Path) -> None:
    run.save_model(str(folder / "adapter"))
    loaded = get_peft_model_state_dict(
        PeftModel.from_pretrained(tiny_base(), str(folder / "adapter"))
    )
    trained = get_peft_model_state_dict(run.model)
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[key], trained[key]) for key in loaded)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("split", ["output", "balanced"])
def test_further_directions_of_a_wider_student_have_no_past(split, rounding):
    teacher = product(9, 7, 2, 0.5, 3)
    narrow = student_of(teacher, 2, 1.0, split)
    wider = at_rank(
        "layer",
        LowRankFactors.from_product(teacher.lora_B, teacher.lora_A, teacher.scaling),
        5,
        seed=0,
    )
    init = SvdGuided("delta", split)(wider, rank=5, scaling=1.0)  # pyright: ignore
    wide = LoraProduct(init.lora_A.double(), init.lora_B.double(), 1.0)
    if rounding:
        wide.lora_B[:, 2:] = 1e-12
    weight_gradient = torch.randn(9, 7).double()
    moments = [as_moments(gradient) for gradient in gradients(teacher, weight_gradient)]
    expected = rotated_moments("layer", teacher, narrow, *moments)
    for found, narrower, turn in zip(
        rotated_moments("layer", teacher, wide, *moments), expected, (False, True), strict=True
    ):
        first, second, known, known_second = (
            tensor.mT if turn else tensor
            for one in (found, narrower)
            for tensor in (one.exp_avg, one.exp_avg_sq)
        )
        assert_close(first[:2], known, rtol=1e-4, atol=1e-5)
        assert_close(second[:2], known_second, rtol=1e-4, atol=1e-5)
        assert_close(first[2:], torch.zeros_like(first[2:]), rtol=0, atol=1e-4)
        assert_close(second[2:], known_second.mean(dim=0).expand(3, -1), rtol=1e-4, atol=1e-5)
