"""`SvdLoraConfig`: a LoraConfig whose adapter starts from factors and is saved as stock LoRA."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig

from .atomic import write_json
from .factor_sources import PARTS, Part
from .initializers import SvdGuided

SIDECAR_NAME = "svdinit_config.json"
INIT_MARKER = "svd_guided"
ALIAS_PREFIX = f"{INIT_MARKER}:"

Coverage = Literal["strict", "partial"]
# The functions behind sources that a config cannot ask for.
_FROM_DATA = {"gradient": "gradient_factors", "activation": "activation_factors"}


@dataclass
class SvdLoraConfig(LoraConfig):
    """LoRA whose weights start from the SVD of a delta, or of the base weights themselves.

    Use it wherever a LoraConfig goes. What is saved is a stock LoRA adapter: `adapter_config.json`
    is that of a LoraConfig, and the options below go to `svdinit_config.json` beside it.
    """

    svd_source: Literal["teacher", "weight"] = field(
        default="teacher",
        metadata={
            "help": "Where the triplets come from: teacher: svd_factors; weight: each layer's own "
            "weight (PiSSA, MiLoRA), which stays as it is."
        },
    )
    svd_part: Part = field(
        default="principal",
        metadata={"help": "The end of the spectrum, for svd_source=weight: principal or minor."},
    )
    svd_factors: str = field(
        default="",
        metadata={
            "help": "Factors file, or a folder or Hub id that holds factors.safetensors, for "
            "svd_source=teacher."
        },
    )
    svd_factors_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit, where svd_factors is a Hub id."},
    )
    svd_start: Literal["delta", "subspace", "reference"] = field(
        default="delta",
        metadata={
            "help": "delta: begin at the delta; subspace: its right singular vectors for A, zero "
            "for B; reference: begin at the factors with their initial product subtracted."
        },
    )
    svd_split: Literal["output", "balanced"] = field(
        default="output",
        metadata={"help": "Where the singular values go: all into B, or their root into A and B."},
    )
    svd_coverage: Coverage = field(
        default="strict",
        metadata={
            "help": "strict: every target layer has factors and all factors are used; partial: "
            "layers without factors start as in stock LoRA, and unused factors are ignored."
        },
    )
    svd_check_base: bool = field(
        default=True,
        metadata={"help": "Refuse factors that were taken from another base model."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.svd_factors, os.PathLike):
            self.svd_factors = os.fspath(self.svd_factors)
        if not isinstance(self.svd_factors, str):
            raise TypeError(
                "svd_factors must be a path or Hub id, so that the config can be saved, got "
                f"{type(self.svd_factors).__name__}; use initialize_lora_from_factors for factors "
                "in memory"
            )
        self._check_source()
        if self.init_lora_weights not in (True, INIT_MARKER):
            raise ValueError(
                "init_lora_weights must stay True with svd_factors, which initialises the adapter, "
                f"got {self.init_lora_weights!r}"
            )
        if self.svd_coverage not in ("strict", "partial"):
            raise ValueError(
                f'svd_coverage must be "strict" or "partial", got {self.svd_coverage!r}'
            )
        if self.svd_start == "reference" and self.use_dora:
            raise ValueError(
                'svd_start="reference" cannot be combined with use_dora: the magnitudes have no '
                'initial product to subtract; use svd_start="delta"'
            )
        others = ", ".join(_other_variants(self))
        if others:
            raise ValueError(
                f"{others} cannot be combined with svd_factors: the update of the layers would not "
                "be B A; leave one of the two out"
            )
        # Stock PEFT refuses this value by name, where it would silently start at random from True:
        # in a mixed model, say, or after unregister().
        self.init_lora_weights = INIT_MARKER  # pyright: ignore[reportAttributeAccessIssue]
        self.initializer()

    def _check_source(self) -> None:
        source: str = self.svd_source
        if source in _FROM_DATA:
            raise ValueError(
                f'svd_source="{source}" needs data, which a config cannot hold: call '
                f"peft_svdinit.{_FROM_DATA[source]}(base_model, batches, …), and give the result "
                "to initialize_lora_from_factors, or to save_factors and its path as svd_factors"
            )
        if source not in ("teacher", "weight"):
            raise ValueError(f'svd_source must be "teacher" or "weight", got {source!r}')
        if self.svd_part not in PARTS:
            raise ValueError(f"svd_part must be one of {', '.join(PARTS)}, got {self.svd_part!r}")
        if source == "teacher" and self.svd_part != "principal":
            raise ValueError(
                f'svd_part={self.svd_part!r} needs svd_source="weight": a teacher\'s factors are '
                "used from their first triplet on"
            )
        if source == "teacher" and not self.svd_factors:
            raise ValueError("svd_factors must name a factors file, folder or Hub id; it is empty")
        if source == "weight" and (self.svd_factors or self.svd_factors_revision):
            raise ValueError(
                f'svd_factors={self.svd_factors!r} is not read with svd_source="weight"; leave one '
                "of the two out"
            )
        if source == "weight" and self.svd_start == "delta":
            raise ValueError(
                'svd_start="delta" would add a part of each weight to the weight itself; with '
                'svd_source="weight" use "reference" (PiSSA, MiLoRA) or "subspace"'
            )

    def initializer(self) -> SvdGuided:
        """The initialiser these options describe."""
        return SvdGuided(self.svd_start, self.svd_split)

    @contextmanager
    def as_stock_start(self) -> Iterator[None]:
        """While PEFT creates the layers, let it give them its default start."""
        self.init_lora_weights = True
        try:
            yield
        finally:
            self.init_lora_weights = INIT_MARKER  # pyright: ignore[reportAttributeAccessIssue]

    def stock(self) -> LoraConfig:
        """The LoraConfig of the saved adapter.

        A "reference" adapter is saved with its initial factors stacked below the trained ones, at
        twice the rank; alpha grows so that the scaling stays.
        """
        options = {**lora_options(self), "init_lora_weights": True}
        if self.svd_start == "reference":
            growth = math.sqrt(2) if self.use_rslora else 2
            options["r"] = 2 * self.r
            options["lora_alpha"] = growth * self.lora_alpha
            options["rank_pattern"] = {
                key: 2 * rank for key, rank in (self.rank_pattern or {}).items()
            }
            options["alpha_pattern"] = {
                key: growth * alpha for key, alpha in (self.alpha_pattern or {}).items()
            }
        return LoraConfig(**options)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` of a stock LoRA and the sidecar with the svd options."""
        self.stock().save_pretrained(save_directory, **kwargs)
        options = {key: value for key, value in asdict(self).items() if key != "runtime_config"}
        options = {k: sorted(v) if isinstance(v, set) else v for k, v in options.items()}
        write_json(Path(save_directory) / SIDECAR_NAME, options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SvdLoraConfig:
        """The config that an adapter folder was saved with, from its sidecar.

        Raises:
            ValueError: if the folder has no sidecar; LoraConfig.from_pretrained reads any adapter.
        """
        path = Path(pretrained_model_name_or_path, subfolder or "", SIDECAR_NAME)
        if not path.is_file():
            raise ValueError(
                f"{path.parent} has no {SIDECAR_NAME}: it was not saved by a SvdLoraConfig, or it "
                "is not a local folder; LoraConfig.from_pretrained reads it as the stock LoRA it is"
            )
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def _other_variants(config: LoraConfig) -> list[str]:
    """Options in use that replace LoRA's update; under DoRA and aLoRA it still begins at B A."""
    return [
        entry.name
        for entry in fields(LoraConfig)
        if entry.metadata.get("is_lora_variant")
        and entry.name not in ("use_dora", "alora_invocation_tokens")
        and getattr(config, entry.name)
    ]


def config_of_alias(config: LoraConfig) -> LoraConfig:
    """`config`, or what its `init_lora_weights="svd_guided:<path-or-hub-id>"` means.

    For tools that hand only a string through to PEFT.
    """
    alias = config.init_lora_weights
    if not (isinstance(alias, str) and alias.startswith(ALIAS_PREFIX)):
        return config
    options = {**lora_options(config), "init_lora_weights": True}
    return SvdLoraConfig(**options, svd_factors=os.path.expanduser(alias[len(ALIAS_PREFIX) :]))


def lora_options(config: LoraConfig) -> dict[str, Any]:
    """What a LoraConfig was made with, the fields of subclasses left out."""
    return {entry.name: getattr(config, entry.name) for entry in fields(LoraConfig) if entry.init}
