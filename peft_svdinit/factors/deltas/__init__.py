"""Where weight deltas come from: LoRA adapters, pairs of checkpoints, synthesis."""
