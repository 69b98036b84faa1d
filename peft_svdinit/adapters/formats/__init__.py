"""Saved adapters of the ecosystem: PEFT folders, kohya, LyCORIS, diffusers, compact LoRI."""
