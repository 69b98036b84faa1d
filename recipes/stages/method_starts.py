"""What an experiment's start is taken from, made once for each seed, with what it cost."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import set_seed

from peft_svdinit import (
    FactorsFile,
    FactorsMetadata,
    LoriConfig,
    activation_factors,
    base_samples,
    descent_directions,
    gradient_factors,
    line_search,
    save_factors,
    scaled,
    weight_norms,
)
from peft_svdinit.factors import (
    FACTORS_FILE_NAME,
    INITS_MOVING_BASE,
    LoraAdapter,
    factors_of_adapter,
    kind_of,
)
from peft_svdinit.files import read_json, write_json
from peft_svdinit.masks import LayerScores, Selection, load_mask, save_mask, scores_of_adapter
from peft_svdinit.models import linear_modules, model_skeleton
from peft_svdinit.training import refused_as, resolve_model
from stages.data_start import counted
from stages.method_data import MethodData
from stages.method_options import MethodOptions
from stages.method_protocol import Experiment
from stages.method_training import loaded_base, train
from stages.peft_starts import check_peft_init
from stages.skeletons import smallest_layer

COST = "cost.json"
ADAPTER = "adapter"
# What `init_lora_weights` of an experiment names after the colon, relative to where PEFT's runner
# is started; this runner makes them.
TEACHER, GRADIENT, ACTIVATION = "starts/teacher", "starts/gradient", "starts/activation"
LORI_MASK, RANDOM_MASK = "starts/lori_mask", "starts/random_mask"
TRAINED = (TEACHER, LORI_MASK)
KINDS = (*TRAINED, GRADIENT, ACTIVATION, RANDOM_MASK)
# A mask is calibrated at a tenth of the sparse run's rate (scripts of juzhengz/LoRI).
_CALIBRATION_RATE = 0.1
_DENSITY = 0.1


def source_of(config: LoraConfig) -> str | None:
    """What a configuration's start is taken from: one of `KINDS`, a path, or None."""
    init = config.init_lora_weights
    if not isinstance(init, str):
        return None
    # A LoRI adapter names no mask where that is random.
    return RANDOM_MASK if init == "lori" else init.partition(":")[2] or None


def with_source(config: LoraConfig, folder: Path) -> LoraConfig:
    """The configuration whose start is taken from `folder`."""
    prefix = str(config.init_lora_weights).partition(":")[0]
    return replace(config, init_lora_weights=f"{prefix}:{folder}")  # pyright: ignore


def check_experiment(experiment: Experiment) -> None:
    """Refuse an adapter that cannot be made of the model, or a start of it that cannot be read.

    Raises:
        ValueError, OSError, TypeError: naming the experiment.
    """
    config, model_id = experiment.config, experiment.protocol.model_id
    skeleton = model_skeleton(resolve_model(model_id), "model_id")
    place = f"experiments: {experiment.name}"
    with refused_as(f"{place} is no adapter that PEFT can make of {model_id}"):
        stock = replace(config, init_lora_weights=True)
        adapted = get_peft_model(skeleton, stock, low_cpu_mem_usage=True)  # pyright: ignore
    init, source = config.init_lora_weights, source_of(config)
    if source is None and isinstance(init, str):
        if init.lower().startswith(INITS_MOVING_BASE):
            raise ValueError(
                f"{place} starts as {init}, which moves the base, so that forgetting would be "
                "measured against another model; leave it out"
            )
        check_peft_init(place, init, config.r, smallest_layer(adapted))
    if source is not None and source not in KINDS:
        read = load_mask if str(config.init_lora_weights).startswith("lori:") else FactorsFile
        read(source, argument="experiments")


def check_teacher(teacher: str, experiment: Experiment) -> None:
    """Refuse what does not serve as the teacher of an experiment, before any training.

    Raises:
        ValueError, OSError, TypeError: naming the option.
    """
    held_by = _held_by(teacher)
    skeleton = model_skeleton(resolve_model(experiment.protocol.model_id), "model_id")
    for name, layer in linear_modules(skeleton, _targets(skeleton, experiment.config)).items():
        shape, wanted = (layer.out_features, layer.in_features), experiment.config.r
        held, found = held_by.get(name, (0, shape))
        if found != shape:
            raise ValueError(
                f"teacher: {teacher} is of another model than {experiment.protocol.model_id}: "
                f"{name} is {found[0]} x {found[1]} in it, and {shape[0]} x {shape[1]} here"
            )
        if wanted > held:
            raise ValueError(
                f"teacher: {teacher} has rank {held} for {name}, below r={wanted} of "
                f"{experiment.name}; give a teacher of that rank in every layer adapted"
            )


def _held_by(teacher: str) -> dict[str, tuple[int, tuple[int, int]]]:
    """Rank and shape of each layer's delta."""
    kind = kind_of(teacher, argument="teacher")
    if kind == "model":
        raise ValueError(
            f"teacher: {teacher} is a fine-tuned model; give its factors (svdinit extract)"
        )
    if kind == "factors":
        file = FactorsFile(teacher, argument="teacher")
        return {name: (file.rank_of(name), file.shape_of(name)) for name in file}
    adapter = LoraAdapter(teacher, argument="teacher")
    layers = {name: adapter[name] for name in adapter}
    return {name: (layer.lora_A.shape[0], layer.shape) for name, layer in layers.items()}


