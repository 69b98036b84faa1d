"""Which entries of a LoRI adapter's B are trained: scores, selection, files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
