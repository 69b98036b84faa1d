"""What is said about masks: numbers against counting and drawing at random, words and figures."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import seeds
from torch import Tensor

from peft_svdinit.analysis import (
    compare_masks,
    comparison_in_words,
    mask_in_words,
    write_mask_comparison,
    write_mask_report,
)
from peft_svdinit.analysis.masks import density_plot
from peft_svdinit.analysis.masks.chance import Spread, energy_of_noise, random_deviation
from peft_svdinit.analysis.masks.energy import Energy
from peft_svdinit.analysis.masks.statistics import mask_statistics
from peft_svdinit.masks import LayerScores, LoriMask, Selection, random_scores

RANK, INPUTS = 6, 9
OUTPUTS = {"q_proj": 20, "v_proj": 12, "down_proj": 30}
SHAPES = {
    f"model.layers.{block}.{kind}": (out, RANK)
    for block in (0, 1, 10)
    for kind, out in OUTPUTS.items()
} | {"lm_head": (40, RANK)}


def random_mask(seed: int, *, of_A: int = 0, density: float = 0.2) -> LoriMask:
    layers = LayerScores(
        random_scores(SHAPES, seed), dict.fromkeys(SHAPES, INPUTS), of_A, {"kind": "random"}
    )
    return layers.mask(Selection(density))


def normal_B(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def magnitude_mask(lora_B: dict[str, Tensor], source: Any = None, **options) -> LoriMask:
    scores = {name: matrix.abs() for name, matrix in lora_B.items()}
    layers = LayerScores(scores, dict.fromkeys(lora_B, INPUTS), 0, source or {"kind": "magnitude"})
    return layers.mask(Selection(**{"density": 0.2, **options}))


@given(seed=seeds, density=st.sampled_from([0.1, 0.25, 1.0]))
def test_counts_and_energies_are_those_of_counting_entry_by_entry(seed, density):
    mask, lora_B = random_mask(seed, density=density).masks, normal_B(seed)
    found = mask_statistics(mask, lora_B)
    total = kept_energy = by_row = by_layer = 0.0
    for layer in found.layers:
        rows, chosen = lora_B[layer.name].tolist(), mask[layer.name].tolist()
        assert layer.kept == sum(sum(row) for row in chosen)
        assert layer.rows.used == sum(any(row) for row in chosen)
        assert layer.columns.used == sum(any(column) for column in zip(*chosen, strict=True))
        for row, flags in zip(rows, chosen, strict=True):
            squares = [value**2 for value in row]
            total += sum(squares)
            kept_energy += sum(s for s, flag in zip(squares, flags, strict=True) if flag)
            by_row += sum(squares) * sum(flags) / len(flags)
            by_layer += sum(squares) * layer.kept / layer.size
    energy = found.energy
    assert energy is not None and energy.total == pytest.approx(total)
    assert energy.kept == pytest.approx(kept_energy / total)
    assert energy.by_row == pytest.approx(by_row / total)
    assert energy.by_layer == pytest.approx(by_layer / total)
    assert energy.random == found.density == pytest.approx(density, abs=1 / found.size)


def test_types_and_blocks_sum_up_to_the_whole():
    found = mask_statistics(random_mask(0).masks)
    assert [group.name for group in found.types] == ["lm_head", "down_proj", "q_proj", "v_proj"]
    assert [group.name for group in found.blocks] == ["none", "0", "1", "10"]
    for groups in (found.types, found.blocks):
        assert sum(group.kept for group in groups) == found.kept
        assert (
            sum(group.size for group in groups)
            == found.size
            == sum(rows * rank for rows, rank in SHAPES.values())
        )
        weighted = sum(group.share * group.size for group in groups)
        assert weighted == pytest.approx(found.size)
    kind = found.types[3]
    masks = [mask for name, mask in random_mask(0).masks.items() if "v_proj" in name]
    assert kind.kept == sum(int(mask.sum()) for mask in masks)
    assert kind.density == kind.kept / kind.size
    assert kind.share == pytest.approx(kind.density / found.density)
    assert found.energy is None
    assert found.rows.lines == sum(rows for rows, _ in SHAPES.values())
    assert found.columns.lines == RANK * len(SHAPES)
    for pooled, parts in (
        (found.rows, [layer.rows for layer in found.layers]),
        (found.columns, [layer.columns for layer in found.layers]),
    ):
        assert pooled.used == sum(part.used for part in parts)
        assert pooled.random_used == pytest.approx(sum(part.random_used for part in parts))
        weighted = sum(part.half * part.lines for part in parts) / pooled.lines
        assert pooled.half == pytest.approx(weighted)


def test_expectations_of_random_masks_are_those_of_drawing_them():
    source = random.Random(0)
    lines, length, kept = 30, 5, 24
    used, half, in_group = [], [], []
    for _ in range(500):
        entries = source.sample(range(lines * length), kept)
        counts = torch.bincount(
            torch.tensor([entry // length for entry in entries]), minlength=lines
        )
        used.append(float((counts > 0).sum()))
        spread = Spread.of(counts, length)
        half.append(spread.half)
        in_group.append(sum(entry < 40 for entry in entries))
    drawn = torch.tensor([used, half, in_group], dtype=torch.float64)
    mean, deviation = drawn.mean(1), drawn.std(1)
    error = 4 * deviation / math.sqrt(500)
    assert abs(spread.random_used - mean[0]) < error[0]
    # Of the expected counts, not expected over the counts: a little above, as sorting bends it.
    assert abs(spread.random_half - mean[1]) < 0.02
    expected = random_deviation(40, lines * length, kept)
    assert expected == pytest.approx(float(deviation[2]), rel=0.1)


def test_half_of_the_entries_are_counted_from_the_fullest_lines():
    spread = Spread.of(torch.tensor([0, 4, 1, 1, 2, 0, 0, 0]), 4)
    # Four of eight entries are in one of eight rows.
    assert (spread.lines, spread.used, spread.half) == (8, 4, 1 / 8)
    assert Spread.of(torch.tensor([2, 2, 2, 2]), 4).half == 0.5
    # Two rows of three and a third of one of two.
    assert Spread.of(torch.tensor([3, 3, 2, 2, 2, 2]), 4).half == pytest.approx(2.5 / 6)
    full = Spread.of(torch.tensor([4, 4]), 4)
    assert (full.random_used, full.random_half) == (pytest.approx(2), pytest.approx(0.5))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_the_largest_entries_of_noise_hold_what_a_sample_of_it_does(density):
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(400_000, generator=generator, dtype=torch.float64).square()
    largest = squares.topk(int(density * len(squares))).values.sum() / squares.sum()
    assert energy_of_noise(density) == pytest.approx(float(largest), abs=0.002)
    assert energy_of_noise(1.0) == 1.0 and energy_of_noise(0.0) == 0.0


def test_a_b_that_does_not_fit_is_refused_and_a_zero_one_measures_nothing():
    masks = random_mask(0).masks
    with pytest.raises(ValueError, match="layer lm_head: there is no lora_B"):
        mask_statistics(masks, {k: v for k, v in normal_B().items() if k != "lm_head"})
    with pytest.raises(ValueError, match=r"lora_B of the mask's shape \(40, 6\)"):
        mask_statistics(masks, {**normal_B(), "lm_head": torch.zeros(40, 5)})
    with pytest.raises(ValueError, match="masks are empty"):
        mask_statistics({})
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    found = mask_statistics(masks, zero)
    assert found.energy is None and {layer.energy for layer in found.layers} == {None}
    one = mask_statistics(masks, {**zero, "lm_head": normal_B()["lm_head"]})
    assert one.energy is not None and one.layers[0].energy is not None
    assert one.energy.kept == pytest.approx(one.layers[0].energy.kept)


def test_overlaps_are_those_of_counting_and_of_drawing_at_random():
    first, second = random_mask(1), random_mask(2, density=0.3)
    comparison = compare_masks({"a": first, "b": second})
    found = comparison.overlaps[0, 1]
    flags = [
        (one, other)
        for name in SHAPES
        for one, other in zip(
            first.masks[name].flatten().tolist(), second.masks[name].flatten().tolist(), strict=True
        )
    ]
    both = sum(one and other for one, other in flags)
    either = sum(one or other for one, other in flags)
    assert (found.both, found.either) == (both, either)
    assert found.jaccard == pytest.approx(both / either)
    p, q = first.kept / first.size, second.kept / second.size
    assert found.random_jaccard == pytest.approx(p * q / (p + q - p * q))
    assert found.shares_A

    draws, source = [], random.Random(0)
    for _ in range(600):
        one = set(source.sample(range(first.size), first.kept))
        other = set(source.sample(range(first.size), second.kept))
        draws.append(len(one & other) / len(one | other))
    drawn = torch.tensor(draws, dtype=torch.float64)
    assert found.random_jaccard == pytest.approx(float(drawn.mean()), rel=0.01)
    assert found.random_deviation == pytest.approx(float(drawn.std()), rel=0.1)


def test_equal_disjoint_and_row_wise_masks_have_the_overlaps_that_they_must():
    lora_B = normal_B()
    first = magnitude_mask(lora_B)
    disjoint = magnitude_mask(lora_B, exclude=[first])
    comparison = compare_masks({"a": first, "b": first, "c": disjoint})
    same, apart = comparison.overlaps[0, 1], comparison.overlaps[0, 2]
    assert same.jaccard == 1.0 and same.row_correlation == pytest.approx(1.0)
    assert (apart.both, apart.jaccard) == (0, 0.0)
    # Equal in every row: there is nothing to correlate.
    rows = magnitude_mask(lora_B, scope="row", density=1 / 3)
    assert compare_masks({"a": rows, "b": rows}).overlaps[0, 1].row_correlation == 0.0


def test_layers_that_both_masks_prefer_are_told_from_entries_that_both_keep():
    # Random entries, three times as many in lm_head as elsewhere: agreement on layers alone.
    masks = []
    for seed in (1, 2):
        scores = random_scores(SHAPES, seed)
        scores["lm_head"] += 1.0
        layers = LayerScores(scores, dict.fromkeys(SHAPES, INPUTS), 0, {"kind": "random"})
        masks.append(layers.mask(Selection(0.3, floor=0.1)))
    found = compare_masks(dict(zip("ab", masks, strict=True))).overlaps[0, 1]
    assert found.random_in_layers > 2 * found.random_jaccard
    assert found.jaccard == pytest.approx(found.random_in_layers, rel=0.1)


def test_the_order_of_the_layers_changes_nothing(tmp_path):
    first, second = random_mask(1), random_mask(2)
    turned = replace(
        second, layers={name: second.layers[name] for name in reversed([*second.layers])}
    )
    texts = []
    for other in (turned, second):
        masks = {"a": first, "b": other}
        write_mask_comparison(compare_masks(masks), masks, tmp_path, plots=False)
        texts.append((tmp_path / "mask_report.md").read_text())
    assert texts[0] == texts[1]


def test_deltas_are_compared_where_both_have_one():
    mask = random_mask(0)
    generator = torch.Generator().manual_seed(0)
    lora_A = {name: torch.randn(RANK, INPUTS, generator=generator) for name in SHAPES}
    one, other = normal_B(1), normal_B(2)
    readers = {
        "a": lambda name: (one[name], lora_A[name], 0.5),
        "c": lambda name: (one[name] + other[name], lora_A[name], 2.0),
    }
    comparison = compare_masks({"a": mask, "b": mask, "c": mask}, readers)
    assert comparison.interference.keys() == {(0, 2)}
    left = torch.cat([(one[name] @ lora_A[name]).flatten() for name in SHAPES])
    right = torch.cat([((one[name] + other[name]) @ lora_A[name]).flatten() for name in SHAPES])
    expected = float(left @ right / (left.norm() * right.norm()))
    assert comparison.interference[0, 2].cosine == pytest.approx(expected, rel=1e-5)
    pairs = comparison.as_dict()["pairs"]
    assert [pair["masks"] for pair in pairs] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert pairs[0]["deltas"] is None and pairs[1]["deltas"]["cosine"] == pytest.approx(expected)


def test_masks_of_other_layers_or_ranks_are_not_compared():
    mask = random_mask(0)
    fewer = LoriMask(dict(list(mask.layers.items())[1:]), density=0.2, seed=0)
    with pytest.raises(ValueError, match=r"layer lm_head is in one of the masks a and b only"):
        compare_masks({"a": mask, "b": fewer})
    narrow = LoriMask.over(
        {name: layer.mask[:, :3] for name, layer in mask.layers.items()},
        dict.fromkeys(SHAPES, INPUTS),
        seed=0,
        density=0.2,
    )
    with pytest.raises(ValueError, match=r"masks of shape \(40, 6\) in a and \(40, 3\) in b"):
        compare_masks({"a": mask, "b": narrow})
    with pytest.raises(ValueError, match="two at least to be compared, got 1"):
        compare_masks({"a": mask})


def test_a_random_mask_is_said_to_be_what_chance_gives(tmp_path):
    found = write_mask_report(random_mask(3), tmp_path, plots=False)
    text = (tmp_path / "mask_report.md").read_text()
    assert "drawn at random" in text and "energy ‖B‖²" not in text
    for group in (*found.types, *found.blocks):
        deviations = (group.density - found.density) / group.deviation
        assert abs(deviations) < 4 and f"| {deviations:+.1f} |" in text


def test_the_rows_of_noise_take_their_part_of_the_gain_by_its_rank():
    generator = torch.Generator().manual_seed(0)
    lora_B = {"a": torch.randn(20_000, 8, generator=generator)}
    energy = mask_statistics(magnitude_mask(lora_B).masks, lora_B).energy
    assert energy is not None and energy.kept == pytest.approx(energy.noise, abs=0.01)
    part = (energy.by_row - energy.by_layer) / (energy.kept - energy.random)
    assert part == pytest.approx(1 / 8, rel=0.05)


def test_a_preferred_type_the_energy_and_another_a_are_said(tmp_path):
    lora_B = normal_B()
    for name in lora_B:
        lora_B[name] *= 3.0 if "q_proj" in name else 1.0
        lora_B[name][0] *= 4.0
    mask = magnitude_mask(lora_B, source={"kind": "magnitude", "same_A": False})
    found = write_mask_report(mask, tmp_path, lora_B=lora_B, plots=False)
    text = (tmp_path / "mask_report.md").read_text()
    kind = found.types[[group.name for group in found.types].index("q_proj")]
    deviations = (kind.density - found.density) / kind.deviation
    assert kind.share > 2 and deviations > 4
    assert f"| {kind.share:.2f} | ± {1.96 * kind.deviation:.2%} | {deviations:+.1f} |" in text
    energy = found.energy
    assert energy is not None
    assert f"hold {energy.kept:.1%} of the energy ‖B‖²" in text
    assert f"Gaussian noise {energy.noise:.1%}" in text and energy.kept > energy.noise
    parts = [energy.random, energy.by_layer, energy.by_row, energy.kept]
    gains = [(b - a) / (parts[3] - parts[0]) for a, b in itertools.pairwise(parts)]
    assert all(gain > 0.05 for gain in gains)
    assert f"| random in the layers, as many as here | {parts[1]:.1%} | {gains[0]:.0%} |" in text
    assert f"| {parts[2]:.1%} | {gains[1]:.0%} | {1 / RANK:.0%} |" in text
    assert f"| those of the mask | {parts[3]:.1%} | {gains[2]:.0%} |" in text
    assert "found over another A" in text


@pytest.mark.parametrize(("scope", "said"), [("matrix", "scope matrix"), ("2:6", "scope 2:6")])
def test_a_scope_that_fixes_shares_is_not_called_a_finding(scope, said):
    mask = magnitude_mask(normal_B(), scope=scope, density=1 / 3)
    words = "\n".join(mask_in_words(mask, mask_statistics(mask.masks)))
    assert said in words and "not findings" in words


def test_pairs_are_told_from_chance_in_words():
    lora_B = normal_B()
    first = magnitude_mask(lora_B)
    moved = magnitude_mask({name: B + 0.3 * normal_B(1)[name] for name, B in lora_B.items()})
    masks = {
        "a": first,
        "like a": moved,
        "disjoint": magnitude_mask(lora_B, exclude=[first]),
        "random": random_mask(5),
        "other A": random_mask(5, of_A=1),
    }
    comparison = compare_masks(masks)
    words = dict(zip(comparison.overlaps, comparison_in_words(comparison), strict=True))
    assert "more than chance gives" in words[0, 1]
    assert "disjoint" in words[0, 2]
    assert "as much as chance gives" in words[0, 3]
    assert "of different A" in words[0, 4] and "Jaccard" not in words[0, 4]
    assert words[0, 1].startswith("a and like a: ")


def test_reports_of_a_mask_are_written_for_programs_and_for_people(tmp_path):
    lora_B = normal_B()
    mask = magnitude_mask(lora_B)
    found = write_mask_report(mask, tmp_path, lora_B=lora_B)
    content = json.loads((tmp_path / "mask_report.json").read_text())
    assert content["mask"]["source"] == {"kind": "magnitude"} and content["kept"] == mask.kept
    assert {layer["name"]: layer["kept"] for layer in content["layers"]} == {
        name: layer.kept for name, layer in mask.layers.items()
    }
    energy = found.energy
    assert energy is not None and content["energy"]["kept"] == energy.kept
    text = (tmp_path / "mask_report.md").read_text()
    assert "![Density by block, type and layer](mask.png)" in text
    assert f"| q_proj | 360 | {found.types[2].kept:,} |" in text
    for name in ("mask.png", "mask_entries.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    # A second time over the first, without figures.
    write_mask_report(random_mask(1), tmp_path, plots=False)
    assert "mask.png" not in (tmp_path / "mask_report.md").read_text()


def test_energies_do_not_depend_on_the_number_of_threads():
    lora_B = torch.randn(8, 2048, 32, generator=torch.Generator().manual_seed(0))
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append([Energy.of(B > 1, B) for B in lora_B])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_a_b_that_is_zero_off_the_mask_measures_nothing(tmp_path):
    mask = random_mask(1)
    sparse = {name: matrix * mask.masks[name] for name, matrix in normal_B().items()}
    assert write_mask_report(mask, tmp_path, lora_B=sparse, plots=False).energy is None
    sparse["lm_head"] = normal_B()["lm_head"]
    assert write_mask_report(mask, tmp_path, lora_B=sparse, plots=False).energy is not None


def test_reports_of_several_masks_hold_every_pair(tmp_path):
    masks = {"a": random_mask(1), "b": random_mask(2), "c": random_mask(3, of_A=1)}
    write_mask_comparison(compare_masks(masks), masks, tmp_path)
    content = json.loads((tmp_path / "mask_report.json").read_text())
    assert content["labels"] == ["a", "b", "c"] and len(content["pairs"]) == 3
    assert content["masks"]["c"]["seed"] == 1 and content["masks"]["a"]["kept"] == masks["a"].kept
    text = (tmp_path / "mask_report.md").read_text()
    assert "| a and b | " in text and "different A" in text and "![" in text
    assert (tmp_path / "mask_overlap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("outputs", [1, 3, 200])
def test_figures_are_drawn_of_single_wide_and_full_masks(tmp_path, outputs):
    shapes = {"head": (outputs, 70)}
    mask = LayerScores.random(shapes, {"head": 5}, 0).mask(Selection(1.0))
    write_mask_report(mask, tmp_path, lora_B={"head": torch.zeros(outputs, 70)})
    assert (tmp_path / "mask.png").stat().st_size > 1000


def test_of_very_many_blocks_and_types_a_figure_keeps_its_size(monkeypatch):
    shapes = {f"layers.{block}.kind_{block % 60}": (2, 3) for block in range(700)}
    mask = LayerScores.random(shapes, dict.fromkeys(shapes, 5), 0).mask(Selection(0.5, "matrix"))
    drawn = []
    monkeypatch.setattr(density_plot, "save_figure", lambda figure, path: drawn.append(figure))
    density_plot.plot_mask(mask_statistics(mask.masks), "unused")
    (figure,) = drawn
    assert [len(axes.patches) for axes in figure.axes[:2]] == [1, 60]
    (image,) = (axes.get_images()[0] for axes in figure.axes if axes.get_images())
    assert image.get_array().shape == (480 // 4, 40)


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"peft-svdinit\[report\]"):
        write_mask_report(random_mask(1), tmp_path / "a")
    masks = {"a": random_mask(1), "b": random_mask(2)}
    with pytest.raises(ImportError, match=r"peft-svdinit\[report\]"):
        write_mask_comparison(compare_masks(masks), masks, tmp_path / "a")
    assert not Path(tmp_path / "a").exists()
