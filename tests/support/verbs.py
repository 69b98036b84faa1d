"""Every verb that writes, as two commands of other options to one output, on tiny inputs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from unittest.mock import patch

from matplotlib.figure import Figure

from peft_svdinit.cli import main
from peft_svdinit.training import TRAINING_LOG, TrainingLog, write_run_info
from support.adapter_files import kohya_lora
from support.comparison_runs import make_run
from support.lori_fixtures import lori_model
from support.tiny_models import rewrite_tensors, save_pair, trained_adapter


@dataclass(frozen=True)
class Command:
    """A command of the tool with options for one result, and for another in the same place.

    Attributes:
        words: what both share, with IN for the folder of the inputs and OUT for the output.
        options: for the one result.
        others: for the other.
        output: what the output is called.
    """

    words: str
    options: str
    others: str
    output: str = "result"

    @property
    def verb(self) -> str:
        return self.words.split()[0]

    def argv(self, inputs: Path, out: Path, *, another: bool = False) -> list[str]:
        words = f"{self.words} {self.others if another else self.options}".split()
        return [word.replace("IN/", f"{inputs}/").replace("OUT", str(out)) for word in words]

    def inputs(self, folder: Path) -> list[Path]:
        """What it reads for the one result."""
        words = f"{self.words} {self.options}".split()
        return [folder / word[3:] for word in dict.fromkeys(words) if word.startswith("IN/")]


COMMANDS = {
    "synthesize": Command(
        "synthesize --adapter IN/one --rank 6 --lora_r 2 --plots false --output_dir OUT",
        "--seed 1",
        "--seed 2",
    ),
    "extract factors": Command(
        "extract --base IN/base --tuned IN/tuned --target_modules q_proj down_proj --plots false "
        "--save_as factors --lora_r 2 --output_dir OUT",
        "--rank 4",
        "--rank 6",
    ),
    "extract an adapter's factors": Command(
        "extract --lora_r 2 --plots false --output_dir OUT",
        "--adapter IN/one",
        "--adapter IN/two",
    ),
    "extract an adapter": Command(
        "extract --base IN/base --tuned IN/tuned --target_modules q_proj down_proj "
        "--verify layers --output_dir OUT",
        "--rank 3",
        "--rank 2",
    ),
    "analyze": Command(
        "analyze --lora_r 2 --plots false --output_dir OUT",
        "--adapter IN/one",
        "--adapter IN/two",
    ),
    "compare": Command(
        "compare --output_dir OUT",
        "--runs IN/runs/a IN/runs/b",
        "--runs IN/runs/a IN/runs/c",
    ),
    "mask": Command(
        "mask --source random --adapter IN/one --plots false --output OUT",
        "--seed 1",
        "--seed 2",
    ),
    "mask show": Command(
        "mask --plots false --output OUT",
        "--show IN/lori",
        "--show IN/lori IN/other",
    ),
    "merge cat": Command(
        "merge --adapter IN/one IN/two --output OUT",
        "--method cat",
        "--weights 0.5 2",
    ),
    "merge svd": Command(
        "merge --adapter IN/one IN/two --output OUT",
        "--method svd --rank 4",
        "--weights 0.5 2",
    ),
    "merge ties": Command(
        "merge --adapter IN/one IN/two --output OUT",
        "--method ties --density 0.5",
        "--method linear",
    ),
    "resize": Command("resize --adapter IN/one --output OUT", "--rank 2", "--rank 3"),
    "resize a file": Command(
        "resize --adapter IN/kohya.safetensors --output OUT",
        "--rank 2",
        "--rank 3",
        "result.safetensors",
    ),
    "export": Command("export --factors IN/factors --output_dir OUT", "--lora_r 2", "--lora_r 3"),
    "export compact": Command(
        "export --compact --output_dir OUT",
        "--adapter IN/lori",
        "--adapter IN/other",
    ),
    "export stock": Command(
        "export --output_dir OUT",
        "--adapter IN/compact",
        "--adapter IN/compact-other",
    ),
}

# Commands that read more, in more ways.
READING = {
    "synthesize for a base": Command(
        "synthesize --adapter IN/one --rank 6 --lora_r 2 --plots false --output_dir OUT",
        "--base IN/base",
        "",
    ),
    "extract with a text": Command(
        "extract --base IN/base --tuned IN/tuned --target_modules q_proj --output_dir OUT",
        "--rank 2 --verify full",
        "",
    ),
    "analyze a pair": Command(
        "analyze --base IN/base --tuned IN/tuned --target_modules q_proj --plots false "
        "--output_dir OUT",
        "--rank 4 --lora_r 2",
        "",
    ),
    "analyze factors": Command(
        "analyze --lora_r 2 --plots false --output_dir OUT",
        "--factors IN/factors --base IN/base --intruders true",
        "",
    ),
    "mask of a teacher": Command(
        "mask --source teacher --plots false --output OUT", "--factors IN/factors --rank 4", ""
    ),
    "mask of magnitudes": Command(
        "mask --source magnitude --plots false --output OUT", "--adapter IN/one --seed 1", ""
    ),
    "mask beside another": Command(
        "mask --source random --adapter IN/one --plots false --output OUT",
        "--exclude IN/mask",
        "",
    ),
    "export for a base": Command(
        "export --factors IN/factors --output_dir OUT", "--energy 0.5 --base IN/base", ""
    ),
    "push": Command(
        "push --dry_run --repo_id user/shared --base_model user/base", "--folder IN/one", ""
    ),
}


def save_inputs(folder: Path) -> Path:
    """What the commands read, and of some of it another of the same shapes."""
    pair = save_pair(folder)
    shutil.copytree(pair.tuned_folder, folder / "tuned-two")
    rewrite_tensors(
        folder / "tuned-two" / "model.safetensors",
        lambda tensors: tensors.update({k: 1.1 * v for k, v in tensors.items() if "proj" in k}),
    )
    for number, name in enumerate(("one", "two", "three"), 1):
        trained_adapter(folder / name, seed=number, lora_alpha=4 * number)
    kohya_lora(folder / "kohya.safetensors")
    teacher = f"synthesize --rank 6 --lora_r 2 --plots false --adapter {folder}"
    main(f"{teacher}/one --output_dir {folder}/factors".split())
    main(f"{teacher}/two --output_dir {folder}/factors-two".split())
    mask = "mask --source random --plots false"
    main(f"{mask} --adapter {folder}/one --output {folder}/mask".split())
    for seed, name in enumerate(("lori", "other")):
        lori_model(lori_seed=seed, lora_alpha=8 * seed + 8).save_pretrained(str(folder / name))
        compact = folder / ("compact-other" if seed else "compact")
        main(f"export --compact --adapter {folder}/{name} --output_dir {compact}".split())
    for name, method, seed in (("a", "random", 0), ("b", "svd_delta", 0), ("c", "svd_delta", 1)):
        run, target = make_run(method, seed), folder / "runs" / name
        target.mkdir(parents=True)
        write_run_info(target, run.info)
        log = TrainingLog(target / TRAINING_LOG)
        for row in run.log:
            log.append(row)
    return folder


@contextmanager
def undrawn() -> Iterator[None]:
    """Figures, which take seconds to draw, are left blank."""

    def save(figure: Figure, file: IO[bytes], *, format: str, **options: object) -> None:
        file.write(b"<svg></svg>" if format == "svg" else b"a picture")

    with patch.object(Figure, "savefig", save):
        yield
