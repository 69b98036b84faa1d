"""What runs without a download: a real pretrained model and real text, from packages on disk."""

from .docstrings import stdlib_docstrings
from .model import resolve_model

__all__ = ["resolve_model", "stdlib_docstrings"]
