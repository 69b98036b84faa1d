"""LoRA adapters that start from knowledge: SVD-guided initialisation for PEFT.

Importing this package makes PEFT know it, as soon as PEFT is imported; `unregister()` undoes that.
"""

import importlib
import sys
from types import ModuleType

import lazy_loader
import wrapt

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"


@wrapt.when_imported("peft")
def _register(_peft: ModuleType) -> None:
    # The room registers itself. One that is being imported waits for PEFT, in another thread
    # perhaps: PEFT must not wait for it.
    if f"{__name__}.tuner" not in sys.modules:
        importlib.import_module(f"{__name__}.tuner")
