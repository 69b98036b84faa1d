"""What runs without a download: a real pretrained model and real text, from packages on disk."""

from .docstrings import stdlib_docstrings
from .model import resolve_model
from .registry import BUILTIN_DATASETS, BuiltinDataset, find_builtin
from .signatures import stdlib_names
from .topics import python_topics

__all__ = [
    "BUILTIN_DATASETS",
    "BuiltinDataset",
    "find_builtin",
    "python_topics",
    "resolve_model",
    "stdlib_docstrings",
    "stdlib_names",
]
