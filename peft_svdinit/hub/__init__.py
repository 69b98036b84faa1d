"""Sharing on the Hub: what a folder holds, its model card, one commit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
