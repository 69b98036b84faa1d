"""Models in one piece where DeepSpeed would split them as they are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models are loaded in one piece, even for ZeRO-3, which splits them when it trains them."""
    found = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    config = found() if found is not None else None
    if config is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)
