"""LoRA adapters that start from knowledge: SVD-guided initialisation for PEFT.

Importing this package makes PEFT know it, as soon as PEFT is imported; `unregister()` undoes that.
"""

import importlib
from types import ModuleType

import lazy_loader
import wrapt

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"


@wrapt.when_imported("peft")
def _register(_peft: ModuleType) -> None:
    # No more than this room: it registers itself, and PEFT's import may wait for it in one thread
    # while another waits, inside of it, for PEFT.
    importlib.import_module(f"{__name__}.tuner")
