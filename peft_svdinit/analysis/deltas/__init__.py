"""What the SVD says about a model's deltas."""
