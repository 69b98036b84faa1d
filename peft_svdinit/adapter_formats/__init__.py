"""Saved adapters of the ecosystem as factored deltas: PEFT folders, kohya, LyCORIS, diffusers."""

from .forms import LayerDelta, LayerHeader
from .opening import open_adapter
from .peft_folder import write_peft_folder
from .single_file import report_path, write_single_file
from .stored import StoredAdapter, StoredLayer
from .weighted_sum import WeightedSum

__all__ = [
    "LayerDelta",
    "LayerHeader",
    "StoredAdapter",
    "StoredLayer",
    "WeightedSum",
    "open_adapter",
    "report_path",
    "write_peft_folder",
    "write_single_file",
]
