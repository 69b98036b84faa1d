"""LoRA adapters that start from knowledge: SVD-guided initialisation for PEFT.

Importing this package makes PEFT know it, as soon as PEFT is imported; `unregister()` undoes that.
"""

import lazy_loader
import wrapt

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"

wrapt.register_post_import_hook(f"{__name__}.tuner.registration:register_with", "peft")
