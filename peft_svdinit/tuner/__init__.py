"""What lives inside a PEFT model; the only place that knows PEFT's internals.

Its import registers our tuner with PEFT.
"""

import lazy_loader

# Before any module of this room: PEFT's import imports it.
import peft  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

from .registration import register  # noqa: E402

register()
