"""Small artefacts of every kind with the commands and functions that read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig
from safetensors.torch import save_file

from peft_svdinit import FactorsFile, LoriConfig, SvdLoraConfig
from peft_svdinit.analysis import write_evaluation
from peft_svdinit.factors import LayerStore, LoraAdapter
from peft_svdinit.low_rank import load_low_rank
from peft_svdinit.masks import LayerScores, load_scores, save_scores
from peft_svdinit.training import TrainingLog, read_run, write_run_info
from peft_svdinit.training.log import TRAINING_LOG
from support.adapter_files import lycoris_peft
from support.comparison_runs import COUNTED, make_run
from support.shared_artefacts import (
    low_rank_model,
    save_adapter_factors,
    save_compact,
    save_lori,
    save_mask,
    save_svd_adapter,
)
from support.tiny_models import save_pair, trained_adapter
from trainer_callbacks.rank_switch_memory import was_switched

_PUSHED = ["--repo_id", "user/x", "--base_model", "builtin:smollm2-135m", "--dry_run", "true"]
_PATTERNS: dict[str, Any] = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
    "exclude_modules": ["layers.1.mlp.down_proj"],
    "modules_to_save": [],
}
Reader = Callable[[Path], Any]


@dataclass(frozen=True)
class Artefact:
    """One kind.

    Attributes:
        save: makes it in a folder that does not exist.
        file: in the folder, whose JSON is edited.
        commands: of `svdinit`, with {x} for the folder and {out} for what is written.
        readers: functions of the folder.
    """

    save: Callable[[Path], Any]
    file: str
    commands: tuple[str, ...] = ()
    readers: tuple[Reader, ...] = ()


def _adapter(folder: Path) -> None:
    trained_adapter(folder, **_PATTERNS)


def _pair(folder: Path) -> None:
    save_pair(folder, sharded=True)


def _run(folder: Path) -> None:
    about = {"method": "svd", "label": "SVD", "budget": "student", "teacher": COUNTED}
    extra = {"comparison": about, "command": "recipes/train_lora.py", "dataset": "docstrings"}
    run = make_run("svd", extra=extra, runs_as={"processes": 1})
    trained_adapter(folder)
    write_run_info(folder, run.info)
    TrainingLog(folder / TRAINING_LOG, run.log)


def _comparison(folder: Path) -> None:
    trained_adapter(folder)
    context = {"model": "m", "dataset": "d", "machine": "2 cores", "command": "x.py"}
    (folder / "comparison.json").write_text(json.dumps({"headline": "h", "context": context}))
    (folder / "comparison_report.md").write_text("# Report\n\n## Limits\n\nMany.\n")


def _evaluation(folder: Path) -> None:
    trained_adapter(folder)
    interval = [1.0, 1.2]
    difference = {"difference": 0.1, "difference_interval": interval}
    losses = {"loss": 1.1, "loss_interval": interval}
    rows = [
        {"name": name, "parameters": 10, "loss": {**losses, "against_base": difference}}
        for name in ("base", "one", "two")
    ]
    rows[0]["lm_eval"] = {"task": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
    about = {"dataset_name": "d", "examples": 3, "split_seed": 0}
    record = {"data": {"loss": about}, "results": rows, "command": "c"}
    record |= {"model": {"model_name_or_path": "m"}, "environment": {"versions": {}}}
    write_evaluation(record, folder)


def _scores(folder: Path) -> None:
    scores = {"layers.0.q": torch.rand(4, 2), "layers.1.q": torch.rand(4, 2)}
    save_scores(folder, LayerScores(scores, dict.fromkeys(scores, 6), 0, {"kind": "random"}, "m"))


def _diffusers(folder: Path) -> None:
    folder.mkdir()
    names = ("unet.a.to_q", "unet.b.to_k")
    tensors = {f"{name}.lora_A.weight": torch.rand(2, 6) for name in names}
    tensors |= {f"{name}.lora_B.weight": torch.rand(5, 2) for name in names}
    config = {"r": 2, "lora_alpha": 4, "rank_pattern": {"a.to_q": 2}, "use_dora": False}
    config |= {"alpha_pattern": {"a.to_q": 3}, "use_rslora": False, "target_modules": ["to_q"]}
    written = json.dumps({f"unet.{key}": value for key, value in config.items()})
    save_file(tensors, folder / "a.safetensors", {"lora_adapter_metadata": written})


def _checkpoint(folder: Path) -> None:
    folder.mkdir()
    kept = {"options": {"a": 1}, "done": [{"step": 2}], "stable_ranks": [{"layer": 1.5}]}
    switch = {"args": {}, "attributes": {**kept, "epoch": 1, "groups": "x"}}
    state = {"global_step": 3, "stateful_callbacks": {"rank_switch": switch}}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def _without_base(save: Callable[[Path, Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: save(folder, folder.parent / "base")


def _mask(folder: Path) -> None:
    save_mask(folder, folder.parent / "base")
    shutil.rmtree(folder.parent / "for-mask")


def _store(folder: Path) -> Any:
    with LayerStore(folder, ["a", "b"], {"rank": 2}) as store:
        return list(store)


def _all_layers(folder: Path) -> Any:
    return list(LoraAdapter(folder).values())


_OF_ADAPTERS = (
    "extract --adapter {x} --output_dir {out} --lora_r 2 --plots false",
    "analyze --adapter {x} --output_dir {out} --lora_r 2 --plots false",
    "mask --source magnitude --scope matrix --adapter {x} --seed 0 --output {out} --plots false",
    "synthesize --adapter {x} --rank 6 --output_dir {out} --lora_r 2 --plots false",
    "merge --adapter {x} {x}/../other --output {out}",
    "resize --adapter {x} --rank 2 --output {out}",
    "push --folder {x}",
)
ARTEFACTS: dict[str, Artefact] = {
    "adapter": Artefact(_adapter, "adapter_config.json", _OF_ADAPTERS, (_all_layers,)),
    "LoRI": Artefact(
        _without_base(save_lori),
        "svdinit_config.json",
        (
            "export --adapter {x} --compact true --output_dir {out}",
            "mask --source magnitude --scope matrix --adapter {x} --output {out} --plots false",
            "push --folder {x}",
        ),
        (lambda folder: LoriConfig.from_pretrained(str(folder)),),
    ),
    "SVD": Artefact(
        _without_base(save_svd_adapter),
        "svdinit_config.json",
        ("push --folder {x}",),
        (lambda folder: SvdLoraConfig.from_pretrained(str(folder)),),
    ),
    "LoHa": Artefact(
        lambda folder: lycoris_peft(folder, LoHaConfig(r=2, alpha=4, target_modules=["q_proj"])),
        "adapter_config.json",
        ("resize --adapter {x} --rank 2 --output {out}",),
    ),
    "compact": Artefact(
        _without_base(save_compact),
        "lori_adapter.safetensors",
        ("export --adapter {x} --output_dir {out}", "push --folder {x}"),
    ),
    "mask": Artefact(
        _mask,
        "lori_mask.safetensors",
        ("mask --show {x} --output {out} --plots false", "push --folder {x}"),
    ),
    "factors": Artefact(
        _without_base(save_adapter_factors),
        "factors.safetensors",
        (
            "export --factors {x} --lora_r 2 --output_dir {out}",
            "analyze --factors {x} --lora_r 2 --output_dir {out} --plots false",
            "mask --source teacher --factors {x} --rank 2 --output {out} --plots false",
        ),
        (lambda folder: list(FactorsFile(folder / "factors.safetensors").values()),),
    ),
    "scores": Artefact(_scores, "lori_scores.safetensors", (), (load_scores,)),
    "diffusers": Artefact(
        _diffusers,
        "a.safetensors",
        ("resize --adapter {x}/a.safetensors --rank 1 --output {out}.safetensors",),
    ),
    "run": Artefact(_run, "run.json", ("push --folder {x}",), (read_run,)),
    "comparison": Artefact(_comparison, "comparison.json", ("push --folder {x} --comparison {x}",)),
    "evaluation": Artefact(_evaluation, "evaluation.json", ("push --folder {x} --evaluation {x}",)),
    "base": Artefact(
        _pair,
        "base/config.json",
        (
            "extract --base {x}/base --tuned {x}/tuned --rank 2 --verify none --output_dir {out}",
            "push --folder {x}/base",
        ),
    ),
    "index": Artefact(
        _pair,
        "tuned/model.safetensors.index.json",
        (
            "extract --base {x}/base --tuned {x}/tuned --rank 2 --verify none --output_dir {out}",
            "push --folder {x}/tuned",
        ),
    ),
    "low rank": Artefact(
        lambda folder: low_rank_model().save_pretrained(str(folder)),
        "low_rank.json",
        ("push --folder {x}",),
        (load_low_rank,),
    ),
    "checkpoint": Artefact(_checkpoint, "trainer_state.json", (), (was_switched,)),
    "layer store": Artefact(_store, "job.json", (), (_store,)),
}


def command_line(command: str, folder: Path, out: Path) -> list[str]:
    """Of a command of these, with what every push needs."""
    words = [word.format(x=folder, out=out) for word in command.split()]
    return [*words, *_PUSHED] if words[0] == "push" else words
