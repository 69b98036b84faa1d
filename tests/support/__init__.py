"""Fixtures, strategies and slow references that tests share."""
