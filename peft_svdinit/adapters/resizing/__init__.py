"""LoRA adapters of other ranks: every delta is the optimum of its rank, with its exact error."""
