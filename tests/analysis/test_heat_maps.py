"""Heat maps and spectra panels: what is drawn, read back from the axes, for all kinds of names."""

from __future__ import annotations

import itertools
import statistics
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_svdinit.analysis import analyze
from peft_svdinit.analysis.deltas import heat_maps, spectra_plot
from peft_svdinit.analysis.deltas.heat_maps import plot_heat_maps
from peft_svdinit.analysis.deltas.spectra_plot import plot_spectra
from peft_svdinit.factors import Spectrum, recommend_ranks
from peft_svdinit.models import layer_depth

SIX = [f"model.layers.{b}.mlp.{k}_proj" for b in (0, 1) for k in ("gate", "up", "down")]
NAMES = {
    "two by three": SIX,
    "thirty by four": [f"layers.{b}.module_{k}" for b in range(30) for k in range(4)],
    "no depth": ["conv_in", "time.linear_1", "time.linear_2", "lm_head"],
    "experts and others": [f"h.{b}.experts.{e}.w1" for b in (3, 10) for e in range(3)] + ["head"],
    "more types than columns": [f"h.0.kind_{i}" for i in range(30)],
    "one": ["x"],
}


def layer(scale: float = 1.0, rank: int = 4) -> Spectrum:
    S = scale * torch.tensor([4.0, 2.0, 1.0, 0.5])[:rank]
    return Spectrum(S, 1.1 * float(S.norm()), (12, 10))