@dataclass(frozen=True)
class StartMaker:
    """Makes one of `KINDS` for an experiment, in a folder, and notes the cost beside it."""

    kind: str
    experiment: Experiment
    seed: int
    options: MethodOptions
    data: MethodData
    device: torch.device

    def __call__(self, folder: Path) -> None:
        make = {
            TEACHER: self._teacher,
            LORI_MASK: self._calibrated_mask,
            RANDOM_MASK: self._random_mask,
            GRADIENT: self._from_data,
            ACTIVATION: self._from_data,
        }[self.kind]
        set_seed(self.seed)
        write_json(folder / COST, make(folder))

    @property
    def _stock(self) -> LoraConfig:
        return replace(self.experiment.config, init_lora_weights=True)

    def _teacher(self, folder: Path) -> dict[str, Any]:
        """A LoRA of the same rank from the protocol's own start, by its delta."""
        base = resolve_model(self.experiment.protocol.model_id)
        given = self.options.teacher
        if given is None:
            cost = self._trained(self._stock, folder / ADAPTER, rate=1.0)
        else:
            cost = {"kind": "given", "sunk": True, "steps": 0, "tokens": 0, "seconds": 0.0}
            if kind_of(given, argument="teacher") == "factors":
                shutil.copyfile(FactorsFile(given).path, folder / FACTORS_FILE_NAME)
                return cost
        adapter = LoraAdapter(given or folder / ADAPTER)
        extraction = factors_of_adapter(adapter, base=base)
        save_factors(
            folder, extraction.factors, extraction.metadata, base_samples=extraction.base_samples
        )
        return cost

    def _calibrated_mask(self, folder: Path) -> dict[str, Any]:
        config = LoriConfig(**_adapter_options(self._stock), lori_density=1.0, lori_seed=self.seed)
        cost = self._trained(config, folder / ADAPTER, rate=_CALIBRATION_RATE)
        scores = scores_of_adapter(folder / ADAPTER)
        save_mask(folder, scores.mask(Selection(_DENSITY, "global", 0.1 * _DENSITY)))
        return cost

    def _random_mask(self, folder: Path) -> dict[str, Any]:
        skeleton = model_skeleton(resolve_model(self.experiment.protocol.model_id), "model_id")
        layers = linear_modules(skeleton, _targets(skeleton, self._stock))
        shapes = {name: (layer.out_features, self._stock.r) for name, layer in layers.items()}
        widths = {name: layer.in_features for name, layer in layers.items()}
        scores = LayerScores.random(shapes, widths, self.seed)
        save_mask(folder, scores.mask(Selection(_DENSITY, "global", 0.0)))
        return {"kind": self.kind, "sunk": False, "steps": 0, "tokens": 0, "seconds": 0.0}

    def _from_data(self, folder: Path) -> dict[str, Any]:
        """Factors of the first batches' gradients (LoRA-One) or of their activations (EVA)."""
        protocol, rank = self.experiment.protocol, self._stock.r
        model = loaded_base(protocol, self.device)
        size = protocol.batch_size
        held = list(self.data.batches(0, 2 * self.options.start_batches * size, size))
        seen, others = held[::2], held[1::2]
        notes: dict[str, Any] = {}
        with counted(model) as cost:
            common: Any = {"rank": rank, "target_modules": _targets(model, self._stock)}
            if self.kind == ACTIVATION:
                factors: Mapping[str, Any] = activation_factors(model, seen, **common)
            else:
                gradients = gradient_factors(model, seen, **common)
                norms = weight_norms(model, gradients)
                directions = descent_directions(gradients, norms, rank=rank, form="plain")
                search = line_search(model, directions, others)
                factors, notes = scaled(directions, search.step), {"step": search.step}
        about = FactorsMetadata(
            base_model_name_or_path=model.name_or_path, source={"kind": self.kind, **notes}
        )
        save_factors(folder, factors, about, base_samples=base_samples(model, factors))
        return {"kind": self.kind, "sunk": False, "steps": 0, **cost}

    def _trained(self, config: LoraConfig, folder: Path, rate: float) -> dict[str, Any]:
        """Train an adapter on the examples that follow those of the run."""
        protocol, steps = self.experiment.protocol.at_rate(rate), self.options.teacher_steps
        base = loaded_base(protocol, self.device)
        adapt = partial(get_peft_model, autocast_adapter_dtype=protocol.autocast_adapter_dtype)
        model: Any = adapt(base, config)
        size = protocol.batch_size
        batches = self.data.batches(protocol.max_steps * size, steps * size, size)
        done = train(model, protocol, batches, steps, title=f"{self.kind} seed {self.seed}")
        model.save_pretrained(folder)
        return {
            "kind": self.kind,
            "sunk": False,
            "steps": steps,
            "tokens": sum(done.tokens),
            "seconds": round(done.seconds, 3),
            "learning_rate": protocol.optimizer_kwargs["lr"],
        }


def cost_of(folder: Path) -> dict[str, Any]:
    """What the start in a folder cost."""
    return read_json(folder / COST, "cost of the start")


def _targets(model: Any, config: LoraConfig) -> Any:
    """The layers that PEFT adapts, where a configuration leaves them to the model's kind."""
    chosen = (
        config.target_modules
        or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model.config.model_type]
    )
    return chosen if isinstance(chosen, str) else sorted(chosen)


def _adapter_options(config: LoraConfig) -> dict[str, Any]:
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "task_type")
    return {name: getattr(config, name) for name in names}
