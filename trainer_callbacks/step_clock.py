"""The seconds that optimizer steps take, on the host's clock or on a device's own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A moment in the order of work, with the interface of `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it has come."""
        ...

    def synchronize(self) -> None:
        """Wait until it has come."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from it to a later one; both must have come."""
        ...


class HostMark:
    """Now, on the host's clock."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: HostMark, /) -> float:
        return 1000 * (end_event.at - self.at)


class StepClock:
    """Sum of the seconds between `begin` and `end` of each step.

    With marks of a device, whose kernels run behind the host, a step lasts from when the device has
    done all that was asked of it before `begin` to when it has done all before `end`, however late
    that is. Steps follow each other on the device, so that what still runs while the next batch is
    loaded counts once, in its own step.

    Args:
        seconds: sum to go on from.
        mark: marks the present point in the order of work.
    """

    def __init__(self, seconds: float = 0.0, *, mark: Callable[[], Mark] = HostMark) -> None:
        self._seconds = seconds
        self._mark = mark
        self._began: Mark | None = None
        self._steps: deque[tuple[Mark, Mark]] = deque()

    def begin(self) -> None:
        self._began = self._mark()

    def end(self) -> None:
        """End the step that has begun, if one has; does not wait for the device."""
        if self._began is None:
            return
        self._steps.append((self._began, self._mark()))
        self._began = None
        self._take_finished()

    def read(self) -> float:
        """The seconds of all steps that have ended; waits for the device."""
        if self._steps:
            self._steps[-1][1].synchronize()
            self._take_finished()
        return self._seconds

    def _take_finished(self) -> None:
        while self._steps and self._steps[0][1].query():
            began, ended = self._steps.popleft()
            self._seconds += began.elapsed_time(ended) / 1000


def step_clock(device: torch.device, seconds: float = 0.0) -> StepClock:
    """A clock of the steps on `device`: on CUDA of its stream, elsewhere of the host."""

    def cuda_mark() -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return StepClock(seconds, mark=cuda_mark if device.type == "cuda" else HostMark)
