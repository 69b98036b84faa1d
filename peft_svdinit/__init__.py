"""LoRA adapters that start from knowledge: SVD-guided initialisation for PEFT.

Importing this package registers it with PEFT; `unregister()` undoes that.
"""

import lazy_loader

from .tuner.registration import register

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"

register()
