"""PEFT configurations of our starts."""
