"""Analysis per layer against dense float64 references; the files written and the figures."""

from __future__ import annotations

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.strategies import layer_factors, matrices_with_rank, seeds

from peft_svdinit import LowRankFactors
from peft_svdinit.analysis import analyze, find_intruders
from peft_svdinit.analysis.deltas.layers import analyze_layer
from peft_svdinit.analysis.deltas.plots import plot_analysis
from peft_svdinit.analysis.deltas.rank_table import rank_table
from peft_svdinit.analysis.deltas.report import write_analysis
from peft_svdinit.analysis.deltas.synthesis_plot import plot_synthesis
from peft_svdinit.factors import Spectrum, recommend_ranks
from peft_svdinit.models import layer_depth, module_types

wide = matrices_with_rank(st.just(torch.float32))


def spread(matrix: torch.Tensor) -> float:
    """Error allowed in a norm of a part of the matrix."""
    return reference.tolerance(matrix)["atol"]


def random_factors(shape: tuple[int, int], rank: int, seed: int = 0) -> LowRankFactors:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return LowRankFactors.from_delta(delta, rank)


def zero_factors(shape: tuple[int, int] = (6, 4), rank: int = 3) -> LowRankFactors:
    return LowRankFactors.from_delta(torch.zeros(shape), rank)


def small_model(held: int = 6) -> dict[str, LowRankFactors]:
    """Three blocks of three kinds of modules; one delta is zero."""
    shapes = {"self_attn.q_proj": (12, 12), "self_attn.k_proj": (8, 12), "mlp.up_proj": (16, 12)}
    factors = {
        f"model.layers.{block}.{module}": random_factors(shape, held, 10 * block + index)
        for block in range(3)
        for index, (module, shape) in enumerate(shapes.items())
    }
    factors["model.layers.2.self_attn.k_proj"] = zero_factors((8, 12), held)
    return factors


@given(case=wide)
def test_errors_are_the_norms_of_the_dense_remainder(case):
    matrix, rank = case
    found = analyze_layer("layer", LowRankFactors.from_delta(matrix, min(matrix.shape)), rank)
    remainder = reference.array(matrix) - reference.truncated(matrix, rank)
    # Below a relative 1e-3 of the norm the part not held cannot be told from rounding.
    assert found.absolute_error == pytest.approx(reference.frobenius(remainder), abs=spread(matrix))
    spectral = np.linalg.norm(remainder, ord=2)
    assert found.spectral_error == pytest.approx(spectral, abs=spread(matrix))


@given(case=wide)
def test_with_few_triplets_held_the_error_is_still_that_of_the_whole_delta(case):
    matrix, rank = case
    found = analyze_layer("layer", LowRankFactors.from_delta(matrix, rank), rank)
    exact = reference.discarded(matrix, rank)
    if exact > 2e-3 * found.norm or exact == 0:
        assert found.absolute_error == pytest.approx(exact, rel=0.05, abs=spread(matrix))
    else:
        assert found.absolute_error <= 2.1e-3 * found.norm


@given(factors=layer_factors())
def test_energy_is_a_share_that_grows_with_the_rank_as_the_error_falls(factors):
    layers = [analyze_layer("layer", factors, rank) for rank in range(1, factors.rank + 1)]
    for layer in layers:
        assert 0 <= layer.energy_ratio <= 1
        assert layer.reconstruction_error**2 == pytest.approx(1 - layer.energy_ratio, abs=1e-12)
        assert layer.energy_ratio == pytest.approx(factors.energy(layer.rank), abs=2e-6)
    for smaller, larger in itertools.pairwise(layers):
        assert smaller.energy_ratio <= larger.energy_ratio
        assert smaller.absolute_error >= larger.absolute_error


@given(case=wide, seed=seeds)
def test_rotating_or_transposing_a_delta_changes_no_number(case, seed):
    matrix, rank = case
    generator = torch.Generator().manual_seed(seed)
    rows = matrix.shape[0]
    rotation = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64)).Q
    held = min(matrix.shape)
    plain = analyze_layer("layer", LowRankFactors.from_delta(matrix, held), rank)
    for other in (matrix.mT, (rotation @ matrix.double()).float()):
        turned = analyze_layer("layer", LowRankFactors.from_delta(other, held), rank)
        # From 0.999 on, what is missing may be rounding: see ENERGY_RESOLUTION.
        assert turned.energy_ratio == pytest.approx(plain.energy_ratio, abs=1e-5)
        assert turned.stable_rank == pytest.approx(plain.stable_rank, rel=1e-4)
        assert turned.parameters == plain.parameters == rank * sum(matrix.shape)


