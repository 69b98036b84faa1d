"""Every verb that writes, as two commands of other options to one output, on tiny inputs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from peft_svdinit.cli import main
from peft_svdinit.training import TRAINING_LOG, TrainingLog, write_run_info
from support.adapter_files import kohya_lora
from support.comparison_runs import make_run
from support.lori_fixtures import lori_model
from support.tiny_models import rewrite_tensors, save_pair, trained_adapter


@dataclass(frozen=True)
class Command:
    """One command of the tool.

    Attributes:
        words: the command, with `{i}` for the folder of the inputs and `{out}` for the output.
        another: options in place of those after `|`, for another result in the same place.
        output: what it is called.
    """

    words: str
    another: str
    output: str = "result"

    def argv(self, inputs: Path, out: Path, *, another: bool = False) -> list[str]:
        fixed, _, own = self.words.partition(" | ")
        words = f"{fixed} {self.another if another else own}"
        return [word.format(i=inputs, out=out) for word in words.split()]


PAIR = "--base {i}/base --tuned {i}/tuned --target_modules q_proj down_proj"
QUIET = "--plots false"
COMMANDS = {
    "synthesize": Command(
        f"synthesize --adapter {{i}}/one --rank 6 --lora_r 2 {QUIET} --output_dir {{out}} | --seed 1",
        "--seed 2",
    ),
    "extract factors": Command(
        f"extract {PAIR} --save_as factors --lora_r 2 {QUIET} --output_dir {{out}} | --rank 4",
        "--rank 6",
    ),
    "extract an adapter's factors": Command(
        f"extract --lora_r 2 {QUIET} --output_dir {{out}} | --adapter {{i}}/one",
        "--adapter {i}/two",
    ),
    "extract an adapter": Command(
        f"extract {PAIR} --verify layers --output_dir {{out}} | --rank 3", "--rank 2"
    ),
    "analyze": Command(
        f"analyze --lora_r 2 {QUIET} --output_dir {{out}} | --adapter {{i}}/one",
        "--adapter {i}/two",
    ),
    "compare": Command(
        "compare --output_dir {out} | --runs {i}/runs/a {i}/runs/b", "--runs {i}/runs/a {i}/runs/c"
    ),
    "mask": Command(
        f"mask --source random --adapter {{i}}/one {QUIET} --output {{out}} | --seed 1", "--seed 2"
    ),
    "mask show": Command(
        f"mask {QUIET} --output {{out}} | --show {{i}}/lori", "--show {i}/lori {i}/other"
    ),
    "merge cat": Command(
        "merge --adapter {i}/one {i}/two --output {out} | --method cat", "--weights 0.5 2"
    ),
    "merge svd": Command(
        "merge --adapter {i}/one {i}/two --output {out} | --method svd --rank 4", "--weights 0.5 2"
    ),
    "merge ties": Command(
        "merge --adapter {i}/one {i}/two --output {out} | --method ties --density 0.5",
        "--method linear",
    ),
    "resize": Command("resize --adapter {i}/one --output {out} | --rank 2", "--rank 3"),
    "resize a file": Command(
        "resize --adapter {i}/kohya.safetensors --output {out} | --rank 2",
        "--rank 3",
        "result.safetensors",
    ),
    "export": Command("export --factors {i}/factors --output_dir {out} | --lora_r 2", "--lora_r 3"),
    "export compact": Command(
        "export --compact --output_dir {out} | --adapter {i}/lori", "--adapter {i}/other"
    ),
    "export stock": Command(
        "export --output_dir {out} | --adapter {i}/compact", "--adapter {i}/compact-other"
    ),
}  # fmt: skip


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
    teacher = f"synthesize --rank 6 --lora_r 2 {QUIET} --adapter {folder}"
    main(f"{teacher}/one --output_dir {folder}/factors".split())
    main(f"{teacher}/two --output_dir {folder}/factors-two".split())
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
def undrawn(yes: bool = True) -> Iterator[None]:
    """The pictures of a comparison, which take seconds to draw, are left blank."""
    with ExitStack() as patches:
        if yes:
            output, page = (
                "peft_svdinit.analysis.runs.output",
                "peft_svdinit.analysis.runs.html_page",
            )
            patches.enter_context(patch(f"{output}.draw_png", lambda *_: b"a picture"))
            patches.enter_context(patch(f"{page}.draw_svg", lambda *_: "<svg/>"))
        yield
