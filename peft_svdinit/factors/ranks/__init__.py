"""Which rank each layer gets."""
