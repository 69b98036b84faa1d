"""`LoriConfig`: a LoraConfig with a frozen random A and a B of which a few entries are trained."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ...factors import options_beyond_the_product
from ...masks import MASK_FILE_NAME, LoriMask, Selection, save_mask
from .stock_saved import StockSavedConfig, adapter_file, path_text

RANDOM = "random"


@dataclass
class LoriConfig(StockSavedConfig):
    """LoRI (arXiv 2504.07448): A is random and frozen, and a sparse mask says what of B is trained.

    Use it wherever a LoraConfig goes. What is saved is a stock LoRA adapter; the options below go
    to `svdinit_config.json` and the mask to `lori_mask.safetensors` beside it. With
    `lori_density=1` all of B is trained: the calibration run whose B a mask is taken from (LoRI-D).
    """

    init_marker: ClassVar[str] = "lori"

    lori_density: float = field(
        default=0.1,
        metadata={"help": "Share of B that is trained; 1 for all of it, as calibration does."},
    )
    lori_mask: str = field(
        default=RANDOM,
        metadata={
            "help": "Mask file, or a folder or Hub id that holds lori_mask.safetensors; or random."
        },
    )
    lori_scope: str = field(
        default="global",
        metadata={
            "help": "Of a random mask, what has one budget: global, type, layer, matrix, row, N:M."
        },
    )
    lori_floor: float = field(
        default=0.0,
        metadata={"help": "Of a random mask: share of every matrix that is kept in any case."},
    )
    lori_seed: int = field(
        default=0, metadata={"help": "Seed of A, and of a random mask; a mask belongs to one A."}
    )
    lori_start: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of an adapter with the same A: B begins there, and its "
            "entries off the mask stay as they are."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lori_mask = os.path.expanduser(
            path_text("lori_mask", self.lori_mask, "write a mask with save_mask, and give its path")
        )
        if self.lori_start is not None:
            self.lori_start = os.path.expanduser(
                path_text("lori_start", self.lori_start, "save the adapter, and give its folder")
            )
        if not isinstance(self.lori_seed, int) or isinstance(self.lori_seed, bool):
            raise TypeError(f"lori_seed must be an integer, got {self.lori_seed!r}")
        self.selection  # noqa: B018 - refuses what cannot be selected
        if not self.lori_mask:
            raise ValueError('lori_mask must name a mask file, or be "random"; it is empty')
        drawn = self.lori_mask == RANDOM and self.lori_density < 1
        if not drawn and (self.lori_scope != "global" or self.lori_floor):
            raise ValueError(
                "lori_scope and lori_floor say how a random mask is drawn, and none is with "
                f"lori_mask={self.lori_mask!r} and lori_density={self.lori_density}; leave them out"
            )
        if self.lora_bias:
            raise ValueError(
                "lora_bias cannot be combined with LoRI: B is replaced by its trained entries; "
                "leave it out"
            )
        beyond = [] if self.lori_start is None else options_beyond_the_product(vars(self))
        if beyond:
            raise ValueError(
                f"lori_start cannot be combined with {', '.join(beyond)}: an adapter that others "
                "can start from is B A alone; leave one of the two out"
            )
        self._made: LoriMask | None = None
        self.mark()

    @property
    def selection(self) -> Selection:
        """How many entries a random mask keeps, and where.

        Raises:
            ValueError, TypeError: as `Selection`, naming the option here.
        """
        try:
            return Selection(self.lori_density, self.lori_scope, self.lori_floor)
        except (ValueError, TypeError) as error:
            named = re.sub(r"\b(?=(?:density|scope|floor)[ =])", "lori_", str(error))
            raise type(error)(named) from None

    @property
    def begins_at_base(self) -> bool:
        return self.lori_start is None

    @property
    def is_sparse(self) -> bool:
        """Whether a mask is in use: not in the calibration run."""
        return self.lori_density < 1 or self.lori_mask != RANDOM

    @property
    def mask(self) -> LoriMask | None:
        """The mask of the model that was made with this configuration last."""
        return self._made

    def remember(self, mask: LoriMask) -> None:
        """Keep the mask that is in use, so that it is saved with the adapter.

        Raises:
            ValueError: if another model has been given another mask by this configuration, with
                which its adapter would then be saved.
        """
        if self._made is not None and not _are_equal(self._made, mask):
            raise ValueError(
                "this LoriConfig has made another mask for another model, which is saved from it; "
                "make a LoriConfig of its own for each model"
            )
        self._made = mask

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As every configuration of ours, with the mask in use."""
        super().save_pretrained(save_directory, **kwargs)
        if self._made is not None:
            save_mask(Path(save_directory), self._made)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LoriConfig:
        """The config that an adapter was saved with, whole in itself.

        Its mask is the one saved with it, and so is the adapter it starts from, of which a saved
        one keeps the entries off the mask.

        Args:
            pretrained_model_name_or_path, subfolder, kwargs: as of every configuration of ours.

        Raises:
            ValueError: if there is no sidecar of a LoriConfig.
            TypeError: as of every configuration of ours.
            FileNotFoundError: if a repository of the Hub has the sidecar and not the mask.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

        def saved(file_name: str) -> Path:
            return adapter_file(pretrained_model_name_or_path, file_name, subfolder, kwargs)

        # Paths in a file from elsewhere are not followed.
        if config.is_sparse:
            config.lori_mask = str(saved(MASK_FILE_NAME))
            config.lori_scope, config.lori_floor = "global", 0.0  # The mask is drawn already.
        if config.lori_start is not None:
            saved(CONFIG_NAME)
            config.lori_start = str(saved(SAFETENSORS_WEIGHTS_NAME).parent)
        return config


def _are_equal(mask: LoriMask, other: LoriMask) -> bool:
    """Whether two masks train the same entries of the same layers, over the same A."""
    return (
        mask.seed == other.seed
        and mask.layers.keys() == other.layers.keys()
        and all(
            torch.equal(layer.mask, other.layers[name].mask) for name, layer in mask.layers.items()
        )
    )
