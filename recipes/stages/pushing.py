"""`--push_to_hub`: what can be wrong with it is said before a training, the push comes after it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from peft_svdinit.hub import base_on_hub, prepare_repository, push_to_hub
from peft_svdinit.training import ModelOptions, RecipeArguments, refusals_in_one_line

Push = Callable[..., None]


def prepare_push(arguments: RecipeArguments, model: ModelOptions) -> Push:
    """What pushes a folder, once it is written; it does nothing without `push_to_hub`.

    The base is looked for on the Hub, and the repository made, now and by the main process, so that
    a missing token costs no training. The push takes as long as it takes: no process waits for it.

    Args:
        arguments: of the run.
        model: that is trained.

    Raises:
        SystemExit: with one line, on all processes, if the base has no name on the Hub, or the Hub
            does not take the push.
    """
    if not arguments.push_to_hub:
        return lambda folder, **more: None
    base = arguments.hub_base_model or model.model_name_or_path
    if not arguments.hub_base_model and model.model_revision != "main" and "@" not in base:
        base = f"{base}@{model.model_revision}"
    name = arguments.hub_model_id or Path(str(arguments.output_dir)).absolute().name
    refusal: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            with refusals_in_one_line([RecipeArguments]):
                base_on_hub(base)
                prepare_repository(
                    name, arguments.hub_private_repo, revision=arguments.hub_revision
                )
        except SystemExit as end:
            refusal = [end.code]
    broadcast_object_list(refusal)
    if refusal[0]:
        raise SystemExit(refusal[0])

    def push(folder: str | Path, **more: Any) -> None:
        if not PartialState().is_main_process:
            return
        given = {"folder": str(folder), "repo_id": name, "base_model": base, **more}
        given |= {"revision": arguments.hub_revision} if arguments.hub_revision else {}
        words = [word for option, value in given.items() for word in (f"--{option}", value)]
        words += ["--private"] if arguments.hub_private_repo else []
        by_hand = shlex.join(["svdinit", "push", *words])
        says = f"error: what was trained is not pushed, `{by_hand}` does it"
        with refusals_in_one_line([RecipeArguments], says):
            pushed = push_to_hub(
                folder,
                name,
                base_model=base,
                private=arguments.hub_private_repo,
                revision=arguments.hub_revision,
                **more,
            )
        print(f"{pushed.repo_id} is at {pushed.url}")

    return push
