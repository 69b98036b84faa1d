"""What lives inside a PEFT model; the only place that knows PEFT's internals."""

import lazy_loader

# Before any module of this room: PEFT's import makes it register us, which needs them whole.
import peft  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
