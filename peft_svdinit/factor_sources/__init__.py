"""Where factors come from other than a teacher: weights, gradients and activations of the base."""

from .activation import WEIGHTINGS, activation_factors
from .descent import FORMS, descent_directions, scaled, weight_norms
from .gradient import gradient_factors
from .line_search import LineSearch, line_search
from .lora_ga import lora_ga_factors
from .minor_part import minor_factors
from .targets import base_samples
from .weight import PARTS, Part, WeightFactors, WeightSource, weight_factors

__all__ = [
    "FORMS",
    "PARTS",
    "WEIGHTINGS",
    "LineSearch",
    "Part",
    "WeightFactors",
    "WeightSource",
    "activation_factors",
    "base_samples",
    "descent_directions",
    "gradient_factors",
    "line_search",
    "lora_ga_factors",
    "minor_factors",
    "scaled",
    "weight_factors",
    "weight_norms",
]
