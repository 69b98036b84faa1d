"""Whether a DeepSpeed engine trains parameters."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def in_training_engine(parameters: Iterable[Tensor]) -> bool:
    """Whether a living DeepSpeed engine with an optimizer has one of the parameters.

    Its optimizer may have copies from which its steps write over the parameters. These need not
    tell: under ZeRO-1 and 2 each process marks its own part alone, and bf16 without ZeRO marks
    none. So the engine is looked for among the living objects, which takes a tenth of a second
    where DeepSpeed is in use, and is answered alike in all processes.
    """
    deepspeed: Any = sys.modules.get("deepspeed")
    if deepspeed is None:
        return False
    wanted = {id(parameter) for parameter in parameters}
    return any(
        id(parameter) in wanted
        for engine in gc.get_objects()
        # Not isinstance: some objects answer for a class that they only stand in for.
        if issubclass(type(engine), deepspeed.DeepSpeedEngine)
        and getattr(engine, "optimizer", None) is not None
        for parameter in engine.module.parameters()
    )
