"""Layers of low rank in place of dense ones: the layer, the plan, factorising, saving."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
