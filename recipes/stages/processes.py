"""The end of a process among several."""

from __future__ import annotations

import gc

from accelerate import PartialState


def leave_process_group() -> None:
    """Join the threads of the process group, if there is one; call it when all else is done.

    gloo's threads release Python objects of the last exchange. One that comes to do so after the
    interpreter has ended aborts the process ("terminate called without an active exception"), and
    the launcher takes the run for a failed one. Only a group that nothing refers to joins them.
    """
    gc.collect()
    PartialState().destroy_process_group()
