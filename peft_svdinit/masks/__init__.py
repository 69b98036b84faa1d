"""Which entries of a LoRI adapter's B are trained: scores, selection, files."""

from .imported import read_reference_mask
from .making import mask_from_scores
from .mask import LoriMask, MaskedLayer
from .mask_file import (
    COMPACT_FILE_NAME,
    MASK_FILE_NAME,
    CompactAdapter,
    load_compact,
    load_mask,
    save_compact,
    save_mask,
)
from .scores import GradientScores, magnitude_scores, random_scores, teacher_scores
from .selection import SCOPES, check_density, check_scope, groups_of, select

__all__ = [
    "COMPACT_FILE_NAME",
    "MASK_FILE_NAME",
    "SCOPES",
    "CompactAdapter",
    "GradientScores",
    "LoriMask",
    "MaskedLayer",
    "check_density",
    "check_scope",
    "groups_of",
    "load_compact",
    "load_mask",
    "magnitude_scores",
    "mask_from_scores",
    "random_scores",
    "read_reference_mask",
    "save_compact",
    "save_mask",
    "select",
    "teacher_scores",
]
