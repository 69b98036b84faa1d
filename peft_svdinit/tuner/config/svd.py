"""`SvdLoraConfig`: a LoraConfig whose adapter starts from factors and is saved as stock LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from peft import LoraConfig

from ...factors import IN_MEMORY, PARTS, Part, SvdGuided
from .from_file import FromFile
from .stock_saved import StockSavedConfig, path_text

Coverage = Literal["strict", "partial"]
# The functions behind sources that a config cannot ask for.
_FROM_DATA = {"gradient": "gradient_factors", "activation": "activation_factors"}


@dataclass
class SvdLoraConfig(StockSavedConfig):
    """LoRA whose weights start from the SVD of a delta, or of the base weights themselves.

    Use it wherever a LoraConfig goes. What is saved is a stock LoRA adapter: `adapter_config.json`
    is that of a LoraConfig, and the options below go to `svdinit_config.json` beside it.

    With `svd_start="delta"` the model begins at the teacher, and is the bare base with the adapter
    disabled. TRL's trainers that keep near a reference (DPO, KTO, GRPO, RLOO) take exactly that for
    it when the configuration comes as `peft_config`: give them the model with its adapter, of which
    they copy the start, and no `peft_config`,

        trainer = DPOTrainer(model=get_peft_model(base, config), args=args, ...)

    or `ref_model=get_peft_model(another_base, config).merge_and_unload()` beside it. The other two
    starts compute what the base does, and either way is right.
    """

    init_marker: ClassVar[str] = "svd_guided"

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
        self.svd_factors = path_text(
            "svd_factors",
            self.svd_factors,
            "use initialize_lora_from_factors for factors in memory",
        )
        self._check_source()
        if self.svd_coverage not in ("strict", "partial"):
            raise ValueError(
                f'svd_coverage must be "strict" or "partial", got {self.svd_coverage!r}'
            )
        if self.svd_start == "reference" and self.use_dora:
            raise ValueError(
                'svd_start="reference" cannot be combined with use_dora: the magnitudes have no '
                'initial product to subtract; use svd_start="delta"'
            )
        self.mark()
        self.initializer()
        if self._is_of_the_past():
            # Whoever loads saved weights sets it, get_peft_model leaves it as it is.
            self.inference_mode = None  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SvdLoraConfig:
        """The config that an adapter was saved with, from its sidecar.

        To load the adapter by, it is whole in itself: its `svd_factors` are then not opened, for
        they are where whoever wrote the file says. `get_peft_model` makes a new adapter from them.
        What tells the two apart is `inference_mode`, which is None here, and which only loading
        sets: leave it so.

        Args:
            pretrained_model_name_or_path, subfolder, kwargs: as of every configuration of ours.

        Raises:
            ValueError, TypeError: as of every configuration of ours.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        return replace(config, svd_factors=FromFile(config.svd_factors))

    def _is_of_the_past(self) -> bool:
        """Whether the factors were in memory and are gone, or where they are is hearsay."""
        return self.svd_factors == IN_MEMORY or isinstance(self.svd_factors, FromFile)

    def awaits_saved_weights(self) -> bool:
        """Whether what came of the factors is being loaded, and they are gone or not to be opened.

        Raises:
            ValueError: if they are gone and nothing is being loaded.
        """
        if self._is_of_the_past() and self.inference_mode is not None:
            return True
        if self.svd_factors != IN_MEMORY:
            return False
        raise ValueError(
            f"svd_factors={IN_MEMORY!r}: the adapter of this configuration was started from "
            "factors that were never in a file; give svd_factors, a factors file, folder or Hub "
            "id, to start a new adapter, or call initialize_lora_from_factors. Its saved weights "
            "need none: PeftModel.from_pretrained(base, folder, "
            "config=SvdLoraConfig.from_pretrained(folder))"
        )

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

    @property
    def begins_at_base(self) -> bool:
        return self.svd_start != "delta"

    def initializer(self) -> SvdGuided:
        """The initialiser these options describe."""
        return SvdGuided(self.svd_start, self.svd_split)

    def stock(self) -> LoraConfig:
        """The LoraConfig of the saved adapter.

        A "reference" adapter is saved with its initial factors stacked below the trained ones, at
        twice the rank; alpha grows so that the scaling stays.
        """
        stock = super().stock()
        if self.svd_start == "reference":
            growth = math.sqrt(2) if self.use_rslora else 2
            stock.r *= 2
            stock.lora_alpha = growth * stock.lora_alpha  # pyright: ignore[reportAttributeAccessIssue]
            stock.rank_pattern = {key: 2 * r for key, r in (stock.rank_pattern or {}).items()}
            stock.alpha_pattern = {
                key: growth * alpha for key, alpha in (stock.alpha_pattern or {}).items()
            }
        return stock
