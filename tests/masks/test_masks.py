"""Which entries a mask keeps: the fast choice against sorting in plain Python, and its scores."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.allocations import LargestResult
from support.strategies import seeds
from torch import Tensor

from peft_svdinit import LowRankFactors
from peft_svdinit.analysis.masks.statistics import mask_statistics
from peft_svdinit.masks import (
    GradientScores,
    LayerScores,
    LoriMask,
    Selection,
    magnitude_scores,
    random_projection,
    random_scores,
    ranked,
    select,
    teacher_scores,
    tensor_hash,
)
from peft_svdinit.masks.choosing import groups_of
from peft_svdinit.models import module_types

NAMES = ["layers.0.attn.q", "layers.0.mlp.up", "layers.2.attn.q", "layers.10.attn.q", "head"]
GROUPED = ["global", "type", "layer", "matrix"]


@pytest.fixture(autouse=True, scope="module")
def in_small_parts() -> Iterator[None]:
    """Of which even the small matrices here have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranked, "_PART", 7)
        yield


def some_scores(seed: int = 0, *, levels: int | None = None, rank: int = 4) -> dict[str, Tensor]:
    """Scores of five layers; with `levels`, of that many different values."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for place, name in enumerate(NAMES):
        matrix = torch.rand(3 + 2 * place, rank, generator=generator)
        scores[name] = matrix if levels is None else (levels * matrix).floor()
    return scores


def order(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def group(name: str, scope: str) -> str:
    """Written out again: what shares a budget."""
    words = name.split(".")
    if scope == "type":
        return words[-1]
    if scope == "layer":
        return ".".join(words[:2]) if len(words) > 1 else name
    return name if scope == "matrix" else "all"


def by_sorting(
    scores: dict[str, Tensor],
    density: float,
    scope: str,
    exclude: dict[str, Tensor] | None = None,
    floor: float = 0.0,
) -> dict[str, Tensor]:
    """The slow, obvious choice: sort the entries of every group."""
    masks = {name: torch.zeros_like(matrix, dtype=torch.bool) for name, matrix in scores.items()}
    groups: dict[str, list[str]] = {}
    for name in sorted(scores, key=order):
        groups.setdefault(group(name, scope), []).append(name)
    for names in groups.values():
        entries = [
            (-scores[name][row, column].item(), order(name), row, column, name)
            for name in names
            for row in range(scores[name].shape[0])
            for column in range(scores[name].shape[1])
            if exclude is None or not exclude[name][row, column]
        ]
        entries.sort()
        size = sum(scores[name].numel() for name in names)
        budget = math.floor(density * size + 0.5)
        chosen = []
        for name in names:
            least = math.ceil(round(floor * scores[name].numel(), 9))
            chosen += [entry for entry in entries if entry[-1] == name][:least]
        chosen += [entry for entry in entries if entry not in chosen][: budget - len(chosen)]
        for _, _, row, column, name in chosen:
            masks[name][row, column] = True
    return masks


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )


@given(
    seed=seeds,
    levels=st.sampled_from([None, 2, 3, 20]),
    density=st.floats(0.2, 1.0),
    scope=st.sampled_from(GROUPED),
)
def test_the_largest_of_every_group_are_kept_and_ties_go_to_the_first(seed, levels, density, scope):
    scores = some_scores(seed, levels=levels)
    scores["head"][0, 0] = 5.0
    expected = by_sorting(scores, density, scope)
    if not all(mask.any() for mask in expected.values()):
        with pytest.raises(ValueError, match="keeps no entry"):
            select(scores, Selection(density, scope))
        return
    found = select(scores, Selection(density, scope))
    assert equal(found, expected)
    names = list(scores)
    random.Random(seed).shuffle(names)
    assert equal(select({name: scores[name] for name in names}, Selection(density, scope)), found)


@given(
    seed=seeds,
    density=st.sampled_from([0.25, 0.3, 0.5]),
    floor=st.sampled_from([0.0, 0.07, 0.1, 0.2]),
    scope=st.sampled_from(["global", "type"]),
    excluding=st.booleans(),
)
def test_floors_and_exclusions_agree_with_sorting(seed, density, floor, scope, excluding):
    scores = some_scores(seed, levels=7)
    scores["layers.2.attn.q"] /= 100
    exclude, others = None, []
    if excluding:
        others = [mask_of(some_scores(seed + 1), scope="matrix")]
        exclude = others[0].masks
    selection = Selection(density, scope, floor, others)
    expected = by_sorting(scores, density, scope, exclude, floor)
    if not all(mask.any() for mask in expected.values()):
        with pytest.raises(ValueError, match="keeps no entry"):
            select(scores, selection)
        return
    found = select(scores, selection)
    assert equal(found, expected)
    for name, mask in found.items():
        assert mask.sum() >= math.ceil(round(floor * mask.numel(), 9))
        assert exclude is None or not (mask & exclude[name]).any()


@given(
    seed=seeds,
    dtypes=st.lists(
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        min_size=len(NAMES),
        max_size=len(NAMES),
    ),
    size=st.sampled_from([1.0, 1e-42, 1e30]),
    density=st.floats(0.2, 1.0),
)
def test_scores_of_any_size_and_of_several_dtypes_are_ranked_exactly(seed, dtypes, size, density):
    scores = {
        name: (size * matrix).to(dtype).nan_to_num(posinf=6e4)
        for (name, matrix), dtype in zip(some_scores(seed).items(), dtypes, strict=True)
    }
    scores["head"][0, :3] = torch.tensor([-0.0, 0.0, -0.0])
    expected = by_sorting(scores, density, "global")
    if all(mask.any() for mask in expected.values()):
        assert equal(select(scores, Selection(density)), expected)


def test_no_copy_of_all_scores_is_made(monkeypatch):
    monkeypatch.setattr(ranked, "_PART", 1 << 20)
    scores = {f"layers.{i}.q": torch.rand(1000, 10) for i in range(20)}
    with LargestResult() as largest:
        select(scores, Selection(0.1, floor=0.01))
    assert 10_000 <= largest.entries <= 1 << 16


@given(
    seed=seeds, levels=st.sampled_from([None, 2]), kept=st.integers(1, 4), rows=st.integers(1, 9)
)
def test_n_of_m_keeps_the_largest_n_of_every_run_of_m(seed, levels, kept, rows):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, 8, generator=generator) + 1
    scores = scores if levels is None else (levels * scores).floor()
    mask = select({"a": scores}, Selection(kept / 4, f"{kept}:4"))["a"]
    for row in range(rows):
        for start in (0, 4):
            run = scores[row, start : start + 4].tolist()
            first = sorted(range(4), key=lambda column: (-run[column], column))[:kept]
            expected = [column in first for column in range(4)]
            assert mask[row, start : start + 4].tolist() == expected


@given(seed=seeds, density=st.floats(0.13, 1.0), rank=st.integers(4, 9))
def test_the_scope_row_keeps_as_many_in_every_row(seed, density, rank):
    scores = torch.rand(6, rank, generator=torch.Generator().manual_seed(seed))
    mask = select({"a": scores}, Selection(density, "row"))["a"]
    count = math.floor(density * rank + 0.5)
    assert mask.sum(1).tolist() == [count] * 6
    for row in range(6):
        smallest_kept = scores[row][mask[row]].min()
        assert count == rank or smallest_kept >= scores[row][~mask[row]].max()


@pytest.mark.parametrize("size", [1, 5, 10, 15, 205])
def test_counts_are_rounded_halves_up(size):
    # 0.1 · 15 and 0.1 · 205 are halves, which binary floating point does not always reach.
    expected = {1: None, 5: 1, 10: 1, 15: 2, 205: 21}[size]
    scores = {"a": torch.arange(1.0, size + 1)[:, None]}
    if expected is None:
        with pytest.raises(ValueError, match="keeps none of the 1 entries of layer a"):
            select(scores, Selection(0.1, "matrix"))
    else:
        assert int(select(scores, Selection(0.1))["a"].sum()) == expected


def test_scopes_group_by_type_block_and_matrix():
    assert list(groups_of(NAMES, "type").values()) == ["q", "up", "q", "q", "head"]
    blocks = ["layers.0", "layers.0", "layers.2", "layers.10", "head"]
    assert list(groups_of(NAMES, "layer").values()) == blocks
    # The first number is the block's, also where an expert has one of its own.
    expert = "layers.3.experts.7.up"
    assert groups_of([expert], "layer") == {expert: "layers.3"}


def test_types_that_share_a_last_name_have_budgets_of_their_own_as_reports_tell_them_apart():
    names = [f"h.{i}.{part}" for i in (0, 1) for part in ("attn.c_proj", "mlp.c_proj")]
    assert groups_of(names, "type") == module_types(names)
    scores = {name: torch.rand(10, 2) + 5 * ("mlp" in name) for name in names}
    masks = select(scores, Selection(0.2, "type"))
    groups = mask_statistics(masks).types
    assert [(group.name, group.kept) for group in groups] == [("attn.c_proj", 8), ("mlp.c_proj", 8)]


def test_equal_scores_keep_the_first_layers_in_natural_order():
    scores = {f"layers.{i}.q": torch.ones(2, 2) for i in (10, 9, 2)}
    masks = select(scores, Selection(5 / 12, floor=0.25))
    assert {name: mask.flatten().tolist() for name, mask in masks.items()} == {
        "layers.2.q": [True, True, True, False],
        "layers.9.q": [True, False, False, False],
        "layers.10.q": [True, False, False, False],
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_any_dtype_are_ranked(dtype):
    scores = torch.tensor([[3.0, 1.0], [2.0, 4.0]]).to(dtype)
    mask = select({"a": scores}, Selection(0.5))["a"]
    assert mask.tolist() == [[True, False], [False, True]]


def test_density_one_keeps_everything_in_every_scope():
    scores = some_scores()
    for scope in [*GROUPED, "row", "4:4"]:
        masks = select(scores, Selection(1.0, scope))
        assert all(mask.all() for mask in masks.values())


def test_millions_of_entries_with_ties_get_the_exact_count():
    generator = torch.Generator().manual_seed(0)
    scores = {
        f"layers.{i}.q": torch.randint(0, 50, (20_000, 32), generator=generator).half()
        for i in range(4)
    }
    masks = select(scores, Selection(0.1))
    assert sum(int(mask.sum()) for mask in masks.values()) == 256_000
    flat = torch.cat([scores[name].flatten() for name in scores])
    kept = torch.cat([masks[name].flatten() for name in scores])
    bound = flat[kept].min()
    assert kept[flat > bound].all() and not kept[flat < bound].any()
    tied = kept[flat == bound]
    assert not tied.all() and tied[: int(tied.sum())].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"density": -0.1}, "density must be in"),
        ({"density": math.nan}, "density must be in .* got nan"),
        ({"density": 1e-4}, "keeps none of the 140 entries of a group of scope='global'"),
        ({"density": 0.1, "scope": "row"}, "keeps none of the 4 entries of a row of layer"),
        ({"floor": 0.6}, r"floor must be in \[0, density=0.5\], got 0.6"),
        ({"floor": -0.1}, "floor must be in"),
        ({"floor": math.nan}, "floor must be in"),
        ({"density": 0.15, "floor": 0.15, "scope": "matrix"}, "floor=0.15 keeps 1 entries more"),
        ({"density": 0.3, "floor": 0.3, "scope": "row"}, "keeps 11 entries .* asks for 14"),
        ({"floor": 0.3, "density": 0.2}, r"floor must be in \[0, density=0.2\], got 0.3"),
        ({"scope": "tensor"}, "scope must be one of global, type, layer, matrix, row, or"),
        ({"scope": "5:4"}, "needs 1 <= N <= M"),
        ({"scope": 124}, 'scope must be text, got 124; in YAML write "2:4" with the quotes'),
        ({"scope": "0:4"}, "needs 1 <= N <= M"),
        ({"scope": "1:4"}, "keeps 0.25 of the entries, but density is 0.5; set density=0.25"),
        ({"scope": "4:8"}, "needs a rank that 8 divides, got 4"),
    ],
)
def test_a_wrong_choice_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        select(some_scores(), Selection(**{"density": 0.5, **options}))


@pytest.mark.parametrize(
    ("entry", "message"),
    [(math.nan, "NaN or infinite"), (math.inf, "NaN or infinite"), (-1e-9, "not be negative")],
)
def test_scores_that_rank_nothing_are_refused_by_layer(entry, message):
    scores = some_scores()
    scores["layers.2.attn.q"][1, 1] = entry
    with pytest.raises(ValueError, match=f"layer layers.2.attn.q: scores .*{message}"):
        select(scores, Selection(0.5))


def test_scores_of_zero_everywhere_are_refused_as_of_a_b_that_was_not_trained():
    with pytest.raises(ValueError, match=r"zero everywhere.*was B trained"):
        select({name: torch.zeros(3, 4) for name in NAMES}, Selection(0.5))
    with pytest.raises(ValueError, match="scores are empty"):
        select({}, Selection(0.5))


def test_a_layer_that_would_keep_nothing_is_named_with_the_remedy():
    scores = some_scores()
    scores["head"] = torch.zeros(11, 4)
    with pytest.raises(ValueError, match=r"layer head keeps no entry.*floor=0.01"):
        select(scores, Selection(0.3))
    kept = select(scores, Selection(0.3, floor=0.05))["head"]
    assert kept.flatten().tolist() == [True] * 3 + [False] * 41


def test_exclusions_that_leave_too_little_are_refused():
    scores = some_scores()
    full = {name: torch.ones_like(matrix, dtype=torch.bool) for name, matrix in scores.items()}
    full["head"][0] = False
    exclude = LoriMask.over(full, dict.fromkeys(full, 6), seed=3, density=1.0)
    head = LoriMask.over({"head": full["head"]}, {"head": 6}, seed=3, density=1.0)
    with pytest.raises(
        ValueError, match="has 4 entries left beside what is excluded, and needs 70"
    ):
        select(scores, Selection(0.5, exclude=[exclude]))
    with pytest.raises(ValueError, match="layer head has rows with 0 entries left"):
        select({"head": scores["head"]}, Selection(0.5, "row", exclude=[head]))


def mask_of(scores: dict[str, Tensor], *, seed: int = 3, **options) -> LoriMask:
    layers = LayerScores(scores, dict.fromkeys(scores, 6), seed, {"kind": "test"}, "org/base")
    return layers.mask(Selection(0.25, **options))


def test_masks_that_exclude_each_other_are_disjoint_and_the_third_takes_the_rest():
    first = mask_of(some_scores(0), scope="matrix")
    second = mask_of(some_scores(0), scope="matrix", exclude=[first])
    third = mask_of(some_scores(1), scope="matrix", exclude=[first, second])
    for name in NAMES:
        stacked = torch.stack([mask.layers[name].mask for mask in (first, second, third)])
        assert stacked.sum(0).max() == 1
        # The second keeps the next largest: all it has are below all that the first has.
        scores = some_scores(0)[name]
        assert scores[second.masks[name]].max() <= scores[first.masks[name]].min()
    assert third.kept == first.kept and third.size == first.size == 140


def test_a_mask_records_the_hash_of_every_a_and_its_origin():
    mask = mask_of(some_scores())
    assert list(mask.layers) == sorted(NAMES, key=order)
    for name, layer in mask.layers.items():
        assert layer.hash_A == tensor_hash(random_projection(name, 4, 6, seed=3))
        assert (layer.rank, layer.in_features, layer.kept) == (4, 6, int(layer.mask.sum()))
    assert mask.kept == 35 and mask.source == {"kind": "test"}
    assert mask.base_model_name_or_path == "org/base"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mask_of(some_scores(), seed=4), "belongs to the A of seed 4, this one to seed 3"),
        (mask_of({"a": torch.rand(3, 4)}), "layer a is in one of the masks only"),
        (mask_of(some_scores(rank=8)), r"of shape \(11, 8\), its B of shape \(11, 4\)"),
    ],
)
def test_masks_of_another_seed_model_or_rank_cannot_be_excluded(other, message):
    with pytest.raises(ValueError, match=f"exclude: .*{message}"):
        mask_of(some_scores(), exclude=[other])


def test_random_scores_depend_on_seed_and_name_alone():
    shapes = {name: (5, 3) for name in NAMES}
    state = torch.random.get_rng_state()
    scores = random_scores(shapes, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert equal(random_scores(dict(reversed(shapes.items())), 1), scores)
    assert torch.equal(random_scores({"head": (5, 3)}, 1)["head"], scores["head"])
    assert not torch.equal(scores["layers.0.attn.q"], scores["layers.0.mlp.up"])
    assert not torch.equal(random_scores(shapes, 2)["head"], scores["head"])


def test_random_masks_spread_over_layers_rows_and_columns_alike():
    masks = select(random_scores({f"layers.{i}.q": (500, 20) for i in range(4)}, 0), Selection(0.1))
    kept = torch.stack([mask.double() for mask in masks.values()])
    # Four standard deviations of a mean of 10,000 and of 2,000 entries that are 1 in 10.
    assert (kept.mean((1, 2)) - 0.1).abs().max() < 4 * 0.003
    assert (kept.mean((0, 1)) - 0.1).abs().max() < 4 * 0.0067


def test_magnitudes_are_those_of_b_and_carry_no_gradient():
    lora_B = torch.tensor([[1.0, -2.0]], requires_grad=True)
    scores = magnitude_scores({"a": lora_B})["a"]
    assert scores.tolist() == [[1.0, 2.0]] and not scores.requires_grad


@pytest.mark.parametrize("weighted", [True, False])
def test_gradient_scores_add_batches_up_as_their_definition_says(weighted):
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(3, 2, generator=generator), torch.randn(3, 2, generator=generator))
        for _ in range(4)
    ]
    totals = GradientScores(weighted=weighted)
    expected = torch.zeros(3, 2)
    for lora_B, gradient in parts:
        given = gradient.clone()
        totals.add({"a": lora_B}, {"a": given})
        assert torch.equal(given, gradient)
        expected += (lora_B * gradient).abs() if weighted else gradient
    torch.testing.assert_close(totals.scores()["a"], expected.abs())


def test_products_below_the_range_of_float16_still_rank():
    scores = GradientScores(weighted=True)
    small = torch.full((2, 2), 1e-4).half()
    scores.add({"a": small}, {"a": small})
    assert scores.scores()["a"].min() > 0.9e-8


def test_gradient_scores_without_a_batch_are_refused():
    with pytest.raises(RuntimeError, match="no batch was added"):
        GradientScores(weighted=False).scores()


@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 9), st.integers(1, 12)),
    rank=st.integers(1, 14),
    cut=st.integers(1, 4),
)
def test_teacher_scores_are_the_least_squares_solution_for_b(seed, shape, rank, cut):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(*shape, generator=generator, dtype=torch.float64)
    factors = LowRankFactors.from_delta(delta, min(cut, *shape))
    lora_A = random_projection("a", rank, shape[1], seed)
    # min ‖delta − B A‖ is, transposed, Aᵀ Bᵀ = deltaᵀ; rank above the inputs: of least norm.
    exact = factors.U.double() * factors.S.double() @ factors.Vh.double()
    solution = torch.linalg.lstsq(lora_A.double().mT, exact.mT, driver="gelsd").solution.mT
    found = teacher_scores({"a": factors}, {"a": lora_A})["a"]
    scale = solution.abs().max().item()
    torch.testing.assert_close(found.double(), solution.abs(), rtol=0, atol=1e-5 * scale + 1e-30)


def test_a_teacher_without_the_layer_or_of_another_size_is_refused():
    factors = {"a": LowRankFactors.from_delta(torch.rand(4, 6), 2)}
    with pytest.raises(ValueError, match="factors have no layer b"):
        teacher_scores(factors, {"b": torch.rand(2, 6)})
    with pytest.raises(ValueError, match="delta with 6 inputs, its A has 5"):
        teacher_scores(factors, {"a": torch.rand(2, 5)})
