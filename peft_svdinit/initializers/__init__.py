"""Starts of an adapter: pure functions from factors or a seed to LoRA weights."""

from .lori import random_projection, tensor_hash
from .svd_guided import SPLITS, STARTS, LoraInit, Split, Start, SvdGuided

__all__ = [
    "SPLITS",
    "STARTS",
    "LoraInit",
    "Split",
    "Start",
    "SvdGuided",
    "random_projection",
    "tensor_hash",
]
