"""`svdinit push`: a folder on the Hub, with a model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .. import hub
from .summary import say


@dataclass(frozen=True)
class PushOptions:
    """Share an adapter, factors, a mask or a low-rank model on the Hub, with a model card."""

    folder: str = field(metadata={"help": "What to share: an adapter's folder, say."})
    repo_id: str = field(metadata={"help": "user/name, or name; made if it does not exist."})
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "The base model on the Hub, user/name or user/name@revision, where the folder "
            "records a path of this disk."
        },
    )
    comparison: str | None = field(
        default=None,
        metadata={"help": "Folder of a comparison whose figures the card shows."},
    )
    evaluation: str | None = field(
        default=None,
        metadata={"help": "Folder of recipes/evaluate_adapter.py, whose table the card shows."},
    )
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to push to, made if it does not exist."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead."})
    commit_message: str | None = field(default=None, metadata={"help": "Of the commit."})
    card: Literal["hub", "folder"] | None = field(
        default=None,
        metadata={"help": "Which README.md to keep where the Hub and the folder have their own."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print the files and the card, and push nothing."}
    )

    def __post_init__(self) -> None:
        if self.create_pr and self.revision is not None:
            raise ValueError("create_pr and revision exclude each other; give one of them")


def run(options: PushOptions) -> None:
    if options.dry_run:
        return _print_card(options)
    pushed = hub.push_to_hub(
        options.folder,
        options.repo_id,
        base_model=options.base_model,
        comparison=options.comparison,
        evaluation=options.evaluation,
        private=options.private or None,
        revision=options.revision,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
        card=options.card,
    )
    say(f"{len(pushed.files)} files: {', '.join(pushed.files)}")
    if pushed.deleted:
        say(f"Deleted, of the last push: {', '.join(pushed.deleted)}")
    _print_left_out(pushed.left_out)
    say(f"{pushed.repo_id}@{pushed.commit}\n{pushed.url}")


def _print_card(options: PushOptions) -> None:
    shared = hub.Shared.of(
        options.folder,
        base_model=options.base_model,
        comparison=options.comparison,
        evaluation=options.evaluation,
    )
    with shared.staged() as files:
        for name, path in files.items():
            say(f"{path.stat().st_size:>14,} bytes  {name}")
        card = shared.card(shared.own_card or hub.Card(), options.repo_id, files, options.revision)
    _print_left_out(shared.artefact.left_out)
    say(f"\nThe card of a new repository:\n\n{card}")


def _print_left_out(left_out: dict[str, str]) -> None:
    if left_out:
        say(f"Stays here: {', '.join(f'{name} ({why})' for name, why in left_out.items())}")
