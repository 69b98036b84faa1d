"""Factors as a stock LoRA adapter."""
