"""The options of an adapter and its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from peft import EvaConfig, LoraConfig

from peft_svdinit import SvdLoraConfig
from peft_svdinit.factors import (
    FORMS,
    PARTS,
    SPLITS,
    STARTS,
    WEIGHTINGS,
    RankRecommendation,
)
from peft_svdinit.training import check_name
from stages.adapter_size import check_size
from stages.peft_starts import check_peft_init

MEASURES = ("gradient", "activation")
# PEFT's starts that set ranks themselves, or take even ones only.
_OWN_RANKS = ("eva", "orthogonal")
_OF_A_START = ("init", "init_from", "svd_factors", "carry_moments_from")
_CHOICES = {
    "svd_source": ("teacher", "weight", "gradient", "activation"),
    "svd_part": PARTS,
    "svd_start": STARTS,
    "svd_split": SPLITS,
    "gradient_form": FORMS,
    "activation_weighting": WEIGHTINGS,
    "rank_budget_from": MEASURES,
}


@dataclass(frozen=True)
class LoraOptions:
    """The adapter and its start."""

    _argument_group_name = "adapter"
    _known_as: ClassVar = {
        "lora_r": ["rank"],
        "lora_target_modules": ["target_modules"],
        "rank_budget": ["max_parameters"],
        "check_base": ["svd_check_base"],
    }

    init: str = field(
        default="random",
        metadata={
            "help": "random, svd (see svd_source), or an init_lora_weights of PEFT: gaussian, "
            "pissa, pissa_niter_4, olora, orthogonal, eva"
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a LoRA adapter, a model fine-tuned from this one, or "
            "factors: the adapter begins at its delta, at any lora_r, and Adam at the moments "
            "that lie beside an adapter."
        },
    )
    check_base: bool = field(
        default=True,
        metadata={"help": "Refuse init_from and svd_factors of another base model."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Scaling times rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before lora_A."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names or name endings of the layers to adapt, or all-linear; by default "
            "all-linear, with init_from the layers of its delta."
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by the root of the rank."})
    use_dora: bool = field(default=False, metadata={"help": "Train magnitudes apart (DoRA)."})
    svd_source: str = field(
        default="teacher",
        metadata={
            "help": "Of init=svd: teacher (svd_factors), weight (the layer's own), gradient or "
            "activation (both over init_batches of the training data)."
        },
    )
    svd_factors: str | None = field(
        default=None,
        metadata={"help": "Factors file, its folder or Hub id, for svd_source=teacher."},
    )
    svd_part: str = field(
        default="principal",
        metadata={
            "help": "principal or minor, for svd_source=weight and activation_weighting=weight."
        },
    )
    gradient_form: str = field(
        default="orthogonalised",
        metadata={"help": "orthogonalised or plain, for svd_source=gradient with svd_start=delta."},
    )
    activation_weighting: str = field(
        default="none",
        metadata={
            "help": "Of svd_source=activation: none (the directions of the inputs) or weight (the "
            "weight as the inputs see it)."
        },
    )
    init_batches: int = field(
        default=4,
        metadata={
            "help": "Training batches that rank_budget and svd_source=gradient or activation read, "
            "and as many more for the line search of svd_start=delta; half and half of fewer."
        },
    )
    rank_budget: int | None = field(
        default=None,
        metadata={
            "help": "Parameters of A and B together, spread over the layers before training by "
            "what init_batches of the training data say; at least those of rank 1 everywhere. "
            "lora_alpha and lora_r then set the scaling alone, which stays theirs in every layer: "
            "a layer's alpha grows with its rank."
        },
    )
    rank_budget_from: str = field(
        default="gradient",
        metadata={
            "help": "Spectra that rank_budget goes by: gradient (singular values of the mean "
            "gradient), or activation (shares of the variance of each layer's inputs)."
        },
    )
    svd_start: str = field(default="delta", metadata={"help": "delta, subspace or reference."})
    svd_split: str = field(default="output", metadata={"help": "output or balanced."})
    carry_moments_from: str | None = field(
        default=None,
        metadata={"help": "Run folder of the teacher adapter whose Adam moments go on, init=svd."},
    )
    save_moments: bool = field(
        default=False, metadata={"help": "Keep the Adam moments beside the trained adapter."}
    )

    def __post_init__(self) -> None:
        check_size(self)
        for name, known in _CHOICES.items():
            check_name(name, getattr(self, name), known)
        if self.init_from is not None:
            self._check_source_alone()
        if self.init not in ("random", "svd"):
            check_peft_init("init", self.init, self.lora_r)
        if self.init != "svd" and (
            self.svd_factors or self.carry_moments_from or self.svd_source != "teacher"
        ):
            raise ValueError(
                f"svd_factors, svd_source and carry_moments_from need init=svd, got {self.init!r}"
            )
        if self.init != "svd" and not self.init_from:
            self._refuse_given(("svd_part", "svd_start", "gradient_form", "activation_weighting"))
        if self.init_batches < 1:
            raise ValueError(f"init_batches must be at least 1, got {self.init_batches}")
        self._check_budget()
        if self.init == "svd":
            self._check_source()

    def _check_source_alone(self) -> None:
        if not self.init_from:
            raise ValueError(
                "init_from is empty; name an adapter, a fine-tuned model or factors, or leave it "
                "out for a random start"
            )
        defaults = LoraOptions()
        names = (
            "init", "svd_factors", "svd_source", "svd_part", "svd_start", "gradient_form",
            "activation_weighting", "carry_moments_from", "rank_budget",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names}
        given = {name: one for name, one in given.items() if one != getattr(defaults, name)}
        if given:
            raise ValueError(
                "init_from is a start of its own, at the delta of what it names, and finds the "
                f"moments itself: leave out {', '.join(f'{k}={v}' for k, v in given.items())}"
            )

    def _refuse_given(self, names: Sequence[str], need: str = "init=svd") -> None:
        """Refuse options that change nothing."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in names and value != entry.default:
                raise ValueError(f"{entry.name}={value} needs {need}; leave it out")

    def _check_budget(self) -> None:
        if self.rank_budget is None:
            if self.rank_budget_from != MEASURES[0]:
                raise ValueError("rank_budget_from needs rank_budget, which is not given")
            return
        if self.init in _OWN_RANKS:
            raise ValueError(
                f"rank_budget does not go with init={self.init}, which has ranks of its own (eva "
                "spreads them, orthogonal needs even ones); leave one of the two out"
            )
        if self.init == "svd" and self.svd_source == "activation" and self.weighted:
            raise ValueError(
                "rank_budget does not go with activation_weighting=weight, whose factors are made "
                "at one rank for all layers; leave one of the two out"
            )

    def _check_source(self) -> None:
        if self.svd_source == "teacher" and not self.svd_factors:
            raise ValueError("init=svd needs svd_factors; make them with `svdinit synthesize`")
        if self.svd_source != "teacher" and (self.svd_factors or self.carry_moments_from):
            raise ValueError(
                "svd_factors and carry_moments_from need svd_source=teacher, got "
                f"{self.svd_source!r}"
            )
        if self.svd_source != "gradient":
            self._refuse_given(["gradient_form"], "svd_source=gradient")
        if self.svd_source != "activation":
            self._refuse_given(["activation_weighting"], "svd_source=activation")
        weighted = self.weighted
        if self.svd_source == "activation" and self.svd_start not in (
            ("reference", "subspace") if weighted else ("subspace",)
        ):
            raise ValueError(
                f"svd_start={self.svd_start} has no meaning for svd_source=activation with "
                f"activation_weighting={self.activation_weighting}; use subspace, or reference "
                "with activation_weighting=weight"
            )
        if self.svd_part != "principal" and not (
            self.svd_source == "weight" or (self.svd_source == "activation" and weighted)
        ):
            raise ValueError(
                f"svd_part={self.svd_part} needs svd_source=weight, or svd_source=activation with "
                "activation_weighting=weight"
            )
        if not self.reads_data:
            self.config()

    def from_factors(self, factors: str) -> LoraOptions:
        """The same start from a file of the factors that its source gives."""
        return replace(
            self,
            svd_source="teacher",
            svd_part="principal",
            gradient_form="orthogonalised",
            activation_weighting="none",
            svd_factors=factors,
        )

    def stock(self, **others: Any) -> LoraOptions:
        """The same adapter at a random start."""
        plain = LoraOptions()
        starts = {name: getattr(plain, name) for name in (*_CHOICES, *_OF_A_START)}
        return replace(self, **{**starts, **others})

    @property
    def weighted(self) -> bool:
        """Whether activations weigh the layers' own weights."""
        return self.activation_weighting == "weight"

    @property
    def reads_data(self) -> bool:
        """Whether the start is taken from training data."""
        return self.init == "svd" and self.svd_source in ("gradient", "activation")

    @property
    def start_options(self) -> dict[str, Any]:
        """What factors taken from data depend on, the data aside."""
        names = (
            "svd_start", "svd_part", "gradient_form", "activation_weighting", "init_batches",
            "lora_r", "lora_target_modules",
        )  # fmt: skip
        options = {name: getattr(self, name) for name in names}
        options["lora_target_modules"] = self.lora_target_modules or ["all-linear"]
        return {**options, "scaling": self.scaling}

    @property
    def scaling(self) -> float:
        """The factor before B A."""
        return self.lora_alpha / (self.lora_r**0.5 if self.use_rslora else self.lora_r)

    @property
    def target_modules(self) -> str | list[str]:
        """As LoraConfig wants it."""
        targets = self.lora_target_modules or ["all-linear"]
        return targets[0] if targets == ["all-linear"] else targets

    def config(self, ranks: RankRecommendation | None = None) -> LoraConfig:
        """The PEFT configuration these options describe, with the layers' own ranks if given."""
        options: dict[str, Any] = {
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "task_type": "CAUSAL_LM",
        }
        if ranks is not None:
            own = ranks.config_options(scaling=self.scaling, use_rslora=self.use_rslora)
            options.update(own)
        if self.init == "svd":
            names = ("svd_source", "svd_part", "svd_start", "svd_split")
            options.update({name: getattr(self, name) for name in names})
            options["svd_check_base"] = self.check_base
            return SvdLoraConfig(**options, svd_factors=self.svd_factors or "")
        if self.init == "eva":
            options["eva_config"] = EvaConfig(rho=1.0)
        options["init_lora_weights"] = True if self.init == "random" else self.init
        return LoraConfig(**options)
