"""Starts of an adapter: pure functions from factors to LoRA weights."""

from .svd_guided import SPLITS, STARTS, LoraInit, Split, Start, SvdGuided

__all__ = ["SPLITS", "STARTS", "LoraInit", "Split", "Start", "SvdGuided"]
