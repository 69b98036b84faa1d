"""Parts of the forward pass that LoRA does not have."""
