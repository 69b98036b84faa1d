"""The base model's weights under the layers of a delta, by which it is recognised."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from torch import nn

from ..files import WrongKind
from ..models import Checkpoint, LinearWeights, StoredParameters

logger = logging.getLogger(__name__)


def base_weights(
    folder: str | os.PathLike,
    shapes: Mapping[str, tuple[int, int]],
    argument: str,
    skeleton: nn.Module | None = None,
) -> LinearWeights | None:
    """The weights of layers whose deltas have these (out, in) shapes; None if stored quantised.

    Args:
        folder: of the base model.
        shapes: by module name.
        argument: by which the user gave the base; the messages of errors begin with it.
        skeleton: the model on the meta device, where it is at hand.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it lacks a layer, or has it of another shape.
    """
    parameters = StoredParameters(Checkpoint(folder, argument=argument), skeleton)
    try:
        weights = LinearWeights(parameters, target_modules=list(shapes))
    except WrongKind as error:
        logger.info("The base model is not recognised by its entries: %s", error)
        return None
    weights.check_shapes(shapes)
    return weights
