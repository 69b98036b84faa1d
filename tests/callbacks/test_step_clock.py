"""Seconds of steps on a device that works behind the host, played by events of a made-up clock."""

from __future__ import annotations

import pytest
import torch

from trainer_callbacks.step_clock import StepClock, step_clock


class Device:
    """A stream: kernels run one after another, each not before the host asked for it."""

    def __init__(self) -> None:
        self.now = 0.0  # of the host
        self.free_at = 0.0
        self.waits = 0

    def kernel(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + seconds

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at = max(device.now, device.free_at)

    def query(self) -> bool:
        return self.device.now >= self.at

    def synchronize(self) -> None:
        self.device.waits += not self.query()
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, end_event: Event, /) -> float:
        if not (self.query() and end_event.query()):
            raise RuntimeError("both events must be completed")  # as CUDA's do
        return 1000 * (end_event.at - self.at)


def step(device: Device, clock: StepClock, *, host: float, kernels: float, loading: float) -> None:
    device.now += loading
    clock.begin()
    device.kernel(kernels)
    device.now += host
    clock.end()


@pytest.mark.parametrize(
    ("loading", "expected"),
    [
        (0.0, 40.0),  # the host runs ahead by 3 s a step
        (2.0, 40.0),  # kernels end while data is loaded
        (10.0, 40.0),  # the device waits for data, which is nobody's step
    ],
)
def test_kernels_that_end_while_data_is_loaded_count_once_and_loading_does_not(loading, expected):
    device = Device()
    clock = StepClock(mark=device.event)
    for _ in range(10):
        step(device, clock, host=1.0, kernels=4.0, loading=loading)
    assert device.waits == 0
    assert clock.read() == pytest.approx(expected)
    assert clock.read() == pytest.approx(expected)
    assert device.waits <= 1


def test_a_step_in_which_the_host_is_the_slower_lasts_as_long_as_the_host():
    device = Device()
    clock = StepClock(mark=device.event)
    for _ in range(3):
        step(device, clock, host=5.0, kernels=1.0, loading=2.0)
    assert clock.read() == pytest.approx(15.0)


def test_reading_on_the_way_and_going_on_from_a_checkpoint_change_no_sum():
    device = Device()
    clock = StepClock(mark=device.event)
    for number in range(6):
        step(device, clock, host=1.0, kernels=4.0, loading=1.0)
        if number % 2:
            assert clock.read() == pytest.approx(4.0 * (number + 1))
    # The next step is cut off by a kill and never ends.
    clock.begin()
    resumed = StepClock(clock.read(), mark=Device().event)
    assert resumed.read() == pytest.approx(24.0)
    other = Device()
    resumed = StepClock(24.0, mark=other.event)
    for _ in range(2):
        step(other, resumed, host=1.0, kernels=4.0, loading=9.0)
    assert resumed.read() == pytest.approx(32.0)


def test_finished_steps_are_taken_in_without_waiting_and_not_kept():
    device = Device()
    clock = StepClock(mark=device.event)
    for _ in range(1000):
        step(device, clock, host=1.0, kernels=0.5, loading=0.1)
    assert device.waits == 0 and not clock._steps


def test_an_end_without_a_begin_counts_nothing():
    clock = step_clock(torch.device("cpu"), 3.0)
    clock.end()
    assert clock.read() == 3.0
    clock.begin()
    clock.end()
    clock.end()
    assert 3.0 < clock.read() < 4.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_kernels_behind_the_host_are_waited_for_when_read():
    device = torch.device("cuda", torch.cuda.current_device())
    clock = step_clock(device)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    began.record()
    clock.begin()
    torch.cuda._sleep(500_000_000)
    clock.end()
    ended.record()
    assert not ended.query()
    seconds = clock.read()
    ended.synchronize()
    assert seconds == pytest.approx(began.elapsed_time(ended) / 1000, rel=0.01)
    assert seconds > 0.1
