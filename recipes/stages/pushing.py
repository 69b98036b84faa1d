"""`--push_to_hub`: what can be wrong with it is said before a training, the push comes after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from peft_svdinit.hub import named_base, prepare_repository, push_to_hub
from peft_svdinit.training import RecipeArguments, refusals_in_one_line

Push = Callable[..., None]


def prepare_push(arguments: RecipeArguments, base: str) -> Push:
    """What pushes a folder, once it is written; it does nothing without `push_to_hub`.

    The repository is made now, by the main process, so that a missing token costs no training.

    Args:
        arguments: of the run.
        base: the model that was trained on, for the card.

    Raises:
        SystemExit: with one line, on all processes, if the base has no name on the Hub, or the Hub
            does not take the push.
    """
    if not arguments.push_to_hub:
        return lambda folder, **more: None
    base = arguments.hub_base_model or base
    name = arguments.hub_model_id or Path(str(arguments.output_dir)).absolute().name

    def make_repository() -> None:
        named_base(base)
        prepare_repository(name, arguments.hub_private_repo)

    def push(folder: Path, **more: Any) -> None:
        def publish() -> None:
            pushed = push_to_hub(
                folder,
                name,
                base_model=base,
                private=arguments.hub_private_repo,
                revision=arguments.hub_revision,
                **more,
            )
            print(f"{pushed.repo_id} is at {pushed.url}")

        _on_main(publish, f"error: {folder} is trained, but not pushed")

    _on_main(make_repository, "error")
    return push


def _on_main(act: Callable[[], None], says: str) -> None:
    """Do it on the main process; a refusal ends all processes with one line."""
    refusal = [None]
    if PartialState().is_main_process:
        try:
            with refusals_in_one_line([RecipeArguments], says):
                act()
        except SystemExit as end:
            refusal = [end.code]
    broadcast_object_list(refusal)
    if refusal[0]:
        raise SystemExit(refusal[0])