def test_energy_is_measured_against_the_delta_not_inside_what_is_held():
    factors = LowRankFactors(torch.eye(8, 1), torch.ones(1), torch.eye(1, 8), norm=math.sqrt(8))
    found = analyze_layer("layer", factors, 1)
    assert found.energy_ratio == pytest.approx(1 / 8)
    assert found.absolute_error == pytest.approx(math.sqrt(7))
    assert found.spectral_error is None
    assert found.stable_rank == pytest.approx(8)
    assert found.rank_for_energy == {"0.90": None, "0.95": None, "0.99": None}


def test_a_rank_one_delta_is_kept_whole_by_rank_one():
    delta = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 4.0))
    found = analyze_layer("layer", LowRankFactors.from_delta(delta, 3), 1)
    assert found.reconstruction_error < 1e-6
    assert found.energy_ratio == pytest.approx(1)
    assert found.stable_rank == pytest.approx(1)
    assert set(found.rank_for_energy.values()) == {1}


def test_a_whole_delta_has_no_error_rather_than_a_rounding_error():
    factors = random_factors((20, 12), 12)
    found = analyze_layer("layer", factors, 12)
    assert (found.reconstruction_error, found.energy_ratio, found.spectral_error) == (0, 1, 0)


def test_small_errors_are_resolved_from_the_held_tail():
    S = torch.tensor([1.0, 1e-5])
    factors = LowRankFactors(torch.eye(2), S, torch.eye(2), norm=S.double().norm().item())
    assert analyze_layer("layer", factors, 1).reconstruction_error == pytest.approx(1e-5, rel=1e-6)


def test_a_zero_delta_loses_nothing():
    found = analyze_layer("layer", zero_factors(), 2)
    assert (found.energy_ratio, found.reconstruction_error, found.absolute_error) == (1, 0, 0)
    assert (found.stable_rank, found.spectral_error) == (0, 0)
    assert set(found.rank_for_energy.values()) == {0}


def test_a_rank_above_what_is_held_is_refused_only_where_something_is_missing():
    whole = random_factors((6, 4), 4)
    assert analyze_layer("layer", whole, 9).reconstruction_error == 0
    with pytest.raises(ValueError, match=r"h\.0\.q: rank must be at most 2.*got 3"):
        analyze_layer("h.0.q", whole.truncated(2), 3)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match="rank must be at least 1"):
        analyze_layer("layer", zero_factors(), rank)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_with_the_layer(bad):
    factors = LowRankFactors(torch.eye(2), torch.tensor([bad, 1.0]), torch.eye(2), norm=1.0)
    with pytest.raises(ValueError, match=r"h\.0\.q.*finite"):
        analyze_layer("h.0.q", factors, 1)


def test_totals_are_those_of_all_deltas_side_by_side():
    factors = small_model()
    analysis = analyze(factors, 4)
    total = sum(layer.norm**2 for layer in factors.values())
    kept = sum(layer.energy(4) * layer.norm**2 for layer in factors.values())
    assert analysis.norm == pytest.approx(math.sqrt(total))
    assert analysis.energy_ratio == pytest.approx(kept / total)
    assert analysis.reconstruction_error == pytest.approx(math.sqrt(1 - kept / total))
    assert analysis.parameters == sum(4 * sum(layer.shape) for layer in factors.values())
    assert analysis.zero_layers == ["model.layers.2.self_attn.k_proj"]

    errors = [layer.relative_error(4) for layer in factors.values() if layer.norm]
    assert analysis.error_summary == pytest.approx(
        {
            "median": float(np.median(errors)),
            "mean": float(np.mean(errors)),
            "max": max(errors),
            "min": min(errors),
        }
    )


def test_a_model_that_did_not_change_is_kept_whole():
    analysis = analyze({"a": zero_factors(), "b": zero_factors()}, 1)
    assert (analysis.energy_ratio, analysis.reconstruction_error, analysis.norm) == (1, 0, 0)
    assert analysis.zero_layers == ["a", "b"]


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        analyze({}, 1)


def test_kinds_of_modules_are_told_apart_only_where_their_names_clash():
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.attn.c_attn", "h.11.experts.3.w1", "lm_head"]
    assert list(module_types(names).values()) == [
        "attn.c_proj",
        "mlp.c_proj",
        "c_attn",
        "w1",
        "lm_head",
    ]
    assert [layer_depth(name) for name in names] == [0, 0, 0, 11, None]


