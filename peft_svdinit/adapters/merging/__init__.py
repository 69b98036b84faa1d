"""Several LoRA adapters as one, with the error against their exact sum and their interference."""
