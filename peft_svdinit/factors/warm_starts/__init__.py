"""The delta of any adapter or fine-tune as the start of an adapter of another rank."""
