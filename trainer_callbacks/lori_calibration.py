"""A callback that turns a calibration run of LoRI into the mask of the run after it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_svdinit import LoriConfig
from peft_svdinit.factors import LoraAdapter
from peft_svdinit.files import publishing
from peft_svdinit.masks import (
    MASK_FILE_NAME,
    SCORES_FILE_NAME,
    GradientScores,
    LayerScores,
    LoriMask,
    Selection,
    load_mask,
    load_scores,
    magnitude_scores,
    random_scores,
    save_mask,
    save_scores,
)
from peft_svdinit.models import whole_copy, whole_shape
from peft_svdinit.tuner import dense_factors, gradients_of, input_sizes
from trainer_callbacks.sparing import Sparing, prepare_folder

SCORES = ("magnitude", "magnitude_gradient", "gradient")
_AGAIN = "Mend that and calibrate again."


class LoriCalibrationCallback(TrainerCallback):
    """Choose LoRI's mask from the training of a `LoriConfig(lori_density=1)`, when that ends.

    Writes `lori_mask.safetensors`, for the `lori_mask` of the sparse run, and
    `lori_scores.safetensors`, from which masks of other densities and scopes can be chosen without
    another calibration. The scores are

    - "magnitude": |B| (arXiv 2504.07448, section 3.2); with `lori_start`, how far B moved from it;
    - "magnitude_gradient": Σ |B ⊙ gradient| over all optimizer steps;
    - "gradient": |Σ gradient| over all optimizer steps.

    Gradients are those that the optimizer is given: over all micro-batches and processes, clipped.
    Their sums lie in every checkpoint, so that a resumed run ends with the same scores.

    What goes wrong later is a warning, and training goes on: files that cannot be written, a B that
    ends as zero everywhere or not finite. There is then no mask, nor one of an earlier run.

    Args:
        output_dir: folder of the files; by default `TrainingArguments.output_dir`.
        density: share of B that the mask keeps; None to write the scores alone.
        scope, floor: as `peft_svdinit.masks.Selection` has them.
        score: what ranks the entries.
        steps: end training after so many optimizer steps; by default it runs to its end.
        exclude: masks, or their files or folders, none of whose entries is taken.
        adapter_name: the adapter that is calibrated.

    Raises:
        FileNotFoundError, TypeError, ValueError: for wrong options, here; where training begins,
            for a model without a dense LoRI adapter, or a mask that could not be chosen for it.
        RuntimeError: where training begins, for a checkpoint without the sums; in the first step,
            for a B without a gradient.
        OSError: where training begins, if the folder cannot be written to.
    """

    def __init__(
        self,
        *,
        output_dir: str | os.PathLike | None = None,
        density: float | None = 0.1,
        scope: str = "global",
        floor: float = 0.0,
        score: str = "magnitude",
        steps: int | None = None,
        exclude: Sequence[LoriMask | str | os.PathLike] = (),
        adapter_name: str = "default",
    ) -> None:
        if isinstance(exclude, (str, os.PathLike)):
            raise TypeError(f"exclude must be a list of masks, got {exclude!r}")
        self.selection: Selection | None = None
        if density is not None:
            excluded = [
                each if isinstance(each, LoriMask) else load_mask(each, argument="exclude")
                for each in exclude
            ]
            self.selection = Selection(density, scope, floor, excluded)
        elif scope != "global" or floor or exclude:
            raise ValueError(
                "scope, floor and exclude say how a mask is chosen, and none is with density=None; "
                "leave them out, or set density"
            )
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.output_dir = output_dir
        self.score = score
        self.steps = steps
        self.adapter_name = adapter_name
        self._sums = GradientScores(weighted=score == "magnitude_gradient")
        self._steps_summed = 0
        self._spared = Sparing(type(self).__name__)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: torch.nn.Module | None = kwargs.get("model")
        self._spared = Sparing(type(self).__name__)
        self._checked_config(model)
        assert model is not None
        self._check_training(args, state)
        factors = dense_factors(model, self.adapter_name)
        for name, factor in factors.items():
            if not factor.requires_grad:
                raise ValueError(
                    f"layer {name}: lora_B is frozen, so that there is nothing to calibrate; load "
                    "the adapter with is_trainable=True, or make it active"
                )
        if self.selection is not None:
            whole = {name: whole_shape(part) for name, part in factors.items()}
            shapes = {name: (rows, rank) for name, (rows, rank) in whole.items()}
            # What cannot be chosen at the end is better known before training.
            self._layers(model, random_scores(shapes, 0), 0).mask(self.selection)
        self._sums = GradientScores(weighted=self._sums.weighted)
        self._steps_summed = state.global_step
        if state.global_step > 0 and self.score != "magnitude":
            self._sums.sums = self._resumed(args, state, factors)
        if state.is_world_process_zero:
            prepare_folder(self._folder(args), type(self).__name__, self._files)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: torch.nn.Module | None = kwargs.get("model")
        if self.score == "magnitude" or model is None:
            return
        if state.global_step == 0:
            self._add_gradients(model)
            return
        with self._spared("sums of all gradients", _AGAIN):
            self._add_gradients(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps is not None and state.global_step >= self.steps:
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: torch.nn.Module | None = kwargs.get("model")
        if self.score != "magnitude" and args.should_save and model is not None:
            folder = _checkpoint(args, state)
            remedy = "Resume from another checkpoint, if need be."
            with self._spared(str(folder / SCORES_FILE_NAME), remedy):
                layers = self._layers(model, self._complete_sums(state).sums, state.global_step)
                save_scores(folder, layers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: torch.nn.Module | None = kwargs.get("model")
        assert model is not None
        # On SIGTERM the Trainer's just-in-time checkpoint ends training politely, to be resumed.
        if args.enable_jit_checkpoint and state.global_step < (self.steps or state.max_steps):
            return
        folder = self._folder(args)
        # Every process takes part, because gathering a split B needs all of them; one writes.
        with self._spared(f"{' and '.join(self._files)} in {folder}", _AGAIN):
            scores = self._scores(model, state)
            if state.is_world_process_zero:
                self._write(folder, self._layers(model, scores, state.global_step))
        PartialState().wait_for_everyone()

    def needs_of(self, checkpoint: Path) -> list[str]:
        """The files of a checkpoint that a resumed run reads."""
        return [] if self.score == "magnitude" else [SCORES_FILE_NAME]

    def _folder(self, args: TrainingArguments) -> Path:
        return Path(str(self.output_dir or args.output_dir)).expanduser()

    @property
    def _files(self) -> list[str]:
        return [SCORES_FILE_NAME, *([] if self.selection is None else [MASK_FILE_NAME])]

    def _write(self, folder: Path, layers: LayerScores) -> None:
        with publishing(folder, replaces=self._files) as new:
            save_scores(new / SCORES_FILE_NAME, layers)
            if self.selection is None:
                return
            with self._spared(f"{MASK_FILE_NAME} in {folder}", "Choose it from the scores."):
                save_mask(new / MASK_FILE_NAME, layers.mask(self.selection))

    def _add_gradients(self, model: torch.nn.Module) -> None:
        factors = dense_factors(model, self.adapter_name)
        self._sums.add(factors, gradients_of(factors))
        self._steps_summed += 1

    def _complete_sums(self, state: TrainerState) -> GradientScores:
        if self._steps_summed < state.global_step:
            raise RuntimeError(
                f"the sums have the gradients of {self._steps_summed} of {state.global_step} steps"
            )
        return self._sums

    def _checked_config(self, model: torch.nn.Module | None) -> LoriConfig:
        configs: dict[str, Any] = getattr(model, "peft_config", {})
        config = configs.get(self.adapter_name)
        if not isinstance(config, LoriConfig):
            found = ", ".join(f"{name}: {type(c).__name__}" for name, c in configs.items())
            raise ValueError(
                f"LoriCalibrationCallback needs an adapter {self.adapter_name!r} of a "
                f"LoriConfig(lori_density=1); the model has {found or 'no adapter'}"
            )
        return config

    def _check_training(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.steps is not None and self.steps > state.max_steps:
            raise ValueError(
                f"steps must be at most the {state.max_steps} optimizer steps of the training, got "
                f"{self.steps}; raise max_steps"
            )
        kind = AcceleratorState().distributed_type
        if kind == DistributedType.FSDP:
            raise ValueError("LoRI's B cannot be calibrated under FSDP, which splits it; use DDP")
        if self.score != "magnitude" and (args.fp16 or kind == DistributedType.DEEPSPEED):
            raise ValueError(
                f"score={self.score!r} needs gradients as they are, which fp16 scales and "
                "DeepSpeed keeps to itself; use bf16 with DDP, or score='magnitude'"
            )

    def _resumed(
        self, args: TrainingArguments, state: TrainerState, factors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The sums of the checkpoint that training goes on from."""
        path = _checkpoint(args, state) / SCORES_FILE_NAME
        if not path.is_file():
            raise RuntimeError(
                f"score={self.score!r} cannot go on from step {state.global_step}: {path}, with "
                "the sums so far, does not exist; start again, or resume from a checkpoint that "
                "this callback took part in"
            )
        stored = load_scores(path)
        wanted = {"kind": self.score, "steps": state.global_step}
        shapes = {name: scores.shape for name, scores in stored.scores.items()}
        if stored.source != wanted or shapes != {n: f.shape for n, f in factors.items()}:
            raise RuntimeError(
                f"{path} holds sums of {dict(stored.source)} for other layers or steps than this "
                f"run's {wanted}; start again"
            )
        return {name: scores.to(factors[name].device) for name, scores in stored.scores.items()}

    def _scores(self, model: torch.nn.Module, state: TrainerState) -> dict[str, Tensor]:
        factors = dense_factors(model, self.adapter_name)
        trained = {name: whole_copy(factor).float().cpu() for name, factor in factors.items()}
        if not any(factor.any() for factor in trained.values()):
            raise ValueError(
                "lora_B is zero everywhere after the calibration, which ranks nothing: give it "
                "more steps or a higher learning rate"
            )
        if self.score != "magnitude":
            return self._complete_sums(state).scores()
        start = self._checked_config(model).lori_start
        if start is not None:
            began = LoraAdapter(start, argument="lori_start")
            # As B holds it, in case that is narrower.
            trained = {
                name: trained[name] - began[name].lora_B.to(factors[name].dtype).float()
                for name in trained
            }
        return magnitude_scores(trained)

    def _layers(
        self, model: torch.nn.Module, scores: Mapping[str, Tensor], step: int
    ) -> LayerScores:
        config = self._checked_config(model)
        return LayerScores(
            scores={name: part.detach().float().cpu() for name, part in scores.items()},
            in_features=input_sizes(model, self.adapter_name),
            seed=config.lori_seed,
            source={"kind": self.score, "steps": step},
            base_model_name_or_path=config.base_model_name_or_path,
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