def model(names: list[str]) -> dict[str, Spectrum]:
    """Layers of different norms; the second has a zero delta if there are several."""
    return {name: layer(0.0 if index == 1 else 1.0 + index) for index, name in enumerate(names)}


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, in order, kept from being written as PNG."""
    kept = []
    for module in (heat_maps, spectra_plot):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: kept.append(figure))
    return kept


def panels(figure) -> dict[str, np.ndarray]:
    """Titles and the numbers behind the colours; NaN where a cell is empty."""
    return {
        axes.get_title(): np.ma.filled(axes.get_images()[0].get_array(), np.nan)
        for axes in figure.axes
        if axes.get_images() and axes.get_title()
    }


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_every_layer_has_its_cell_and_every_model_can_be_drawn(names, figures):
    analysis = analyze(model(names), 2)
    plot_heat_maps(analysis, "unused", ranks=dict.fromkeys(names, 3))
    plot_spectra(analysis, "unused")
    drawn = panels(figures[0])
    assert len(drawn) == 4
    kinds = set(analysis.module_types.values())
    depths = {layer_depth(name) for name in names}
    assert all(grid.shape == (len(depths), min(len(kinds), 24)) for grid in drawn.values())


def test_of_very_many_blocks_neighbours_share_a_row_and_the_page_keeps_its_size(figures):
    names = [f"layers.{b}.{k}" for b in range(700) for k in ("q", "v")] + ["head"]
    factors = {name: layer(1.0 + index) for index, name in enumerate(names)}
    plot_heat_maps(analyze(factors, 2, base_norms=dict.fromkeys(names, 100.0)), "unused")
    norms = panels(figures[0])["size of the change"]
    assert norms.shape == (700 // 6 + 2, 3)
    last = [factors[f"layers.{b}.v"].norm for b in range(696, 700)]
    assert norms[-2, 1] == pytest.approx(statistics.median(last))
    assert max(figures[0].get_size_inches()) <= 40
    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert labels[:2] == ["0 to 5", "24 to 29"]


def test_cells_hold_the_layers_numbers_in_order_of_depth_and_zero_deltas_are_empty(figures):
    names = [f"layers.{b}.{k}" for b in (10, 2) for k in ("q", "v")]
    factors = {name: layer(1.0 + index) for index, name in enumerate(names)}
    factors["layers.2.q"] = layer(0.0)
    analysis = analyze(factors, 2, base_norms=dict.fromkeys(names, 200.0))
    ranks = {"layers.10.q": 1, "layers.10.v": 2, "layers.2.q": 1, "layers.2.v": 4}
    plot_heat_maps(analysis, "unused", ranks=ranks)
    drawn = panels(figures[0])
    norms = {name: factors[name].norm / 2 for name in names}  # in percent of 200
    np.testing.assert_allclose(
        drawn["size of the change"],
        [
            [norms["layers.2.q"], norms["layers.2.v"]],
            [norms["layers.10.q"], norms["layers.10.v"]],
        ],
    )
    error = 100 * analysis.layers[0].reconstruction_error
    np.testing.assert_allclose(drawn["error at rank 2"], [[np.nan, error], [error, error]])
    np.testing.assert_allclose(drawn["recommended rank"], [[np.nan, 4], [1, 2]])
    first = figures[0].axes[0]
    assert [text.get_text() for text in first.get_yticklabels()] == ["2", "10"]
    assert [text.get_text() for text in first.get_xticklabels()] == ["q", "v"]


def test_layers_that_share_a_cell_show_their_median(figures):
    names = [f"h.0.experts.{e}.w1" for e in range(3)]
    factors = {name: layer(scale) for name, scale in zip(names, (1.0, 9.0, 2.0), strict=True)}
    plot_heat_maps(analyze(factors, 2), "unused")
    drawn = panels(figures[0])
    assert drawn["size of the change"].item() == pytest.approx(factors[names[2]].norm)
    assert "recommended rank" not in drawn


def test_every_colour_bar_names_its_unit(figures):
    factors = model(SIX)
    plot_heat_maps(analyze(factors, 2, base_norms=dict.fromkeys(SIX, 9.0)), "unused")
    labels = {axes.get_xlabel() for axes in figures[0].axes} - {""}
    assert labels == {"‖Δ‖ / ‖W‖ [%]", "‖Δ - Δᵣ‖ / ‖Δ‖ [%]", "‖Δ‖² / σ₁²"}


@pytest.mark.parametrize("names", [NAMES["thirty by four"], SIX, NAMES["more types than columns"]])
def test_labels_of_neighbouring_ticks_do_not_overlap(names, figures):
    plot_heat_maps(analyze(model(names), 2), "unused", ranks=dict.fromkeys(names, 3))
    figure = figures[0]
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.get_yticklabels() if text.get_text()]
        for one, other in itertools.pairwise(boxes):
            assert not one.overlaps(other)
        # Slanted labels are apart if their anchors are further apart than a line is high.
        places = [text.get_window_extent().x1 for text in axes.get_xticklabels()]
        assert all(b - a > 8 for a, b in itertools.pairwise(places))


def test_the_spectra_are_drawn_over_those_of_random_deltas(figures):
    factors = model(SIX)
    analysis = analyze(factors, 2)
    plot_spectra(analysis, "unused")
    axes = figures[0].axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.get_lines()}
    held = lines["layers: median, 10 to 90 %"]
    expected = (factors[SIX[0]].S / factors[SIX[0]].norm).numpy()
    np.testing.assert_allclose(held, expected, rtol=1e-6)
    random = lines["random deltas of the same shape, norm and rank"]
    np.testing.assert_allclose(random, spectra_plot._random(analysis.layers[0]), rtol=1e-6)
    assert "gate_proj, 2 layers" in axes.get_title()


@settings(max_examples=5)
@given(
    names=st.lists(
        st.from_regex(r"([a-c]\.|[0-9]{1,3}\.){0,4}[a-e]", fullmatch=True),
        min_size=1,
        max_size=12,
        unique=True,
    )
)
def test_any_module_names_can_be_drawn(names):
    factors = model(names)
    analysis = analyze(factors, 3)
    kept = []
    original = heat_maps.save_figure
    heat_maps.save_figure = lambda figure, path: kept.append(figure)
    try:
        plot_heat_maps(analysis, "unused", ranks=recommend_ranks(factors, energy=0.8).ranks)
    finally:
        heat_maps.save_figure = original
    known = np.isfinite(panels(kept[0])["size of the change"]).sum()
    places = {(analysis.module_types[name], layer_depth(name)) for name in names}
    assert known == len(places)


def test_both_figures_are_written_as_png_without_pyplot(tmp_path):
    pyplot = sys.modules.pop("matplotlib.pyplot", None)
    try:
        analysis = analyze(model(SIX), 2)
        plot_heat_maps(analysis, tmp_path / "maps.png", title="A title")
        plot_spectra(analysis, tmp_path / "spectra.png", title="A title")
        assert "matplotlib.pyplot" not in sys.modules
    finally:
        if pyplot is not None:
            sys.modules["matplotlib.pyplot"] = pyplot
    for name in ("maps.png", "spectra.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_model_that_did_not_change_is_drawn_as_such(figures):
    analysis = analyze({"h.0.q": layer(0.0)}, 1)
    plot_heat_maps(analysis, "unused", ranks={"h.0.q": 1})
    plot_spectra(analysis, "unused")
    words = {text.get_text() for figure in figures for axes in figure.axes for text in axes.texts}
    assert "no layer changed" in words
