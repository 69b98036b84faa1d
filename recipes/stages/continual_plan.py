"""The tasks of `continual.py`: which runs, in which order, from which inputs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import concatenate_datasets
from peft import PeftModel
from train_lora import train_lora

from peft_svdinit.analysis import Stages
from peft_svdinit.factors import LoraAdapter
from peft_svdinit.masks import load_mask
from peft_svdinit.training import RecipeArguments, Run, Task, read_run
from stages.comparison_options import examples_per_step
from stages.continual_options import TASKS, ContinualSetting
from stages.fit import Materials, check_complete, fit
from stages.lori_stages import (
    calibration_arguments,
    lori_model,
    prepared_base,
    remove_checkpoints,
    train_sparse,
)
from stages.lori_tasks import calibration_task, mask_task, run_inputs

_LABELS = {
    "lora": "LoRA, trained on",
    "lori": "LoRI, own mask",
    "lori_exclude": "LoRI, masks apart",
    "shared_first": "shared + part of task one",
    "shared_second": "shared + part of task two",
}
_Train = Callable[[Materials, RecipeArguments], Run | None]


@dataclass(frozen=True)
class Scheme:
    """What one scheme leaves: the runs of its stages, and the calibrations that they took."""

    name: str
    seed: int
    one: Task
    two: Task
    mask: Task | None = None
    calibrations: Sequence[Task] = ()
    dense: bool = False

    def stages(self) -> Stages:
        """The losses and costs, read from the finished runs.

        Raises:
            RuntimeError: if stage two changed entries that its mask excludes.
        """
        runs = [read_run(task.folder) for task in (self.one, self.two)]
        changed = self._changed()
        if self.name == "lori_exclude" and changed:
            raise RuntimeError(
                f"{self.two.folder} changed {changed:.2%} of the entries that its mask excludes"
            )
        return Stages(
            scheme=self.name,
            label=_LABELS[self.name],
            seed=self.seed,
            losses={
                "base": _losses(runs[0], 0),
                "one": _losses(runs[0], runs[0].info["steps"]),
                "two": _losses(runs[1], runs[1].info["steps"]),
            },
            steps=sum(run.info["steps"] for run in runs),
            calibration_steps=sum(read_run(t.folder).info["steps"] for t in self.calibrations),
            trained=[run.info["trainable_parameters"] for run in runs],
            changed=changed,
        )

    def _changed(self) -> float:
        """Share of the entries trained in stage one that stage two left otherwise."""
        before, after = LoraAdapter(self.one.folder), LoraAdapter(self.two.folder)
        trained = None if self.mask is None else load_mask(self.mask.folder).masks
        changed = total = 0
        for name in before:
            old, new = before[name], after[name]
            differs = [old.lora_B != new.lora_B]
            if trained is not None:
                differs = [differs[0][trained[name]]]
            elif not self.dense:
                differs.append(old.lora_A != new.lora_A)
            changed += sum(int(each.sum()) for each in differs)
            total += sum(each.numel() for each in differs)
        return changed / total


class Plan:
    """All tasks of a setting, in an order in which they can run, and the schemes they serve.

    Args:
        setting: the options.
        materials: of each task, called when the first run trains.
    """

    def __init__(
        self, setting: ContinualSetting, materials: Callable[[], Mapping[str, Materials]]
    ) -> None:
        self.setting = setting
        self.materials = materials
        self.tasks: list[Task] = []
        self.schemes: list[Scheme] = []
        chosen = setting.continual.schemes
        for seed in setting.continual.seeds:
            if "lora" in chosen:
                self._lora(seed)
            if "lori" in chosen or "lori_exclude" in chosen:
                self._lori(seed, chosen)
            if "shared" in chosen:
                self._shared(seed)

    def _lora(self, seed: int) -> None:
        model, lora = self.setting.model, self.setting.lora
        rate = self.setting.continual.lora_learning_rate
        steps = self.setting.arguments.max_steps

        def first(materials: Materials, arguments: RecipeArguments) -> Run | None:
            return train_lora(materials, model, lora, arguments, quiet=True)

        one = self._run("lora-first", seed, ["first"], rate, steps, first)

        def second(materials: Materials, arguments: RecipeArguments) -> Run | None:
            going_on = PeftModel.from_pretrained(
                prepared_base(model), str(one.folder), is_trainable=True
            )
            return fit(going_on, materials, arguments, quiet=True)

        two = self._run("lora-second", seed, ["second"], rate, steps, second, after=[one])
        self.schemes.append(Scheme("lora", seed, one, two))

    def _lori(self, seed: int, chosen: Sequence[str]) -> None:
        first, mask = self._calibrated("lori-first", seed, "first")
        one = self._sparse("lori-first", seed, "first", mask)
        second, own = self._calibrated("lori-second", seed, "second")
        if "lori" in chosen:
            two = self._sparse("lori-second", seed, "second", own, start=one)
            self.schemes.append(Scheme("lori", seed, one, two, mask, [first, second]))
        if "lori_exclude" in chosen:
            apart = self._mask("lori_exclude-second", seed, second, exclude=mask)
            two = self._sparse("lori_exclude-second", seed, "second", apart, start=one)
            self.schemes.append(Scheme("lori_exclude", seed, one, two, mask, [first, second]))

    def _shared(self, seed: int) -> None:
        setting, half = self.setting, self.setting.arguments.max_steps // 2
        dense = calibration_arguments(
            setting.arguments, setting.sparse, setting.continual.lori_learning_rate
        )
        config = setting.sparse.config(seed=seed)

        def train(materials: Materials, arguments: RecipeArguments) -> Run | None:
            return fit(lori_model(setting.model, config), materials, arguments, quiet=True)

        one = self._run("shared", seed, TASKS, dense.learning_rate, 2 * half, train)
        for task in TASKS:
            name = f"shared-{task}"
            calibration, mask = self._calibrated(name, seed, task, start=one)
            two = self._sparse(name, seed, task, mask, start=one, steps=half, skipped=half)
            self.schemes.append(
                Scheme(f"shared_{task}", seed, one, two, None, [calibration], dense=True)
            )

    def _calibrated(
        self, name: str, seed: int, task: str, start: Task | None = None
    ) -> tuple[Task, Task]:
        """The calibration on a task, from an adapter if one is given, and the mask it gives."""
        setting = self.setting
        arguments = calibration_arguments(
            setting.arguments, setting.sparse, setting.continual.lori_learning_rate
        )
        arguments = replace(arguments, seed=seed, train_sampling_strategy="sequential")
        calibration = calibration_task(
            f"{name}-calibration-seed{seed}",
            root=setting.root,
            inputs=run_inputs(setting.model, setting.data_of[task], arguments),
            materials=lambda: self._part([task], seed, 0, arguments.max_steps),
            model=setting.model,
            sparse=setting.sparse,
            seed=seed,
            arguments=arguments,
            start=start and str(start.folder),
            after=[start] if start else [],
        )
        self.tasks.append(calibration)
        return calibration, self._mask(name, seed, calibration)

    def _mask(self, name: str, seed: int, scores: Task, exclude: Task | None = None) -> Task:
        task = mask_task(
            f"{name}-mask-seed{seed}",
            root=self.setting.root,
            sparse=self.setting.sparse,
            scores=scores,
            exclude=[str(exclude.folder)] if exclude else [],
            after=[exclude] if exclude else [],
        )
        self.tasks.append(task)
        return task

    def _sparse(
        self,
        name: str,
        seed: int,
        task: str,
        mask: Task,
        *,
        start: Task | None = None,
        steps: int | None = None,
        skipped: int = 0,
    ) -> Task:
        """The training of the entries of a mask, over an adapter to start from."""
        setting = self.setting
        config = partial(
            setting.sparse.config,
            seed=seed,
            mask=str(mask.folder),
            start=start and str(start.folder),
        )

        def train(materials: Materials, arguments: RecipeArguments) -> Run | None:
            return train_sparse(materials, setting.model, config(), arguments, quiet=True)

        rate = setting.continual.lori_learning_rate
        steps = steps or setting.arguments.max_steps
        after = [mask, *([start] if start else [])]
        return self._run(name, seed, [task], rate, steps, train, skipped=skipped, after=after)

    def _run(
        self,
        name: str,
        seed: int,
        trained: Sequence[str],
        rate: float,
        steps: int,
        train: _Train,
        *,
        skipped: int = 0,
        after: Sequence[Task] = (),
    ) -> Task:
        """One training, evaluated on both tasks before its first step and after its last."""
        setting = self.setting
        arguments = replace(
            setting.arguments,
            max_steps=steps,
            learning_rate=rate,
            seed=seed,
            train_sampling_strategy="sequential",
            resume_from_checkpoint="last",
            eval_strategy="steps",
            eval_steps=steps,
            eval_on_start=True,
        )

        def work(folder: Path) -> None:
            here = replace(arguments, output_dir=str(folder))
            part = self._part(trained, seed, skipped, steps)
            both = {task: each.evaluation for task, each in self.materials().items()}
            train(replace(part, evaluation=cast(Any, both)), here)
            check_complete(folder)
            gc.collect()
            remove_checkpoints(here)

        task = Task(
            step="train",
            name=f"{name}-seed{seed}",
            inputs={
                **{t: run_inputs(setting.model, setting.data_of[t], arguments) for t in TASKS},
                "trained": list(trained),
                "adapter": setting.sparse.adapter,
                "skipped": skipped,
                "kind": name,
            },
            work=work,
            after=after,
            cost=float(steps),
            collective=True,
            root=setting.root,
        )
        self.tasks.append(task)
        return task

    def _part(self, trained: Sequence[str], seed: int, skipped: int, steps: int) -> Materials:
        """The examples of steps `skipped` and on in the seed's order, in turn from each task."""
        per_step = examples_per_step(self.setting.arguments)
        first, count = skipped * per_step, steps * per_step
        share = -(-count // len(trained))
        parts = [self.materials()[task].part(seed, first, share) for task in trained]
        mixed = concatenate_datasets([part.train for part in parts])
        order = torch.arange(len(mixed)).reshape(len(parts), share).T.reshape(-1)
        return replace(parts[0], train=mixed.select(order[:count].tolist()))


def _losses(run: Run, step: int) -> dict[str, float]:
    """The evaluation loss of each task at a step."""
    return {
        task: row[f"eval_{task}_loss"]
        for task in TASKS
        for row in run.log
        if row["step"] == step and row.get(f"eval_{task}_loss") is not None
    }
