"""The processes of a run: that they begin alike, and how they end."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading

from accelerate import PartialState
from torch import nn

from peft_svdinit.models import is_split
from trainer_callbacks.agreement import check_equal


def check_same_start(model: nn.Module) -> None:
    """Raise RuntimeError unless what is trained begins as the same bits in all processes.

    DDP would give all of them what the first one has, in silence. Parameters that are in shards
    already belong to one whole, and are left out.
    """
    if PartialState().num_processes == 1:
        return
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_split(parameter)
    }
    if trained:
        check_equal(trained, "starts, which must not depend on a process")


def is_shared(model: nn.Module) -> bool:
    """Whether each process holds a part of the model, so that all take part in what reads it."""
    return any(is_split(parameter) for parameter in model.parameters())


def leave_process_group() -> None:
    """Join the threads of the process group, if there is one; call it when all else is done.

    gloo's threads release Python objects of the last exchange. One that comes to do so after the
    interpreter has ended aborts the process ("terminate called without an active exception"), and
    the launcher takes the run for a failed one. Only a group that nothing refers to joins them,
    and DeepSpeed refers to its group to the end: there the process ends without a finalisation,
    once other threads and what was to be done at exit are done.
    """
    gc.collect()
    PartialState().destroy_process_group()
    if "deepspeed" in sys.modules:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