def strict(text: str) -> dict:
    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_files_written_hold_the_analysis_and_the_recommendation(tmp_path):
    factors = small_model()
    analysis = analyze(factors, 4)
    recommendation = recommend_ranks(factors, energy=0.5, max_parameters=analysis.parameters)
    paths = write_analysis(
        analysis,
        tmp_path / "out",
        title="A small model",
        source={"base model": "tiny|model", "seed": None},
        recommendation=recommendation,
    )
    assert {key: path.name for key, path in paths.items()} == {
        "json": "svd_analysis_rank4.json",
        "report": "svd_analysis_rank4.md",
        "figure": "svd_analysis_rank4.png",
        "heat_maps": "svd_analysis_rank4_heat_maps.png",
        "spectra": "svd_analysis_rank4_spectra.png",
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in paths.values()
    )

    content = strict(paths["json"].read_text())
    assert content["rank"] == 4
    assert content["recommendation"]["ranks"] == recommendation.ranks
    assert content["recommendation"]["config"] == recommendation.config_options()
    for layer, (name, original) in zip(content["layers"], factors.items(), strict=True):
        assert layer["name"] == name
        assert torch.equal(torch.tensor(layer["singular_values"]), original.S)

    report = paths["report"].read_text()
    assert f"{analysis.energy_ratio:.2%}" in report
    assert "base model: tiny|model" in report
    for figure in ("figure", "heat_maps", "spectra"):
        assert f"]({paths[figure].name})" in report
    assert "Recommended ranks" in report
    assert "model.layers.2.self_attn.k_proj" in report  # the zero delta


def test_an_energy_that_is_not_held_is_shown_as_more_than_held(tmp_path):
    analysis = analyze({"layers.0.q": random_factors((16, 16), 3)}, 2)
    assert analysis.layers[0].rank_for_energy["0.99"] is None
    paths = write_analysis(analysis, tmp_path, title="Few triplets", source={}, plots=False)
    assert "| > 3 |" in paths["report"].read_text()
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib_the_error_names_the_extra_and_nothing_is_written(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    analysis = analyze(small_model(), 4)
    with pytest.raises(ImportError, match=r"peft-svdinit\[report\]"):
        write_analysis(analysis, tmp_path, title="t", source={})
    assert not list(tmp_path.iterdir())


def test_a_source_that_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError):
        write_analysis(analyze(small_model(), 4), tmp_path, title="t", source={"x": math.nan})
    assert not list(tmp_path.iterdir())


def test_the_relative_norm_is_against_the_base_weight():
    factors = small_model()
    norms = dict.fromkeys(factors, 8.0)
    for layer in analyze(factors, 2, base_norms=norms).layers:
        assert layer.relative_norm == pytest.approx(layer.norm / 8)
    assert analyze(factors, 2).layers[0].relative_norm is None
    assert analyze(factors, 2, base_norms=dict.fromkeys(factors, 0.0)).layers[0].base_norm == 0
    with pytest.raises(ValueError, match=r"base_norms must name every layer.*layers\.0"):
        analyze(factors, 2, base_norms={})


def test_a_gaussian_delta_is_as_concentrated_as_a_random_one_and_a_low_rank_one_more():
    gaussian = random_factors((80, 60), 60)
    assert analyze_layer("layer", gaussian, 6).concentration == pytest.approx(1, abs=0.05)
    strong = LowRankFactors(gaussian.U, gaussian.S**4, gaussian.Vh, float((gaussian.S**4).norm()))
    assert analyze_layer("layer", strong, 6).concentration > 2
    assert analyze_layer("layer", zero_factors(), 1).concentration == 1


def test_an_analysis_needs_spectra_only():
    factors = small_model()
    spectra = {name: Spectrum(f.S, f.norm, f.shape) for name, f in factors.items()}
    assert analyze(spectra, 4) == analyze(factors, 4)
    assert recommend_ranks(spectra, energy=0.5) == recommend_ranks(factors, energy=0.5)


def test_the_table_of_ranks_is_the_analysis_at_each_of_them():
    factors = small_model(6)
    rows = rank_table(analyze(factors, 3))
    assert [row.rank for row in rows] == [1, 2, 4, 6]
    for row in rows:
        analysis = analyze(factors, row.rank)
        assert row.error == pytest.approx(analysis.reconstruction_error)
        assert row.energy == pytest.approx(analysis.energy_ratio)
        assert row.parameters == analysis.parameters
        assert row.bytes == 2 * row.parameters


