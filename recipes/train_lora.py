"""Train a LoRA from a random start, from the SVD of a teacher's delta, or from any start of PEFT.

    accelerate launch recipes/train_lora.py --init random --output_dir runs/random
    accelerate launch recipes/train_lora.py --init svd --svd_factors runs/factors \\
        --output_dir runs/svd

The folder then holds the adapter, which stock PEFT loads, and the run's record
(`training_log.csv`, `run.json`, `loss_curve.png`), which `svdinit compare` reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fit import Materials, fit
from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    prepare_model_for_kbit_training,
)
from torch.utils.data import DataLoader
from transformers import set_seed

from peft_svdinit import SvdLoraConfig
from peft_svdinit.runs import Run
from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    RecipeArguments,
    completion_collator,
    load_model,
    parse_options,
)
from trainer_callbacks import CarryMomentsCallback, SaveMomentsCallback


@dataclass(frozen=True)
class LoraOptions:
    """The adapter and its start."""

    _argument_group_name = "adapter"

    init: str = field(
        default="random",
        metadata={
            "help": "random, svd (needs svd_factors), or an init_lora_weights of PEFT: gaussian, "
            "pissa, pissa_niter_4, olora, orthogonal, eva"
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Scaling times rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before lora_A."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names or name endings of the layers to adapt, or all-linear."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by the root of the rank."})
    use_dora: bool = field(default=False, metadata={"help": "Train magnitudes apart (DoRA)."})
    svd_factors: str | None = field(
        default=None, metadata={"help": "Factors file, its folder or Hub id, for init=svd."}
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
        if self.lora_r < 1 or self.lora_alpha <= 0:
            raise ValueError(
                f"lora_r and lora_alpha must be positive, got {self.lora_r} and {self.lora_alpha}"
            )
        if self.init == "svd" and not self.svd_factors:
            raise ValueError("init=svd needs svd_factors; make them with `svdinit synthesize`")
        if self.init != "svd" and (self.svd_factors or self.carry_moments_from):
            raise ValueError(f"svd_factors and carry_moments_from need init=svd, got {self.init!r}")

    @property
    def target_modules(self) -> str | list[str]:
        """As LoraConfig wants it."""
        targets = self.lora_target_modules
        return targets[0] if targets == ["all-linear"] else targets

    def config(self) -> LoraConfig:
        """The PEFT configuration these options describe."""
        options: dict[str, Any] = {
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "task_type": "CAUSAL_LM",
        }
        if self.init == "svd":
            names = ("svd_factors", "svd_start", "svd_split")
            return SvdLoraConfig(**options, **{name: getattr(self, name) for name in names})
        if self.init == "eva":
            options["eva_config"] = EvaConfig(rho=1.0)
        options["init_lora_weights"] = True if self.init == "random" else self.init
        return LoraConfig(**options)


def adapted(model: Any, options: LoraOptions, materials: Materials, seed: int) -> PeftModel:
    """The model with its adapter at its start; the draw depends on the seed alone."""
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model)
    set_seed(seed)
    peft_model = get_peft_model(model, options.config())
    if options.init == "eva":
        loader = DataLoader(
            materials.train.select(range(min(64, len(materials.train)))),  # pyright: ignore
            batch_size=4,
            collate_fn=completion_collator(materials.tokenizer),
        )
        initialize_lora_eva_weights(peft_model, loader)
    return peft_model


def train_lora(
    materials: Materials,
    model: ModelOptions,
    lora: LoraOptions,
    arguments: RecipeArguments,
    *,
    extra: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Run | None:
    """One run as the options say; its record, on the main process."""
    peft_model = adapted(load_model(model), lora, materials, arguments.seed)
    callbacks: list[Any] = [SaveMomentsCallback()] if lora.save_moments else []
    if lora.carry_moments_from:
        callbacks.append(CarryMomentsCallback(lora.carry_moments_from))
    return fit(peft_model, materials, arguments, extra=extra, callbacks=callbacks, quiet=quiet)


def main(argv: list[str] | None = None) -> None:
    classes = (ModelOptions, DataOptions, LoraOptions, RecipeArguments)
    model, data, lora, arguments = parse_options(classes, argv, description=__doc__ or "")
    run = train_lora(Materials.prepare(model, data), model, lora, arguments)
    if run is not None:
        print(f"eval_loss {run.final_eval_loss:.4f}; adapter and record in {run.directory}")


if __name__ == "__main__":
    main()
