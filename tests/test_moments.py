"""Adam moments carried into another basis of the same update."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_svdinit.deltas import LoraProduct
from peft_svdinit.factors import LowRankFactors
from peft_svdinit.initializers import SvdGuided
from peft_svdinit.moments import AdamMoments, rotated_moments


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
