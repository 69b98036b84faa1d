"""Spectra of which only the shape counts, for layers whose scales say nothing of each other."""

from __future__ import annotations

from collections.abc import Mapping

from ..spectrum import HasSpectrum, Spectrum


def relative_spectra(spectra: Mapping[str, HasSpectrum]) -> dict[str, Spectrum]:
    """Each layer's singular values over its own norm: σ_i² becomes a share of the layer's energy.

    For `recommend_ranks` where layers are to weigh the same. So it is with inputs
    (`activation_factors`): their variance grows along the residual stream and with a few large
    channels, and says nothing of how much the loss depends on a layer. Their shares of explained
    variance are what EVA (arXiv:2410.07170) orders components of all layers by, there at one price
    for every component, here by share / (out + in). Gradients need none of this: the loss falls, to
    first order, by step times σ_i² for triplet i of any layer's mean gradient, in one unit.

    Returns:
        Spectra of norm 1, or 0 for a layer whose norm is 0.
    """
    return {
        name: Spectrum(layer.S / (layer.norm or 1.0), float(layer.norm > 0), layer.shape)
        for name, layer in spectra.items()
    }
