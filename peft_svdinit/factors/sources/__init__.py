"""Factors without a teacher: from weights, gradients and activations of the base."""
