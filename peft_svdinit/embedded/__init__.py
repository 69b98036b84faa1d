"""What runs without a download: a real pretrained model and real text, from packages on disk."""

from peft_svdinit.embedded.docstrings import stdlib_docstrings
from peft_svdinit.embedded.model import resolve_model

__all__ = ["resolve_model", "stdlib_docstrings"]
