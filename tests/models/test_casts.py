"""A cast is told from training: every direction between dtypes, stored narrow or wide."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import seeds
from torch import Tensor

from peft_svdinit.models import CastCheck

HALVES = [torch.bfloat16, torch.float16]
DTYPES = st.sampled_from([torch.float32, *HALVES])


def weights(rows: int = 32, columns: int = 48, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(rows, columns, generator=generator)


def cast(values: Tensor, *dtypes: torch.dtype) -> Tensor:
    """The values after casts, in float32."""
    for dtype in dtypes:
        values = values.to(dtype)
    return values.float()


def is_rounding(base: Tensor, tuned: Tensor, rows: int = 7) -> bool:
    check = CastCheck()
    for one, other in zip(base.split(rows), tuned.split(rows), strict=True):
        check.add(one, other)
    return check.is_rounding


@given(seed=seeds, one=DTYPES, other=DTYPES, rows=st.integers(1, 40))
def test_a_cast_weight_is_never_changed(seed, one, other, rows):
    original = weights(seed=seed)
    base, tuned = cast(original, one), cast(original, other)
    assert is_rounding(base, tuned, rows) == (one != other)


@given(seed=seeds, narrow=st.sampled_from(HALVES), data=st.data())
def test_one_entry_moved_by_two_units_is_a_change(seed, narrow, data):
    base = weights(seed=seed)
    tuned = cast(base, narrow)
    row, column = data.draw(st.integers(0, 31)), data.draw(st.integers(0, 47))
    up = torch.tensor(torch.inf, dtype=narrow)
    moved = tuned[row, column].to(narrow)
    for _ in range(2):
        moved = torch.nextafter(moved, up)
    tuned[row, column] = moved
    assert not is_rounding(base, tuned) and not is_rounding(tuned, base)


@pytest.mark.parametrize("narrow", HALVES)
def test_a_unit_in_one_entry_is_a_change_where_one_side_was_never_rounded(narrow):
    base = weights()
    tuned = cast(base, narrow)
    assert is_rounding(base, tuned) and is_rounding(tuned, base)
    tuned[3, 5] = torch.nextafter(tuned[3, 5].to(narrow), torch.tensor(1.0, dtype=narrow))
    assert not is_rounding(base, tuned) and not is_rounding(tuned, base)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_of_one_dtype_nothing_is_rounding(dtype):
    base = cast(weights(), dtype)
    assert not is_rounding(base, base.clone())
    tuned = base.clone()
    tuned[0, 0] = torch.nextafter(tuned[0, 0].to(dtype), torch.tensor(1.0, dtype=dtype))
    assert not is_rounding(base, tuned)


# Entries of few binades, all in one, and around zero.
SPREADS = {"normal": 0.05, "ones": 0.0, "wide": 5.0}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("narrow", HALVES)
@pytest.mark.parametrize("share", [0.01, 0.24, 0.6, 0.9])
def test_training_in_float32_within_the_rounding_of_its_base_is_a_change(spread, narrow, share):
    """All entries return to the base when rounded, but do not lie around it as rounding does."""
    base = cast(1.0 + SPREADS[spread] * weights(), narrow)
    eps = torch.finfo(narrow).eps
    unit = eps * base.abs().log2().floor().exp2()
    # Away from zero: below a power of two the units are half as large.
    tuned = base + share / 2 * unit * base.sign()
    assert torch.equal(cast(tuned, narrow), base)
    assert not is_rounding(base, tuned)


def test_what_was_rounded_twice_is_rounding_and_a_little_more_is_not():
    original = weights(64, 64)
    once = cast(original, torch.float16)
    for base, tuned in [
        (once, cast(original, torch.bfloat16)),
        (cast(original, torch.bfloat16), once),
    ]:
        assert not torch.equal(cast(once, torch.bfloat16), cast(original, torch.bfloat16))
        assert is_rounding(base, tuned)
    spoilt = cast(original, torch.bfloat16)
    spoilt[::4] *= 1.0078125  # By about a unit.
    assert not is_rounding(once, cast(spoilt, torch.bfloat16))


def orders(blocks: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    yield blocks
    yield blocks[::-1]


def test_equal_blocks_count_for_the_grid_of_both_sides():
    """Where tuned has fine values, it was not rounded, and a coarse block of it was trained."""
    fine = weights()
    coarse = cast(fine, torch.bfloat16)
    for blocks in orders([(fine, fine.clone()), (fine, coarse)]):
        check = CastCheck()
        for base, tuned in blocks:
            check.add(base, tuned)
        assert not check.is_rounding
    for blocks in orders([(coarse, coarse.clone()), (fine, coarse)]):
        check = CastCheck()
        for base, tuned in blocks:
            check.add(base, tuned)
        assert check.is_rounding


def test_numbers_beyond_float16_and_scalars_are_compared():
    base = torch.tensor([1.0, 65504.0, 7e-6, 0.1, -0.3])
    assert is_rounding(base, cast(base, torch.float16))
    assert is_rounding(torch.tensor([0.1]), cast(torch.tensor([0.1]), torch.bfloat16))
    assert not is_rounding(torch.tensor([0.1]), torch.tensor([0.1015625]))
    assert not is_rounding(torch.zeros(4), torch.tensor([0.0, 0.0, 2.0**-20, 0.0]))
