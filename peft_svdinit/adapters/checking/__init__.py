"""Adapters checked as stock PEFT loads them."""