def test_in_the_table_of_ranks_a_layer_keeps_no_more_than_it_holds():
    factors = {"a": random_factors((9, 8), 2), "b": random_factors((9, 8), 5, 1)}
    last = rank_table(analyze(factors, 2))[-1]
    assert (last.rank, last.parameters) == (5, 7 * 17)
    lost = math.hypot(*(f.relative_error() * f.norm for f in factors.values()))
    assert last.error == pytest.approx(lost / math.hypot(*(f.norm for f in factors.values())))
    unchanged = rank_table(analyze({"a": zero_factors()}, 1))
    assert [(row.rank, row.error, row.energy) for row in unchanged] == [
        (1, 0.0, 1.0),
        (2, 0.0, 1.0),
        (3, 0.0, 1.0),
    ]


def test_report_and_json_tell_of_ranks_spikes_intruders_and_the_predicted_error(tmp_path):
    strong = {
        f"layers.{i}.q": LowRankFactors.from_delta(
            random_factors((40, 30), 30, i).dense() + 40 * torch.eye(40, 1) @ torch.eye(1, 30), 12
        )
        for i in range(2)
    }
    analysis = analyze(strong, 4, base_norms=dict.fromkeys(strong, 100.0))
    recommendation = recommend_ranks(strong, energy=0.7)
    weight = torch.diag(torch.arange(12.0, 0, -1))
    intruders = [
        find_intruders("layers.0.q", weight, weight),
        find_intruders("layers.1.q", weight, 100 * torch.ones(12, 12), top_k=1),
    ]
    paths = write_analysis(
        analysis,
        tmp_path,
        title="t",
        source={},
        recommendation=recommendation,
        intruders=intruders,
        plots=False,
    )
    content = strict(paths["json"].read_text())
    assert [row["rank"] for row in content["ranks"]] == [1, 2, 4, 8, 12]
    for layer in content["layers"]:
        assert layer["spikes"]["count"] == 1
        assert 0 < layer["random_energy"] < layer["energy_ratio"]
        assert layer["relative_norm"] == pytest.approx(layer["norm"] / 100)
    assert content["recommendation"]["errors"] == recommendation.errors
    assert content["recommendation"]["error"] == pytest.approx(math.sqrt(1 - recommendation.energy))
    assert content["intruders"]["total"] == 1
    assert content["intruders"]["layers"]["layers.1.q"]["intruders"] == [1]

    report = paths["report"].read_text()
    for words in (
        "## Other ranks",
        "## Against random deltas",
        "| q | 2 |",
        "## Intruder dimensions",
        "| `layers.1.q` | 1 | 1 |",
        f"predicted relative error is {recommendation.error:.2%}",
    ):
        assert words in report


def test_without_intruders_the_report_is_silent_about_them(tmp_path):
    paths = write_analysis(analyze(small_model(), 4), tmp_path, title="t", source={}, plots=False)
    assert "ntruder" not in paths["report"].read_text()
    assert strict(paths["json"].read_text())["intruders"] is None


def test_a_model_that_did_not_change_has_a_report(tmp_path):
    factors = {"h.0.q": zero_factors()}
    paths = write_analysis(
        analyze(factors, 1, base_norms={"h.0.q": 2.0}),
        tmp_path,
        title="t",
        source={},
        recommendation=recommend_ranks(factors, energy=0.9),
    )
    assert "Every delta is zero" in paths["report"].read_text()


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "factors",
    [
        {"only": zero_factors()},
        {"only": random_factors((6, 4), 4)},
        {f"h.{i}.kind_{i}": random_factors((9, 9), 3, i) for i in range(10)},
    ],
    ids=["nothing changed", "one layer kept whole", "more types than colours"],
)
def test_every_analysis_can_be_drawn(factors, tmp_path):
    analysis = analyze(factors, 3 if len(factors) > 1 else 4)
    plot_analysis(analysis, tmp_path / "figure.png", title="A title")
    assert is_png(tmp_path / "figure.png")


def test_a_synthesis_can_be_drawn_without_touching_pyplot(tmp_path):
    teacher = small_model(6)
    original = {name: layer.truncated(3) for name, layer in teacher.items()}
    pyplot = sys.modules.pop("matplotlib.pyplot", None)
    try:
        plot_synthesis(original, teacher, tmp_path / "synthesis.png")
        assert "matplotlib.pyplot" not in sys.modules
    finally:
        if pyplot is not None:
            sys.modules["matplotlib.pyplot"] = pyplot
    assert is_png(tmp_path / "synthesis.png")

    unchanged = {"only": zero_factors()}
    plot_synthesis(unchanged, unchanged, tmp_path / "zero.png")
    assert is_png(tmp_path / "zero.png")


def test_a_synthesis_of_other_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"same layers.*\['b'\]"):
        plot_synthesis(
            {"a": zero_factors()},
            {"a": zero_factors(), "b": zero_factors()},
            tmp_path / "synthesis.png",
        )
