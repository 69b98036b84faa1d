"""The options of a LoRI adapter: its mask, and the calibration that chooses it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_svdinit import LoriConfig
from peft_svdinit.masks import Selection
from peft_svdinit.training import check_seed
from stages.adapter_size import check_size
from stages.quiet_arguments import QuietArguments

CALIBRATED = ("magnitude", "magnitude_gradient")
SOURCES = (*CALIBRATED, "gradient", "random", "teacher")


@dataclass
class LoriArguments(QuietArguments):
    """How to train the sparse adapter: all of transformers' TrainingArguments."""

    output_dir: str | None = field(
        default="runs/lori", metadata={"help": "Folder of the calibration and of the result."}
    )
    learning_rate: float = field(
        default=3e-3, metadata={"help": "Peak learning rate of the sparse run."}
    )
    resume_from_checkpoint: str | None = field(
        default="last",
        metadata={"help": "last: go on where a killed run with the same options was."},
    )


@dataclass(frozen=True)
class SparseOptions:
    """The adapter, its mask, and the calibration run."""

    _argument_group_name = "adapter"
    _known_as: ClassVar = {
        "lora_target_modules": ["target_modules"],
        "lori_density": ["density"],
        "lori_scope": ["scope"],
        "lori_floor": ["floor"],
    }

    lora_r: int = field(default=32, metadata={"help": "Rank."})
    lora_alpha: int = field(default=64, metadata={"help": "Scaling times rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before lora_A."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names or name endings of the layers to adapt, or all-linear."},
    )
    lori_density: float = field(default=0.1, metadata={"help": "Share of B that is trained."})
    lori_scope: str = field(
        default="global",
        metadata={"help": "What shares one budget: global, type, layer, matrix, row, N:M."},
    )
    lori_floor: float | None = field(
        default=None,
        metadata={
            "help": "Share of every matrix that is kept in any case; by default a tenth of "
            "lori_density, 0 as in the paper."
        },
    )
    calibration_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps of the calibration; by default those of the training."},
    )
    calibration_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Of the calibration; by default a third of the sparse run's, in the paper a "
            "tenth."
        },
    )

    def __post_init__(self) -> None:
        check_size(self)
        self.selection  # noqa: B018 - refuses what cannot be selected
        if self.lori_density == 1:
            raise ValueError(
                "lori_density=1 trains all of B and needs no mask; use "
                "LoriConfig(lori_density=1) with your own Trainer"
            )
        if self.calibration_steps is not None and self.calibration_steps < 1:
            raise ValueError(f"calibration_steps must be at least 1, got {self.calibration_steps}")
        rate = self.calibration_learning_rate
        if rate is not None and not rate > 0:
            raise ValueError(f"calibration_learning_rate must be above 0, got {rate}")

    @property
    def target_modules(self) -> str | list[str]:
        """As LoraConfig wants it."""
        targets = self.lora_target_modules
        return targets[0] if targets == ["all-linear"] else targets

    @property
    def adapter(self) -> dict[str, Any]:
        """What any adapter of these options is made with, as LoraConfig names it."""
        return {
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
        }

    @property
    def selection(self) -> Selection:
        """How a mask is chosen from scores."""
        floor = 0.1 * self.lori_density if self.lori_floor is None else self.lori_floor
        return Selection(self.lori_density, self.lori_scope, floor)

    def config(self, *, seed: int, mask: str | None = None, start: str | None = None) -> LoriConfig:
        """The sparse adapter of a mask; the dense one that is calibrated without it."""
        masked: dict[str, Any] = {} if mask is None else {"lori_mask": mask}
        return LoriConfig(
            **self.adapter,
            **masked,
            lori_density=1.0 if mask is None else self.lori_density,
            lori_seed=seed,
            lori_start=start,
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class LoriOptions(SparseOptions):
    """The adapter, where its mask comes from, and the calibration run."""

    _known_as: ClassVar = {**SparseOptions._known_as, "mask_source": ["lori_mask"]}

    lori_seed: int = field(default=0, metadata={"help": "Seed of A, and of a random mask."})
    lori_start: str | None = field(
        default=None,
        metadata={
            "help": "Saved adapter with the same A: B begins there, calibration included, and its "
            "entries off the mask stay as they are."
        },
    )
    mask_source: str = field(
        default="magnitude",
        metadata={
            "help": "What ranks the entries of B. After a calibration run: magnitude, or "
            "magnitude_gradient. Without one: gradient (of init_batches), random, teacher "
            "(svd_factors); or the path of a mask."
        },
    )
    exclude_masks: list[str] = field(
        default_factory=list,
        metadata={"help": "Masks, or adapters that hold one, none of whose entries is taken."},
    )
    svd_factors: str | None = field(
        default=None,
        metadata={"help": "Factors file, its folder or Hub id, for mask_source=teacher."},
    )
    init_batches: int = field(
        default=4, metadata={"help": "Training batches that mask_source=gradient reads."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("lori_seed", self.lori_seed)
        if (self.mask_source == "teacher") != bool(self.svd_factors):
            raise ValueError(
                f"svd_factors and mask_source=teacher need each other, got {self.svd_factors!r} "
                f"and {self.mask_source!r}"
            )
        if self.init_batches < 1:
            raise ValueError(f"init_batches must be at least 1, got {self.init_batches}")
        calibration = (self.calibration_steps, self.calibration_learning_rate)
        if not self.calibrates and calibration != (None, None):
            raise ValueError(
                "calibration_steps and calibration_learning_rate need mask_source="
                f"{' or '.join(CALIBRATED)}, got {self.mask_source!r}"
            )
        chosen = self.lori_floor is not None or self.lori_scope != "global"
        if self.given and (self.exclude_masks or chosen):
            raise ValueError(
                "exclude_masks, lori_scope and lori_floor say how a mask is chosen, and "
                f"mask_source={self.mask_source!r} is a chosen one"
            )

    @property
    def calibrates(self) -> bool:
        """Whether the mask comes from a calibration run."""
        return self.mask_source in CALIBRATED

    @property
    def given(self) -> bool:
        """Whether the mask exists already."""
        return self.mask_source not in SOURCES
